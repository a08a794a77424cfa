"""Fewer evaluations side by side: fewer steps, guidance that ends early, a few-step student; time, error, scores.

    python benchmarks/few_evaluations.py CHECKPOINT BUNDLE --student BUNDLE --out benchmarks/results/NAME.json

CHECKPOINT says what the model was trained on, and so what its clips are judged by (``exams.py``); BUNDLE is one of it,
the student's one of its student that is a flow map, ``--one-row`` one of a student of guidance alone. ``--also
NAME=BUNDLE``, ``--also-student`` and ``--also-one-row`` are other precisions of the three. ``--fitted`` takes AB2's
weights and times from what 'stiv tune' found of BUNDLE, and of the student of guidance for that one; ``--skipping``
those that skip blocks. All get the same prompts and noise. *Error* is the relative L2 error of latents
against the exact flow of BUNDLE: AB2 in ``--exact`` steps. *Spread* is how far latents of one prompt lie apart over
eight seeds, in percent of the first row's.
*Time* is a whole clip's on one thread, rows by turns, the median of the ratios to the first row in the same round.

Each row's scores are kept in ``--work`` when it is done, so that a stopped run goes on; times are taken last, together.
Writes a JSON file and, beside it, a Markdown table.
"""

import hashlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import command
import numpy as np
import typer
from bundle_source import as_image, as_video
from digit_scores import cpu_name
from exams import Exam, exam_of
from quantization_accuracy import keep, kept, percentages

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.tuned import TunedGrid
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.sampling.solvers import row_evaluations
from stiv_deploy.stiv_ref.checkpoint import open_checkpoint

FIRST_SEED = 100_000
"""Far from the seeds that ranges of 8 bits come from."""
SEEDS = 8
"""Seeds of one prompt, for the spread."""
TASKS = ("t2v", "ti2v")
STUDENT_STEPS = (1, 2, 4, 8)
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to sample: a name, the bundle's name among those given, and what its requests say."""

    name: str
    bundle: str
    options: Mapping[str, Any]

    def request(self, prompt: str, seed: int, picture: np.ndarray | None = None) -> GenerationRequest:
        """For one clip, with its first frame fp32 [3, H, W] in [-1, 1] if there is a ``picture``."""
        frames = {} if picture is None else {0: as_image(picture)}
        return GenerationRequest(prompt=prompt, seed=seed, frames=frames, **self.options)


class Kind(StrEnum):
    """What a bundle is of: the model, its few-step student, or one that has but its guidance in one row."""

    TEACHER = "teacher"
    STUDENT = "student"
    ONE_ROW = "one row"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A bundle, and its precision where that is not the first one's."""

    kind: Kind
    precision: str
    folder: Path

    @property
    def key(self) -> str:
        """Its name among all."""
        return f"{self.precision} {self.kind}".strip()

    @property
    def suffix(self) -> str:
        """What its rows' names end in."""
        return f", {self.precision}" if self.precision else ""


@dataclass(frozen=True, kw_only=True)
class Ways:
    """What the rows differ in: the guidance scale, AB2's steps and times, when guidance that ends early does."""

    scale: float
    steps: tuple[int, ...]
    shift: float
    stretch: float
    until: float


def teacher_rows(bundle: str, ways: Ways, suffix: str = "") -> Iterator[Row]:
    """Euler as the paper has it, and AB2 in fewer steps, guided throughout or not."""
    guided = {"guidance_scale": ways.scale}
    euler = {"solver": "euler", "num_inference_steps": 30, "time_shift": 1.0, "late_stretch": 1.0}
    yield Row(name=f"Euler, 30 steps{suffix}", bundle=bundle, options=guided | euler)
    for steps in ways.steps:
        times = {"time_shift": ways.shift, "late_stretch": ways.stretch}
        ab2 = guided | {"solver": "ab2", "num_inference_steps": steps} | times
        yield Row(name=f"AB2, {steps} steps{suffix}", bundle=bundle, options=ab2)
        early = ab2 | {"guidance_until": ways.until}
        yield Row(name=f"AB2, {steps} steps, guided until {ways.until:g}{suffix}", bundle=bundle, options=early)


def fitted_rows(bundle: str, grids: Sequence[TunedGrid], scale: float, name: str = "", suffix: str = "") -> list[Row]:
    """AB2 with weights of the model's own, over ``grids``, where they say so with skipped blocks."""
    return [
        Row(
            name=f"{name}AB2, {grid.steps} steps{_skipped(grid)}, fitted weights{suffix}",
            bundle=bundle,
            options=grid.model_dump(include={"solver", "time_shift", "late_stretch", "solver_weights"})
            | ({"skipped_steps": grid.skipped_steps} if grid.skipped_steps else {})
            | {"guidance_scale": scale, "num_inference_steps": grid.steps},
        )
        for grid in grids
    ]


def _skipped(grid: TunedGrid) -> str:
    return f", {len(grid.skipped_steps)} skipped" if grid.skipped_steps else ""


def student_rows(bundle: str, ways: Ways, suffix: str = "") -> Iterator[Row]:
    """The student, at :data:`STUDENT_STEPS`."""
    for steps in STUDENT_STEPS:
        options = {"guidance_scale": ways.scale, "num_inference_steps": steps}
        yield Row(name=f"student, {steps} step{'s' * (steps > 1)}{suffix}", bundle=bundle, options=options)


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean over clips of the relative L2 error of ``found`` [B, ...] against ``exact``."""
    axes = tuple(range(1, exact.ndim))
    errors = np.sqrt(np.square(found - exact).sum(axes) / np.square(exact).sum(axes))
    return float(errors.mean())


def spread(latents: np.ndarray) -> float:
    """Root mean square distance of ``latents`` [prompts, seeds, ...] from the mean over the seeds of their prompt."""
    return float(np.sqrt(np.var(latents.astype(np.float64), axis=1, ddof=1).mean()))


class Measurement:
    """All that the rows share: bundles by name, prompts, the exact flow of the first ``clips``."""

    def __init__(self, pipes: Mapping[str, StivPipeline], exam: Exam, exact: Row, clips: int, prompts: int) -> None:
        self.pipes, self.exam, self.clips, self.prompts = pipes, exam, clips, prompts
        self.exact = self.latents(exact)

    def latents(self, row: Row) -> np.ndarray:
        """Final latents [clips, ...] of the first prompts, text to video."""
        pipe = self.pipes[row.bundle]
        first = enumerate(self.exam.prompts[: self.clips])
        return pipe.sample(pipe.plan([row.request(prompt, FIRST_SEED + number) for number, prompt in first]))

    def row(self, row: Row) -> Result:
        """Errors, scores and spread of ``row``."""
        started, pipe = time.perf_counter(), self.pipes[row.bundle]
        (video,) = pipe.plan(row.request(self.exam.prompts[0], 0)).videos
        return {
            "name": row.name,
            "bundle": pipe.bundle.hash,
            "options": dict(row.options),
            "rows": row_evaluations(video.settings),
            "error": relative_error(self.latents(row), self.exact),
            "spread": spread(self.over_seeds(row)),
            "scores": {task: self.scores(row, task) for task in TASKS},
            "seconds": round(time.perf_counter() - started, 1),
        }

    def over_seeds(self, row: Row) -> np.ndarray:
        """Final latents [prompts, seeds, ...] of the first prompts."""
        pipe = self.pipes[row.bundle]
        requests = [
            row.request(prompt, FIRST_SEED + seed)
            for prompt in self.exam.prompts[: self.prompts]
            for seed in range(SEEDS)
        ]
        found = pipe.sample(pipe.plan(requests))
        return found.reshape(self.prompts, SEEDS, *found.shape[1:])

    def scores(self, row: Row, task: str) -> Result:
        """Percentages of all prompts, from text alone or with their first frames too."""
        pipe, image = self.pipes[row.bundle], task == "ti2v"
        requests = [
            row.request(prompt, FIRST_SEED + number, self.exam.first_frames[number] if image else None)
            for number, prompt in enumerate(self.exam.prompts)
        ]
        clips = as_video(np.asarray(pipe.run(pipe.plan(requests)).frames))
        return percentages(self.exam.judged, self.exam.verdicts(clips, image=image))

    def times(self, rows: Sequence[Row], rounds: int) -> dict[str, list[float]]:
        """Seconds of one clip, text to video, by row and round; rows by turns, each with the seed of the round."""
        found: dict[str, list[float]] = {row.name: [] for row in rows}
        for turn in range(rounds + 1):
            for row in rows:
                pipe = self.pipes[row.bundle]
                started = time.perf_counter()
                pipe.run(pipe.plan(row.request(self.exam.prompts[0], turn)))
                found[row.name] += [time.perf_counter() - started] if turn else []
        return found


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median over the rounds of each row's time over the first row's in the same round."""
    base = next(iter(seconds.values()))
    return {
        name: statistics.median(mine / others for mine, others in zip(each, base, strict=True))
        for name, each in seconds.items()
    }


def markdown(report: Result) -> str:
    """The report as a Markdown table with its command."""
    judged = report["judged"]
    head = [
        "",
        "rows of a clip",
        "time",
        "error",
        "spread",
        *(f"{task.upper()} {what}" for task in TASKS for what in judged),
    ]
    lines = [
        f"# Fewer evaluations, {report['date']}",
        "",
        f"`{report['command']}`",
        "",
        f"Checkpoint {report['checkpoint'][:12]}; {report['samples']} {report['prompts']}; error against "
        f"{report['exact']} AB2 steps on {report['clips']} clips, spread over {SEEDS} seeds of "
        f"{report['spread_prompts']} prompts in percent of the first row's, time as a ratio to the first row, "
        f"{report['rounds']} rounds; "
        f"{report['cpu']}, {report['threads']} thread{'s' * (report['threads'] > 1)}.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
    ]
    lines += ["| " + " | ".join(_cells(row, report["rows"][0], judged)) + " |" for row in report["rows"]]
    return "\n".join([*lines, ""])


def _cells(row: Result, base: Result, judged: Sequence[str]) -> list[str]:
    scores = [f"{row['scores'][task][what]:g}" for task in TASKS for what in judged]
    wide = f"{100 * row['spread'] / base['spread']:.0f}"
    return [row["name"], str(row["rows"]), f"{row['time']:.3f}", f"{row['error']:.3f}", wide, *scores]


def named_bundles(given: Sequence[str], option: str) -> dict[str, Path]:
    """Bundles by name of ``NAME=BUNDLE``; :class:`RequestError` for anything else."""
    parts = [each.partition("=") for each in given]
    if wrong := next((each for each, (name, _, path) in zip(given, parts, strict=True) if not name or not path), None):
        raise RequestError(f"{option} {wrong}: want NAME=BUNDLE, as in fp8=out/fp8")
    return {name: Path(path) for name, _, path in parts}


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder: what to judge clips by.")],
    bundle: Annotated[Path, typer.Argument(help="Bundle of it, whose flow is the exact one.")],
    student: Annotated[Path, typer.Option(help="Bundle of its student.")],
    out: Annotated[Path, typer.Option(help="JSON file; the table goes beside it.")],
    one_row: Annotated[Path | None, typer.Option(help="Bundle of a student of guidance alone.")] = None,
    also: Annotated[list[str] | None, typer.Option(metavar="NAME=BUNDLE", help="Another precision.")] = None,
    also_student: Annotated[list[str] | None, typer.Option(metavar="NAME=BUNDLE", help="Likewise, of it.")] = None,
    also_one_row: Annotated[list[str] | None, typer.Option(metavar="NAME=BUNDLE", help="Likewise, of that.")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale of all rows.")] = 2.0,
    steps: Annotated[str, typer.Option(help="Numbers of AB2 steps, with commas.")] = "15,10",
    fitted: Annotated[str, typer.Option(help="Numbers of AB2 steps for which BUNDLE was tuned.")] = "",
    skipping: Annotated[
        str, typer.Option(help="Numbers of AB2 steps in which one of them was tuned to skip blocks.")
    ] = "",
    time_shift: Annotated[float, typer.Option(help="Of AB2's steps.")] = 2.0,
    late_stretch: Annotated[float, typer.Option(help="Of AB2's steps.")] = 3.0,
    until: Annotated[float, typer.Option(help="When guidance ends that ends early.")] = 0.4,
    samples: Annotated[int, typer.Option(min=1, help="Prompts to judge.")] = 100,
    clips: Annotated[int, typer.Option(min=1, help="Clips that errors are measured on.")] = 16,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that the spread is measured on.")] = 4,
    exact: Annotated[int, typer.Option(min=2, help="AB2 steps that stand for the exact flow.")] = 120,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of times.")] = 5,
    work: Annotated[Path, typer.Option(help="Folder of finished rows.")] = Path("out/few-evaluations"),
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure what fewer evaluations cost and gain."""
    ways = Ways(
        scale=guidance, steps=tuple(map(int, steps.split(","))), shift=time_shift, stretch=late_stretch, until=until
    )
    contestants = [
        *contestants_of(Kind.TEACHER, bundle, also, "--also"),
        *contestants_of(Kind.STUDENT, student, also_student, "--also-student"),
        *contestants_of(Kind.ONE_ROW, one_row, also_one_row, "--also-one-row"),
    ]
    weighed = [each for each in contestants if not each.precision and each.kind is not Kind.STUDENT]
    skips = skipping_grids([each.folder for each in weighed], skipping)
    grids = {Kind.STUDENT: ()} | {
        each.kind: (*fitted_grids(each.folder, fitted), *skips[each.folder]) for each in weighed
    }
    rows = [row for each in in_order(contestants) for row in rows_of(each, ways, grids[each.kind])]
    opened = open_checkpoint(checkpoint)
    exam = exam_of(checkpoint, opened.config.sampling, samples)
    shared = {
        "samples": samples,
        "clips": clips,
        "spread_prompts": prompts,
        "exact": exact,
        "checkpoint": opened.sha256,
    }
    with ExitStack() as stack:
        pipes = {
            each.key: stack.enter_context(StivPipeline.from_bundle(each.folder, "onnxruntime", threads))
            for each in contestants
        }
        measurement = Measurement(pipes, exam, exact_row(ways, exact), clips, prompts)
        found = [measured(measurement, row, work, shared) for row in rows]
        seconds = measurement.times(rows, rounds)
    report: Result = shared | {
        "command": f"python {shlex.join(sys.argv)}",
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": threads,
        "versions": {name: version(name) for name in ("stiv-deploy", "onnxruntime", "numpy")},
        "prompts": exam.about,
        "judged": exam.judged,
        "rounds": rounds,
        "times": seconds,
        "rows": [row | {"time": ratio} for row, ratio in zip(found, ratios(seconds).values(), strict=True)],
    }
    out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    typer.echo(markdown(report))


def contestants_of(kind: Kind, own: Path | None, others: Sequence[str] | None, option: str) -> list[Contestant]:
    """The bundle ``own``, if there is one, and those of other precisions."""
    named = {"": own} | named_bundles(others or [], option)
    return [
        Contestant(kind=kind, precision=name, folder=folder) for name, folder in named.items() if folder is not None
    ]


def fitted_grids(bundle: Path, steps: str) -> tuple[TunedGrid, ...]:
    """What 'stiv tune' found for AB2 in each of these numbers of ``steps``, with commas; :class:`RequestError`."""
    numbers = [int(each) for each in steps.split(",") if each]
    tuned = Bundle.open(bundle).manifest.tuned
    found = [None if tuned is None else tuned.grid(number, "ab2") for number in numbers]
    for number, grid in zip(numbers, found, strict=True):
        if grid is None or grid.steps != number or not grid.solver_weights:
            raise RequestError(f"{bundle}: has no fitted weights of {number} steps; run: stiv tune {bundle}")
    return tuple(grid for grid in found if grid is not None)


def skipping_grids(bundles: Sequence[Path], steps: str) -> dict[Path, list[TunedGrid]]:
    """What it found for AB2 with skipped blocks in these numbers of ``steps``, by bundle; each in one of them."""
    numbers = [int(each) for each in steps.split(",") if each]
    found: dict[Path, list[TunedGrid]] = {}
    for bundle in bundles:
        tuned = Bundle.open(bundle).manifest.tuned
        best = [] if tuned is None else [tuned.skipping(number, "ab2")[:1] for number in numbers]
        found[bundle] = [grid for grids in best for grid in grids]
    known = {grid.steps for grids in found.values() for grid in grids}
    if missing := [number for number in numbers if number not in known]:
        raise RequestError(f"{missing[0]} steps skip no blocks, as far as 'stiv tune' has found; leave them out")
    return found


def in_order(contestants: Sequence[Contestant]) -> list[Contestant]:
    """The bundles' own precision first, then the others by name."""
    precisions = dict.fromkeys(each.precision for each in contestants)
    return [each for precision in precisions for each in contestants if each.precision == precision]


def rows_of(contestant: Contestant, ways: Ways, grids: Sequence[TunedGrid]) -> list[Row]:
    """Its ways to sample; AB2 with fitted weights over ``grids``."""
    key, suffix = contestant.key, contestant.suffix
    match contestant.kind:
        case Kind.TEACHER:
            return [*teacher_rows(key, ways, suffix), *fitted_rows(key, grids, ways.scale, "", suffix)]
        case Kind.STUDENT:
            return list(student_rows(key, ways, suffix))
        case Kind.ONE_ROW:
            return fitted_rows(key, grids, ways.scale, "guidance in one row, ", suffix)


def exact_row(ways: Ways, steps: int) -> Row:
    """What stands for the exact flow of the teacher."""
    times = {"time_shift": ways.shift, "late_stretch": 1.0}
    options = {"solver": "ab2", "num_inference_steps": steps, "guidance_scale": ways.scale}
    return Row(name="exact", bundle="teacher", options=options | times)


def measured(measurement: Measurement, row: Row, work: Path, shared: Result) -> Result:
    """What ``row`` gave when it was measured before with the same bundles and numbers, or gives now."""
    bundles = [measurement.pipes[name].bundle.hash for name in ("teacher", row.bundle)]
    fingerprint = hashlib.sha256(json.dumps([bundles, dict(row.options), shared]).encode()).hexdigest()
    found = kept(work, row.name, fingerprint)
    if found is None:
        found = measurement.row(row)
        keep(work, row.name, fingerprint, found)
    typer.echo(json.dumps({row.name: found["scores"], "error": found["error"]}), err=True)
    return found


if __name__ == "__main__":
    command.run(main)
