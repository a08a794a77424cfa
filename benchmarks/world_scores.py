"""Does a clip show what was asked of the world? Every task on held-out clips, scored by reading the pixels.

    python benchmarks/world_scores.py CHECKPOINT_OR_BUNDLE --out benchmarks/results/world_scores.json
    python benchmarks/world_scores.py runs/world --tasks t2v,ti2v --samples 26   # a running training: its last state

Prompts, given frames and truth are those of held-out clips of the world that the checkpoint was trained on (the
``recipe.toml`` beside it, or ``--recipe``). The scorers are validated on those clips in the same run, as they are,
through the VAE, and with planted faults. Given frames are compared with repeating the nearest one and with linear
blending. Writes a JSON file and, beside it, a Markdown table and a contact sheet.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import command
import numpy as np
import torch
import typer
from clip_source import Given, Settings, Source, Video
from digit_scores import cpu_name, psnr
from sources import open_source

from stiv_deploy.stiv_ref.data.views.scores import aggregate_views, score_views
from stiv_deploy.stiv_ref.data.views.sets import Views, ViewSet
from stiv_deploy.stiv_ref.data.world.clips import World, WorldClip
from stiv_deploy.stiv_ref.data.world.conflicts import Conflict, conflicts, shares
from stiv_deploy.stiv_ref.data.world.faults import FAULTS, OF_MOTION, catches
from stiv_deploy.stiv_ref.data.world.scores import Scores, Wanted, aggregate, asked, markdown, score, wanted_of
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.plots import Row, contact_sheet
from stiv_deploy.stiv_ref.recipe import load_recipe
from stiv_deploy.stiv_ref.sampler import Solver
from stiv_deploy.stiv_ref.world_settings import ViewsData, WorldData

VALIDATION_CLIPS = 100
SHEET_ROWS = 8
"""Clips of each task on the sheet."""
Result = dict[str, Any]
GIVEN: dict[str, Callable[[int], list[int]]] = {
    "t2i": lambda _: [],
    "t2v": lambda _: [],
    "ti2v": lambda _: [0],
    "predict": lambda _: [0, 1, 2, 3],
    "interpolate": lambda frames: list(range(0, frames, 2)),
    "ends": lambda frames: [0, frames - 1],
}
"""Tasks on the world, and the frames that each is given of so many."""
OTHER = ("conflicts", "views")


def as_video(frames: np.ndarray) -> Video:
    """Video fp32 [..., F, 3, H, W] in [-1, 1] of frames uint8 [..., F, H, W, 3]."""
    return np.moveaxis(frames.astype(np.float32) / 127.5 - 1, -1, -3)


def as_frames(video: Video) -> np.ndarray:
    """Frames fp32 [..., F, H, W, 3] in [0, 1] of a video fp32 [..., F, 3, H, W] in [-1, 1]."""
    return np.moveaxis((np.clip(video, -1, 1) + 1) / 2, -3, -1)


def nearest(truth: Video, given: Sequence[int]) -> Video:
    """Every frame of ``truth`` [B, F, ...] replaced by the nearest given one, the earlier one of two."""
    return truth[:, [min(given, key=lambda number: abs(number - frame)) for frame in range(truth.shape[1])]]


def blended(truth: Video, given: Sequence[int]) -> Video:
    """Frames of ``truth`` [B, F, ...] blended linearly from the given ones; the first and the last are held."""
    frames = np.arange(truth.shape[1])
    weights = np.stack([np.interp(frames, given, np.eye(len(given))[number]) for number in range(len(given))], 1)
    return np.einsum("fg,bg...->bf...", weights.astype(np.float32), truth[:, list(given)])


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for, and what comes of it: prompts, the true video [B, F, 3, H, W], and the given frames."""

    prompts: list[str]
    truth: Video
    given: list[int]


class Experiment:
    """Runs tasks on one source, and keeps a table row and some clips of each."""

    def __init__(self, source: Source, settings: Settings, batch: int, views_scale: float) -> None:
        self.source, self.settings, self.batch = source, settings, batch
        self.of_views = replace(settings, scale=views_scale, unseen="zero", stride=1)
        self.rows: dict[str, Result] = {}
        self.sheet: list[Row] = []

    def generate(self, ask: Asked, settings: Settings) -> Video:
        """All clips, ``batch`` at a time; clip i has seed i."""
        settings, parts = replace(settings, frames=ask.truth.shape[1]), []
        for start in range(0, len(ask.prompts), self.batch):
            chosen = slice(start, start + self.batch)
            given: Given = {number: ask.truth[chosen, number] for number in ask.given}
            prompts = ask.prompts[chosen]
            parts.append(self.source.generate(prompts, range(start, start + len(prompts)), settings, given or None))
        return np.concatenate(parts)

    def keep(self, name: str, row: Result, clips: Sequence[tuple[Video, str, bool]], started: float) -> None:
        """Add a row, and the first ``clips`` (video, caption, whether right) to the sheet."""
        self.rows[name] = row | {"seconds": round(time.perf_counter() - started, 1)}
        self.sheet += [
            Row(video=video, caption=f"{name}: {text}", mark="right" if right else "wrong")
            for video, text, right in clips[:SHEET_ROWS]
        ]
        typer.echo(json.dumps({name: self.rows[name]}), err=True)

    def world(self, task: str, clips: Sequence[WorldClip]) -> None:
        """A task on clips of the world, all of one stride."""
        started, settings = time.perf_counter(), replace(self.settings, stride=clips[0].stride)
        truth = as_video(np.stack([clip.frames for clip in clips]))
        ask = Asked(prompts=[clip.caption.text for clip in clips], truth=truth, given=GIVEN[task](truth.shape[1]))
        video = self.generate(ask, settings)
        scores = [
            score(frames, wanted(clip, len(ask.given))) for frames, clip in zip(as_frames(video), clips, strict=True)
        ]
        row: Result = dict(aggregate(scores))
        if ask.given:
            row |= self.distances(video, ask)
        self.keep(task, row, _captioned(video, ask.prompts, scores), started)

    def distances(self, video: Video, ask: Asked) -> Result:
        """PSNR in dB of all frames that were made, and of what else they could be."""
        made = [frame for frame in range(video.shape[1]) if frame not in ask.given]
        coded = self.source.reconstruct(ask.truth)
        others = {"psnr": video, "psnr_nearest": nearest(ask.truth, ask.given)}
        others |= {"psnr_blended": blended(ask.truth, ask.given)} if len(ask.given) > 1 else {}
        others |= {} if coded is None else {"psnr_vae": coded}
        return {name: psnr(each[None, :, made], ask.truth[None, :, made]) for name, each in others.items()}

    def conflicts(self, found: Sequence[Conflict]) -> None:
        """Which of the first frame and the words is followed, where they contradict each other."""
        started = time.perf_counter()
        truth = as_video(np.stack([each.clip.frames for each in found]))
        ask = Asked(prompts=[each.caption.text for each in found], truth=truth, given=[0])
        video = self.generate(ask, replace(self.settings, stride=found[0].clip.stride))
        scores = [score(frames, asked(each.caption.told)) for frames, each in zip(as_frames(video), found, strict=True)]
        row = {"clips": len(found), **shares(found, scores)}
        self.keep("conflicts", row, _captioned(video, ask.prompts, scores), started)

    def views(self, sets: Sequence[ViewSet]) -> None:
        """Views from all around a solid, of which the first is given, sampled as ``stiv views`` does."""
        started = time.perf_counter()
        truth = as_video(np.stack([each.frames for each in sets]))
        ask = Asked(prompts=[""] * len(sets), truth=truth, given=[0])
        video = self.generate(ask, self.of_views)
        scores = [score_views(frames, each) for frames, each in zip(as_frames(video), sets, strict=True)]
        clips = [
            (one, each.look.solid, all(found.placed)) for one, each, found in zip(video, sets, scores, strict=True)
        ]
        self.keep("views", dict(aggregate_views(scores)) | self.distances(video, ask), clips, started)


def wanted(clip: WorldClip, given: int) -> Wanted:
    """What a caption asks; with one frame ``given`` also the object in it, with more all that the clip shows."""
    if given > 1:
        return wanted_of(clip)
    told = asked(clip.caption.told)
    return replace(told, size=clip.scene.size) if given else told


def _captioned(video: Video, prompts: Sequence[str], scores: Sequence[Scores]) -> list[tuple[Video, str, bool]]:
    return [
        (each, text + ("" if one.right else f" (seen: {_seen(one)})"), one.right)
        for each, text, one in zip(video, prompts, scores, strict=True)
    ]


def _seen(scores: Scores) -> str:
    return "nothing" if scores.seen is None else " ".join(filter(None, vars(scores.seen).values()))


def validate(source: Source, clips: Sequence[WorldClip]) -> Result:
    """Scores of true clips, as they are and where possible through the VAE, and the share of planted faults caught."""
    result: Result = {"true": aggregate([score(clip.frames, wanted_of(clip)) for clip in clips])}
    coded = source.reconstruct(as_video(np.stack([clip.frames for clip in clips])))
    if coded is not None:
        scores = [score(frames, wanted_of(clip)) for frames, clip in zip(as_frames(coded), clips, strict=True)]
        result["through_vae"] = aggregate(scores)
    result["faults_caught"] = {name: caught(name, clips) for name in FAULTS} if clips[0].frames.shape[0] > 3 else {}
    return result


def caught(fault: str, clips: Sequence[WorldClip]) -> float:
    """Percent of ``clips`` whose scores say so when the fault is planted in them."""
    some = [clip for clip in clips if fault not in OF_MOTION or clip.scene.track.motion != "stay"]
    seam = len(clips[0].frames) // 2
    found = [catches(fault, score(FAULTS[fault][1](clip), replace(wanted_of(clip), seams=(seam,)))) for clip in some]
    return round(100 * sum(found) / max(1, len(found)), 1)


def world_of(source: Path, recipe: Path | None) -> tuple[WorldData, ViewsData]:
    """The world and the views that the recipe (by default the one beside ``source``) ends with; else all of both."""
    beside = recipe or source / "recipe.toml"
    last = load_recipe(beside) if recipe or beside.is_file() else None
    there = last.parts_of(last.stages[-1].data).values() if last else ()
    worlds = [each for each in there if isinstance(each, WorldData)]
    views = [each for each in there if isinstance(each, ViewsData)]
    return (worlds or [WorldData(kind="world")])[0], (views or [ViewsData(kind="views")])[0]


def measure(experiment: Experiment, tasks: Sequence[str], world: World, views: Views, samples: int) -> Experiment:
    """All ``tasks``, each on the first ``samples`` held-out clips."""
    clips = [world.clip(index) for index in range(samples)]
    for task in tasks:
        if task == "views":
            experiment.views([views.set(index) for index in range(samples)])
        elif task == "conflicts":
            experiment.conflicts(conflicts(world, samples, ("colour", "shape")))
        else:
            experiment.world(task, clips)
    return experiment


def table(report: Result) -> str:
    """The report as Markdown tables with its command."""
    about = ", ".join(f"{key}: {value}" for key, value in report["source"].items())
    scorers = report["scorers"]
    rows = {"*true clips*": scorers["true"]}
    rows |= {"*true clips through the VAE*": scorers["through_vae"]} if "through_vae" in scorers else {}
    others = "".join(f"\n{markdown({name: report['tasks'][name]})}" for name in OTHER if name in report["tasks"])
    rows |= {name: row for name, row in report["tasks"].items() if name not in OTHER}
    faults = "".join(f"| {name} | {share:g} |\n" for name, share in scorers["faults_caught"].items())
    return (
        f"# Scores in the world, {report['date']}\n\n`{report['command']}`\n\n{about}; {report['samples']} held-out "
        f"clips a task, {report['steps']} {report['solver']} steps, guidance {report['scale']:g}, of views "
        f"{report['views_scale']:g}; {report['cpu']}.\n\n"
        f"{markdown(rows)}{others}\nPercent, but for means, PSNR (dB) and seconds.\n"
        + (f"\n| planted fault | caught % |\n|---|---|\n{faults}" if faults else "")
    )


def chosen_tasks(tasks: str, frames: int) -> list[str]:
    """The tasks asked for by name; :class:`ConfigError` for others, or for video of an image model."""
    names = [name.strip() for name in tasks.split(",")] if tasks else ["t2v", "ti2v", "predict", "interpolate", "ends"]
    names = names if tasks or frames > 1 else ["t2i"]
    if unknown := [name for name in names if name not in (*GIVEN, *OTHER)]:
        raise ConfigError(f"no task named {unknown[0]!r}; there are: {', '.join((*GIVEN, *OTHER))}")
    if frames == 1 and names != ["t2i"]:
        raise ConfigError("this is an image model: its only task is t2i")
    return names


def main(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint, a bundle, or a training run.")],
    out: Annotated[Path, typer.Option(help="JSON file; the table and the contact sheet go beside it.")] = Path(
        "benchmarks/results/world_scores.json"
    ),
    tasks: Annotated[str, typer.Option(help="Of t2i, t2v, ti2v, predict, interpolate, ends, conflicts, views.")] = "",
    recipe: Annotated[Path | None, typer.Option(help="Recipe whose world it is.", show_default="beside SOURCE")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out clips of each task.")] = 200,
    scale: Annotated[float, typer.Option(help="Guidance scale.")] = 3.0,
    views_scale: Annotated[float, typer.Option(help="Guidance scale of views; the default is the paper's.")] = 3.5,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Frame stride of the clips.", show_default="the checkpoint's")
    ] = None,
    view_frames: Annotated[int, typer.Option(min=2, help="Views of a set.")] = 7,
    batch: Annotated[int, typer.Option(min=1, help="Clips generated at once.")] = 20,
    backend: Annotated[str, typer.Option(help="Runtime backend, for a bundle.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    solver: Annotated[Solver, typer.Option()] = Solver.EULER,
    time_shift: Annotated[float | None, typer.Option(help="Of the times.", show_default="the checkpoint's")] = None,
    late_stretch: Annotated[float | None, typer.Option(help="Of late steps.", show_default="the checkpoint's")] = None,
) -> None:
    """Score SOURCE on held-out clips of the world."""
    torch.set_num_threads(threads)
    opened = open_source(source, backend, threads)
    names = chosen_tasks(tasks, opened.frames)
    settings, views = world_of(source, recipe)
    side = opened.side
    world = World(
        settings.model_copy(update={"strides": (stride or opened.stride,)}),
        frames=opened.frames,
        side=side,
        split="test",
    )
    scorers = validate(opened, [world.clip(index) for index in range(VALIDATION_CLIPS)])
    typer.echo(json.dumps(scorers), err=True)
    sampled = Settings(steps=steps, scale=scale, time_shift=time_shift, late_stretch=late_stretch, solver=solver.value)
    experiment = Experiment(opened, sampled, batch, views_scale)
    measure(experiment, names, world, Views(views, frames=view_frames, side=side, split="test"), samples)
    report: Result = {
        "command": f"python {shlex.join(sys.argv)}",
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "versions": {name: version(name) for name in ("stiv-deploy", "torch", "numpy")},
        "source": opened.describe(),
        "world": settings.model_dump(mode="json"),
        "samples": samples,
        "steps": steps,
        "solver": solver.value,
        "scale": scale,
        "views_scale": views_scale,
        "scorers": scorers,
        "tasks": experiment.rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(report), encoding="utf-8")
    heading = (
        f"guidance {scale:g}, {steps} steps ({solver.value}); green: all that was asked; given frames are shown too"
    )
    contact_sheet(experiment.sheet, out.with_suffix(".png"), columns=2, zoom=1, heading=heading)
    typer.echo(table(report))


if __name__ == "__main__":
    command.run(main)
