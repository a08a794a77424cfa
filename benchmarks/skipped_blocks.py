"""Steps that skip the blocks against fewer steps, at equal evaluations, on clips that nothing was fitted to.

    python benchmarks/skipped_blocks.py CHECKPOINT BUNDLE TUNING --out benchmarks/results/NAME.json

TUNING is what ``stiv tune BUNDLE --json TUNING`` wrote of a bundle exported with ``--skips``. Of each number of
evaluations it gives two grids of AB2 with fitted weights: the best of all without skips, and the best that skips, both
by the clips that chose there. They are sampled for captions that CHECKPOINT was not trained on (``exams.py``), by text
alone and with first frames; *error* is the relative L2 error of latents against ``--exact`` AB2 steps, *t* that of
Student's test of the logarithm of the errors' ratio over the clips (minus: skips are nearer).

Writes a JSON file, errors by clip, and beside it a Markdown table.
"""

import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import command
import numpy as np
import typer
from bundle_source import as_image
from digit_scores import cpu_name
from exams import Exam, exam_of

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.files import read_json
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.tuning import TuneReport
from stiv_deploy.runtime.sampling.settings import Solver
from stiv_deploy.runtime.sampling.tuning import Grid, Point, nearest, relative_errors
from stiv_deploy.stiv_ref.checkpoint import open_checkpoint

FIRST_SEED = 200_000
"""Far from all seeds that something was fitted to."""
TASKS = ("t2v", "ti2v")
Result = dict[str, Any]


def pairs(report: TuneReport) -> Iterator[tuple[Point, Point]]:
    """For each number of evaluations the best grid without skips and the best with them; :class:`RequestError`."""
    if not report.skips:
        raise RequestError("nothing was tried that skips; tune a bundle that was exported with --skips, on 3 clips")
    yield from ((each.fewer, each.point) for each in nearest(report.skips))


class Clips:
    """The captions of ``exam``, sampled by ``pipe`` with a guidance ``scale``."""

    def __init__(self, pipe: StivPipeline, exam: Exam, scale: float, exact: Grid) -> None:
        self._pipe, self._exam, self._scale = pipe, exam, scale
        self._exact = {task: self.latents(exact, task) for task in TASKS}

    def latents(self, grid: Grid, task: str) -> np.ndarray:
        """Final latents fp32 [clips, T, C, h, w] by ``grid``."""
        return self._pipe.sample(
            self._pipe.plan([self._request(grid, task, n) for n in range(len(self._exam.prompts))])
        )

    def _request(self, grid: Grid, task: str, number: int) -> GenerationRequest:
        return GenerationRequest(
            prompt=self._exam.prompts[number],
            seed=FIRST_SEED + number,
            frames={0: as_image(self._exam.first_frames[number])} if task == "ti2v" else {},
            guidance_scale=self._scale,
            solver=grid.solver,
            num_inference_steps=grid.steps,
            time_shift=grid.time_shift,
            late_stretch=grid.late_stretch,
            solver_weights=grid.solver_weights,
            skipped_steps=grid.skipped_steps,
        )

    def errors(self, grid: Grid, task: str) -> list[float]:
        """Error of each clip."""
        found: list[float] = relative_errors(self.latents(grid, task), self._exact[task]).tolist()
        return found

    def compared(self, fewer: Point, skips: Point, task: str) -> Result:
        """Both grids on all clips."""
        errors = {"fewer": self.errors(fewer.grid, task), "skips": self.errors(skips.grid, task)}
        logs = [math.log(with_skips / without) for without, with_skips in zip(*errors.values(), strict=True)]
        deviation = statistics.stdev(logs) / math.sqrt(len(logs))
        grids = {name: each.grid.model_dump(mode="json") for name, each in (("fewer", fewer), ("skips", skips))}
        return {
            "task": task,
            "evaluations": skips.evaluations,
            "grids": grids,
            "errors": errors,
            "ratio": math.exp(statistics.fmean(logs)),
            "t": statistics.fmean(logs) / deviation if deviation else 0.0,
        }


def markdown(report: Result) -> str:
    """The report as a Markdown table with its command."""
    head = ["evaluations", "", "without skips", "mean error", "with skips", "mean error", "ratio (geometric)", "t"]
    lines = [
        f"# Skipped blocks against fewer steps, {report['date']}",
        "",
        f"`{report['command']}`",
        "",
        f"Checkpoint {report['checkpoint'][:12]}; {report['samples']} {report['prompts']}; guidance "
        f"{report['guidance']:g}; error against {report['exact']} AB2 steps; {report['cpu']}.",
        "",
        "| " + " | ".join(head) + " |",
        "|---:|---|---|---:|---|---:|---:|---:|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in report["rows"]), ""])


def _cells(row: Result) -> list[str]:
    fewer, skips = (
        [_words(Grid.model_validate(row["grids"][name])), f"{statistics.fmean(row['errors'][name]):.3f}"]
        for name in ("fewer", "skips")
    )
    return [str(row["evaluations"]), row["task"].upper(), *fewer, *skips, f"{row['ratio']:.2f}", f"{row['t']:.1f}"]


def _words(grid: Grid) -> str:
    return f"{grid.steps} steps, {grid.times.removesuffix(', fitted weights')}"


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder: what captions are of.")],
    bundle: Annotated[Path, typer.Argument(help="Bundle of it with --skips.")],
    tuning: Annotated[Path, typer.Argument(help="What 'stiv tune BUNDLE --json' wrote.")],
    out: Annotated[Path, typer.Option(help="JSON file; the table goes beside it.")],
    guidance: Annotated[float, typer.Option(help="Guidance scale of all clips.")] = 2.0,
    samples: Annotated[int, typer.Option(min=2, help="Clips.")] = 32,
    exact: Annotated[int, typer.Option(min=2, help="AB2 steps that stand for the exact flow.")] = 90,
    time_shift: Annotated[float, typer.Option(help="Of those.")] = 2.0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure what skipped blocks gain."""
    chosen = list(pairs(TuneReport.model_validate(read_json(tuning))))
    opened = open_checkpoint(checkpoint)
    exam = exam_of(checkpoint, opened.config.sampling, samples)
    rows = []
    with StivPipeline.from_bundle(bundle, "onnxruntime", threads) as pipe:
        clips = Clips(pipe, exam, guidance, Grid(solver=Solver.AB2, steps=exact, time_shift=time_shift))
        for task in TASKS:
            for fewer, skips in chosen:
                rows.append(clips.compared(fewer, skips, task))
                typer.echo(f"{task}, {skips.evaluations} evaluations: {rows[-1]['ratio']:.3f}", err=True)
    report: Result = {
        "command": f"python {shlex.join(sys.argv)}",
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "checkpoint": opened.sha256,
        "bundle": pipe.bundle.hash,
        "versions": {name: version(name) for name in ("stiv-deploy", "onnxruntime", "numpy")},
        "samples": samples,
        "prompts": exam.about,
        "guidance": guidance,
        "exact": exact,
        "rows": rows,
    }
    out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    typer.echo(markdown(report))


if __name__ == "__main__":
    command.run(main)
