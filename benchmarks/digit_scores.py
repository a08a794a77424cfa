"""Does the caption's digit move the caption's way? Measured on balanced prompts over guidance scales.

    python benchmarks/digit_scores.py CHECKPOINT_OR_BUNDLE --out benchmarks/results/digit_scores.json
    python benchmarks/digit_scores.py runs/tiny   # a running training: its last saved state

Every setting gets the same prompts and seeds. Text-to-video (T2V) at every scale; at the best one without
renormalization and without guidance, and image-to-video (TI2V) from first frames of the *test* split. The scorers are
validated on real test clips, and on those clips through the VAE, in the same run. Writes a JSON file and, beside it, a
Markdown table and a contact sheet.
"""

import json
import os
import platform
import shlex
import sys
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import command
import numpy as np
import torch
import typer
from clip_source import Settings, Source, Video
from scorers import Judgement, brightness, judge, percentages
from sources import open_source

from stiv_deploy.stiv_ref.data.digit_requests import DigitRequests, balanced_requests, real_clips
from stiv_deploy.stiv_ref.data.moving_digits import MovingDigits
from stiv_deploy.stiv_ref.decibels import decibels
from stiv_deploy.stiv_ref.plots import Row, contact_sheet

VALIDATION_CLIPS = 300
SHEET_ROWS = 20
Result = dict[str, Any]


def psnr(video: Video, truth: Video) -> float:
    """Peak signal-to-noise ratio in dB (peak 2, values in [-1, 1]), mean over samples [B, ...]."""
    error = np.square(video - truth).reshape(len(video), -1).mean(axis=1)
    return round(float(decibels(error, 2).mean()), 2)


def validate(source: Source) -> Result:
    """Scores of real clips of the test split, as they are and, where possible, through the VAE: the upper bounds."""
    clips = MovingDigits("test").draw(VALIDATION_CLIPS, max(source.frames, 2), torch.Generator().manual_seed(1))
    video = clips.video.numpy()
    result: Result = {"clips": VALIDATION_CLIPS}
    result["real"] = percentages(judge(brightness(video), clips.digits, clips.directions))
    coded = source.reconstruct(video)
    if coded is not None:
        result["through_vae"] = percentages(judge(brightness(coded), clips.digits, clips.directions))
        result["through_vae"]["psnr_db"] = psnr(coded, video)
    return result


class Experiment:
    """Runs settings on one source and one set of requests, and collects rows."""

    def __init__(self, source: Source, requests: DigitRequests, batch: int) -> None:
        self.source, self.requests, self.batch = source, requests, batch
        self.rows: list[Result] = []
        self.clips: dict[str, tuple[Video, list[Judgement]]] = {}

    def run(self, task: str, settings: Settings, real: Video | None = None) -> Result:
        """Generate and score all requests; ``real`` clips [B, F, 3, H, W] give the first frames of TI2V."""
        started, parts = time.perf_counter(), []
        for start in range(0, len(self.requests), self.batch):
            chosen = slice(start, start + self.batch)
            prompts = self.requests.prompts[chosen]
            given = None if real is None else {0: real[chosen, 0]}
            parts.append(self.source.generate(prompts, range(start, start + len(prompts)), settings, given))
        video = np.concatenate(parts)
        judgements = judge(brightness(video), self.requests.digits, self.requests.directions)
        row: Result = {"task": task, "mode": settings.mode, "scale": settings.scale, "renorm": settings.renorm}
        row |= percentages(judgements, moving=self.source.frames > 1)
        if real is not None:
            row |= {
                "first_frame_psnr_db": psnr(video[:, 0], real[:, 0]),
                "rest_psnr_db": psnr(video[:, 1:], real[:, 1:]),
            }
        row["seconds"] = round(time.perf_counter() - started, 1)
        self.rows.append(row)
        self.clips[f"{task} {settings.mode} {settings.scale}{'' if settings.renorm else ' no renorm'}"] = (
            video,
            judgements,
        )
        typer.echo(json.dumps(row), err=True)
        return row


def measure(
    source: Source, requests: DigitRequests, scales: list[float], base: Settings, batch: int
) -> tuple[Experiment, Result]:
    """All runs, varying ``base``; returns them and the row of the best T2V scale."""
    experiment = Experiment(source, requests, batch)
    moving = source.frames > 1
    task = "t2v" if moving else "t2i"
    rows = [experiment.run(task, replace(base, scale=scale)) for scale in scales]
    best = max(rows, key=lambda row: (row["both" if moving else "digit"], -row["scale"]))
    experiment.run(task, replace(base, scale=best["scale"], renorm=False))
    experiment.run(task, replace(base, scale=1.0, mode="none", renorm=False))
    if moving:
        real = real_clips(requests, source.frames).numpy()
        experiment.run("ti2v", replace(base, scale=best["scale"]), real)
        experiment.run("ti2v", replace(base, scale=best["scale"], mode="sit"), real)
    return experiment, best


def markdown(report: Result) -> str:
    """The report as a Markdown table with its command."""
    lines = [
        f"# Digit and direction scores, {report['date']}",
        "",
        f"`{report['command']}`",
        "",
        ", ".join(f"{key}: {value}" for key, value in report["source"].items())
        + f"; {report['samples']} balanced prompts, {report['steps']} Euler steps"
        + (f", time shift {report['time_shift']}" if report["time_shift"] else "")
        + f"; {report['cpu']}.",
        "",
        "| what | mode | scale | renorm | digit % | direction % | both % | first frame PSNR | other frames PSNR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def line(what: str, row: Result) -> str:
        keys = ("mode", "scale", "renorm", "digit", "direction", "both", "first_frame_psnr_db", "rest_psnr_db")
        return "| " + " | ".join([what, *(str(row.get(key, "")) for key in keys)]) + " |"

    scorers = report["scorers"]
    lines.append(line(f"*real test clips ({scorers['clips']})*", scorers["real"]))
    if "through_vae" in scorers:
        lines.append(line("*real test clips through the VAE*", scorers["through_vae"]))
    lines += [line(row["task"].upper(), row) for row in report["rows"]]
    return "\n".join([*lines, ""])


def sheet_rows(experiment: Experiment, best: Result) -> list[Row]:
    """Captioned, marked clips of the best T2V setting and of TI2V."""
    rows = []
    moving = experiment.source.frames > 1
    for task in ("t2v", "ti2v") if moving else ("t2i",):
        video, judgements = experiment.clips[f"{task} jit {best['scale']}"]
        for clip, seen, prompt in list(zip(video, judgements, experiment.requests.prompts, strict=True))[:SHEET_ROWS]:
            right = seen.digit_right and seen.direction_right
            caption = f"{task.upper()}: {prompt}" + ("" if right else f" (seen: {seen.digit} {seen.direction or ''})")
            rows.append(Row(video=clip, caption=caption, mark="right" if right else "wrong"))
    return rows


def cpu_name() -> str:
    """Model name of the processor and the threads used."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def main(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint, a bundle, or a training run.")],
    out: Annotated[Path, typer.Option(help="JSON file; the table and the contact sheet go beside it.")] = Path(
        "benchmarks/results/digit_scores.json"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Prompts per setting; multiples of 40 are fully balanced.")] = 100,
    scales: Annotated[str, typer.Option(help="Guidance scales, with commas.")] = "1.5,2,3,4,6",
    steps: Annotated[int, typer.Option(min=1)] = 30,
    batch: Annotated[int, typer.Option(min=1, help="Clips generated at once.")] = 20,
    backend: Annotated[str, typer.Option(help="Runtime backend, for a bundle.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    time_shift: Annotated[
        float | None, typer.Option(help="Of the sampling times; by default the checkpoint's.")
    ] = None,
) -> None:
    """Measure digit and direction scores of SOURCE."""
    torch.set_num_threads(threads)
    values = [float(scale) for scale in scales.split(",")]
    opened = open_source(source, backend, threads)
    requests = balanced_requests(samples, moving=opened.frames > 1)
    scorers = validate(opened)
    typer.echo(json.dumps(scorers), err=True)
    experiment, best = measure(opened, requests, values, Settings(steps=steps, scale=1.0, time_shift=time_shift), batch)
    report: Result = {
        "command": f"python {shlex.join(sys.argv)}",
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "versions": {name: version(name) for name in ("stiv-deploy", "torch", "numpy", "scikit-learn")},
        "source": opened.describe(),
        "samples": samples,
        "steps": steps,
        "time_shift": time_shift,
        "scorers": scorers,
        "best": best,
        "rows": experiment.rows,
    }
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    heading = f"best scale {best['scale']}, {steps} steps; green: digit and direction as asked"
    contact_sheet(sheet_rows(experiment, best), out.with_suffix(".png"), columns=2, heading=heading)
    typer.echo(markdown(report))


if __name__ == "__main__":
    command.run(main)
