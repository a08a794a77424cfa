"""What each precision costs: what the clips show, and errors along the trajectory.

    python benchmarks/quantization_accuracy.py CHECKPOINT --scales-fp8 F --scales-int8 F --out benchmarks/results/X.json

Precisions: fp32, bf16, fp16, fp8, int8 and, with its scales, nvfp4 by the default plan, and the counter-examples with
every layer in 8 bits. All get the same prompts, seeds and first frames, and the solver and times that the checkpoint
recommends; the guidance scale is the one that is best for fp32. What clips are judged by is what the checkpoint was
trained on (``exams.py``).
Every precision is kept in ``--work`` when it is done, so that a stopped run goes on and ``--only`` can share the work
between processes.
Writes a JSON file and, beside it, a Markdown table and plots.
"""

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import command
import numpy as np
import torch
import trajectories
import typer
from clip_source import Settings, Video
from digit_scores import cpu_name
from exams import Exam, Verdict, exam_of
from precisions import EVERYTHING, NAMES, Variant, exact, variant
from sources import ReferenceSource

from stiv_deploy.calibration.layers import Format
from stiv_deploy.calibration.plan import PrecisionPlan, load_plan
from stiv_deploy.calibration.scales import Scales, check_fits, load_scales
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, load_checkpoint
from stiv_deploy.stiv_ref.files import sha256
from stiv_deploy.stiv_ref.generation import settings_of

FIRST_SEED = 100_000
"""Far from the seeds that ranges come from: a range must not be judged on the noise that it was taken from."""
TASKS = ("t2v", "ti2v")
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of a run's settings; ``scales`` are guidance scales, ``clips`` how many clips errors are measured on."""

    samples: int
    steps: int
    scales: tuple[float, ...]
    clips: int


class Experiment:
    """One checkpoint with everything that all precisions share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ranges: dict[Format, Scales],
        plans: dict[Format, PrecisionPlan],
        plan: Plan,
        exam: Exam,
        batch: int,
    ) -> None:
        self.checkpoint, self.ranges, self.plans, self.plan = checkpoint, ranges, plans, plan
        self.exam, self.batch = exam, batch
        self.settings = replace(settings_of(checkpoint.config.sampling), steps=plan.steps)

    @cached_property
    def truths(self) -> dict[str, trajectories.Truth]:
        """The float64 runs by task, on the first clips."""
        wide, count = exact(self.checkpoint), self.plan.clips
        return {
            task: trajectories.true_run(
                wide,
                trajectories.Clips(
                    prompts=self.exam.prompts[:count],
                    seeds=range(FIRST_SEED, FIRST_SEED + count),
                    images=torch.from_numpy(self.exam.first_frames[:count]) if task == "ti2v" else None,
                ),
                self.settings,
            )
            for task in TASKS
        }

    def scores(self, measured: Variant, task: str, scale: float) -> Result:
        """Percentages of one task and guidance scale, and the verdicts on every clip, in the order of the exam."""
        source = ReferenceSource(measured.checkpoint, {})
        settings = Settings(steps=self.plan.steps, scale=scale, solver=self.settings.solver.value)
        clips = np.concatenate([self.clips(source, task, settings, start) for start in self.starts()])
        finite = np.isfinite(clips).reshape(len(clips), -1).all(axis=1)
        verdicts = self.exam.verdicts(np.nan_to_num(clips), image=task == "ti2v")
        return percentages(self.exam.judged, verdicts) | {"finite": int(finite.sum()), "verdicts": verdicts}

    def starts(self) -> range:
        """Number of the first clip of each batch."""
        return range(0, len(self.exam.prompts), self.batch)

    def clips(self, source: ReferenceSource, task: str, settings: Settings, start: int) -> Video:
        """The clips of one batch, [B, F, 3, H, W]."""
        prompts = self.exam.prompts[start : start + self.batch]
        stop = start + len(prompts)
        given = {0: self.exam.first_frames[start:stop]} if task == "ti2v" else None
        return source.generate(prompts, range(FIRST_SEED + start, FIRST_SEED + stop), settings, given)

    def run(self, name: str, best: float | None) -> Result:
        """All measurements of one precision; at ``best``, or at every guidance scale to find it."""
        started = time.perf_counter()
        measured = variant(name, self.checkpoint, self.ranges, self.plans)
        scales = self.plan.scales if best is None else (best,)
        t2v = {f"{scale:g}": self.scores(measured, "t2v", scale) for scale in scales}
        best = best or best_scale(t2v, self.exam.judged[-1])
        return {
            "name": name,
            "how": measured.how,
            "best_scale": best,
            "t2v": t2v,
            "ti2v": {f"{best:g}": self.scores(measured, "ti2v", best)},
            "errors": {task: trajectories.measure(measured.checkpoint, truth) for task, truth in self.truths.items()},
            "seconds": round(time.perf_counter() - started, 1),
        }


def shown(row: Result, base: Result, task: str, exam: Exam) -> dict[str, float]:
    """The percentages of one task, for the log."""
    return {what: part["percent"] for what, part in compared(row, base, task, exam.judged).items()}


def percentages(judged: Sequence[str], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Percent of clips that are right in each of ``judged``, of those of which it was asked."""
    columns = {name: [verdict[index] for verdict in verdicts] for index, name in enumerate(judged)}
    return {name: percent([flag for flag in column if flag is not None]) for name, column in columns.items()}


def percent(flags: Sequence[bool]) -> float:
    """Percent of ``flags`` that are true; 0 of none."""
    return round(100 * sum(flags) / max(1, len(flags)), 1)


def best_scale(t2v: dict[str, Result], last: str) -> float:
    """The guidance scale with the most clips that are right in ``last``, all together; the smallest of equals."""
    return float(max(t2v, key=lambda scale: (t2v[scale][last], -float(scale))))


def compared(row: Result, base: Result, task: str, judged: Sequence[str]) -> Result:
    """Scores of ``row`` at the best scale against those of fp32 on the same prompts, seeds and first frames.

    ``changed`` counts the clips with another verdict; a difference in points is the sum of as many signs, and by
    chance alone has the standard deviation ``chance`` = 100 sqrt(changed) / clips.
    """
    scale = f"{base['best_scale']:g}"
    mine, others = row[task][scale], base[task][scale]
    result: Result = {}
    for index, what in enumerate(judged):
        pairs = [(a[index], b[index]) for a, b in zip(mine["verdicts"], others["verdicts"], strict=True)]
        asked = [pair for pair in pairs if None not in pair]
        changed = sum(a != b for a, b in asked)
        result[what] = {
            "percent": mine[what],
            "points": round(mine[what] - others[what], 1),
            "changed": changed,
            "chance": round(100 * changed**0.5 / max(1, len(asked)), 1),
        }
    return result


def markdown(report: Result) -> str:
    """The report as Markdown tables with its command."""
    rows, base = report["rows"], report["rows"][0]
    judged = report["judged"]
    lines = [
        f"# Accuracy by precision, {report['date']}",
        "",
        f"`{report['command']}`",
        "",
        f"Checkpoint {report['checkpoint'][:12]}, scales "
        f"{' and '.join(f'{name} {each[:12]}' for name, each in report['scales'].items())}; "
        f"{report['samples']} {report['prompts']}, {report['steps']} "
        f"{report['solver']} steps, JIT guidance, best scale for fp32: {base['best_scale']:g}; {report['cpu']}.",
        "",
        "Percent of clips that are right, of those of which it was asked; (points against fp32 ± what chance alone "
        "gives for as many changed verdicts). The same prompts, seeds and first frames throughout.",
        "",
        "| precision | " + " | ".join(f"{task.upper()} {what}" for task in TASKS for what in judged) + " |",
        "|---|" + "---:|" * (len(TASKS) * len(judged)),
    ]
    for row in rows:
        cells = [f"{part['percent']:g} ({part['points']:+g} ± {part['chance']:g})" for part in parts(row, base, judged)]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    lines += ["", *error_table(rows), "", "How each was computed:", ""]
    lines += [f"- {row['name']}: {row['how']}; {row['seconds']:.0f} s" for row in rows]
    return "\n".join([*lines, ""])


def parts(row: Result, base: Result, judged: Sequence[str]) -> list[Result]:
    """The comparisons of all tasks and scores, in the order of the table."""
    return [part for task in TASKS for part in compared(row, base, task, judged).values()]


def error_table(rows: list[Result]) -> list[str]:
    """Relative L2 errors against float64, by timestep band and of the final latents."""
    bands = list(rows[0]["errors"][TASKS[0]]["bands"])
    head = [f"{task.upper()} {band}" for task in TASKS for band in (*bands, "latents")]
    lines = [
        "Relative L2 error against the float64 reference: guided velocity by timestep band (t = 0 is noise) from the "
        "reference's latents, and final latents of a free run.",
        "",
        "| precision | " + " | ".join(head) + " |",
        "|---|" + "---:|" * len(head),
    ]
    for row in rows:
        found = [
            value
            for task in TASKS
            for value in (*row["errors"][task]["bands"].values(), row["errors"][task]["latents"][-1])
        ]
        lines.append("| " + " | ".join([row["name"], *(f"{value:.1e}" for value in found)]) + " |")
    return lines


def within(rows: list[Result], judged: Sequence[str]) -> Result:
    """Whether every precision but the counter-examples is within 2 points of fp32, by task and score."""
    planned = [row for row in rows[1:] if EVERYTHING not in row["name"]]
    return {
        row["name"]: {
            task: {what: found["points"] >= -2 for what, found in compared(row, rows[0], task, judged).items()}
            for task in TASKS
        }
        for row in planned
    }


def kept(work: Path, name: str, fingerprint: str) -> Result | None:
    """The finished part of a precision, if it is of the same run."""
    try:
        part = json.loads((work / f"{name.replace(' ', '_')}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return part["result"] if part.get("fingerprint") == fingerprint else None


def keep(work: Path, name: str, fingerprint: str, result: Result) -> None:
    """Keep a finished part, whole or not at all."""
    work.mkdir(parents=True, exist_ok=True)
    target = work / f"{name.replace(' ', '_')}.json"
    temporary = target.with_suffix(".partial")
    temporary.write_text(json.dumps({"fingerprint": fingerprint, "result": result}), encoding="utf-8")
    temporary.rename(target)


def chosen_names(only: str | None, nvfp4: bool = True) -> list[str]:
    """The precisions to run, fp32 first, ``nvfp4`` where it has scales; :class:`RequestError` for an unknown one."""
    asked = [name.strip() for name in only.split(",")] if only else [each for each in NAMES if nvfp4 or each != "nvfp4"]
    if "nvfp4" in asked and not nvfp4:
        raise RequestError("--only nvfp4: needs --scales-nvfp4; make it with 'stiv calibrate --precision nvfp4'")
    if unknown := [name for name in asked if name not in NAMES]:
        raise RequestError(f"--only {unknown[0]}: no such precision; there are: {', '.join(NAMES)}")
    return ["fp32", *(name for name in asked if name != "fp32")]


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    scales_fp8: Annotated[Path, typer.Option(help="Scale file of 'stiv calibrate --precision fp8'.")],
    scales_int8: Annotated[Path, typer.Option(help="Scale file of 'stiv calibrate --precision int8'.")],
    out: Annotated[Path, typer.Option(help="JSON file; table and plots go beside it.")],
    scales_nvfp4: Annotated[Path | None, typer.Option(help="The same of nvfp4, to measure it too.")] = None,
    plan_fp8: Annotated[Path | None, typer.Option(help="Precision plan. [default: the default plan]")] = None,
    plan_int8: Annotated[Path | None, typer.Option(help="Precision plan. [default: the default plan]")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts; of digits, multiples of 40 are fully balanced.")] = 100,
    steps: Annotated[int | None, typer.Option(min=1, show_default="the checkpoint's")] = None,
    guidance: Annotated[str, typer.Option(help="Guidance scales to choose from, with commas.")] = "2,4",
    clips: Annotated[int, typer.Option(min=1, help="Clips of each task that errors are measured on.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Clips generated at once; changes nothing but time.")] = 5,
    only: Annotated[str | None, typer.Option(help="Precisions, with commas; fp32 is always among them.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of finished parts.")] = Path("out/quantization-accuracy"),
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure what each precision costs."""
    torch.set_num_threads(threads)
    names = chosen_names(only, scales_nvfp4 is not None)
    loaded = load_checkpoint(checkpoint)
    digest = loaded.sha256
    files: dict[Format, Path] = {"fp8": scales_fp8, "int8": scales_int8}
    files |= {} if scales_nvfp4 is None else {"nvfp4": scales_nvfp4}
    ranges = {name: load_scales(path) for name, path in files.items()}
    for name, path in files.items():
        check_fits(ranges[name], digest, name, str(path))
    given: dict[Format, Path | None] = {"fp8": plan_fp8, "int8": plan_int8}
    plans = {name: load_plan(path, loaded.config.model, name) for name, path in given.items() if path}
    sampling = loaded.config.sampling
    plan = Plan(
        samples=samples, steps=steps or sampling.steps, scales=tuple(map(float, guidance.split(","))), clips=clips
    )
    hashes = {name: sha256(path) for name, path in files.items()}
    what = [digest, hashes, repr(plan), {name: each.layers for name, each in plans.items()}]
    fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    exam = exam_of(checkpoint, sampling, samples)
    experiment = Experiment(loaded, ranges, plans, plan, exam, batch)
    rows: list[Result] = []
    for name in names:
        row = kept(work, name, fingerprint)
        if row is None:
            row = experiment.run(name, rows[0]["best_scale"] if rows else None)
            keep(work, name, fingerprint, row)
        rows.append(row)
        scores = {task: shown(row, rows[0], task, exam) for task in TASKS}
        typer.echo(f"{name}: {json.dumps(scores)}, {row['seconds']:.0f} s", err=True)
    report: Result = {
        "command": f"python {shlex.join(sys.argv)}",
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "versions": {name: version(name) for name in ("stiv-deploy", "torch", "nvidia-modelopt", "scikit-learn")},
        "checkpoint": digest,
        "scales": hashes,
        "samples": samples,
        "prompts": exam.about,
        "judged": exam.judged,
        "steps": plan.steps,
        "solver": sampling.solver.value,
        "within_2_points": within(rows, exam.judged),
        "rows": [
            row | {"against_fp32": {task: compared(row, rows[0], task, exam.judged) for task in TASKS}} for row in rows
        ],
    }
    out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    trajectories.plot({row["name"]: row["errors"] for row in rows}, out.with_suffix(".png"))
    typer.echo(markdown(report))


if __name__ == "__main__":
    command.run(main)
