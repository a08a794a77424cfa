"""Frame replacement against cross-attention for the image, and both together, frame by frame.

    python benchmarks/studies/image_conditioning.py [--smallest] [--ground world] [--seeds 0,1,2]

Every arm starts from the same T2V base of its seed and trains TI2V for as many steps on the same draws. By
cross-attention the image comes as tokens of the first frame's clean latents beside the text's; frame 0 is then
generated like the others, and its loss counts. In the world clips are also asked for by captions that contradict the
image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import above  # noqa: F401  # isort: split
import command
import contradictions
import numpy as np
import torch
import typer
from base import Recipe, base_name, recipe_on
from columns import cells, compared, heads
from evaluation import Trial, generate, guided, sampled, trial_on, validation
from ground import FRAMES, Ground, Result
from grounds import DIGITS, Stand, folder_of
from harness import MINI_SAYS, TOKEN, Frozen, frozen_parts
from records import WORK, part, seeds_of, shown
from report import Comparison, Out, Report, Seeds, Smallest, Work, band, default_out, save, table
from ti2v import ARMS, STEPS, arm_path, ti2v_model

from stiv_deploy.stiv_ref.plots import Row, contact_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = dict[str, dict[str, list[Result]]]
ORDER = (
    "frame replacement",
    "cross-attention",
    "cross-attention, large projection",
    "both",
)
REPLACED = ORDER[0]
SCALE = 2.0
SHEET_CLIPS = 4


def arm_scores(
    name: str,
    seed: int,
    frozen: Frozen,
    recipe: Recipe,
    work: Path,
    trial: Trial,
    scale: float,
    *,
    steps: int,
    batch: int,
    text: bool = True,
) -> Result:
    """Scores of one arm and seed at one guidance scale; trains it first if it is not there.

    With ``text``, also what is followed where that contradicts the image.
    """
    ground, adapt = frozen.ground, ARMS[name].adapt
    path = arm_path(name, seed, ARMS[name].training(ground, steps, batch), frozen, recipe, work)

    def make() -> Result:
        model = ti2v_model(name, seed, frozen, recipe, work, steps=steps, batch=batch)
        clips, settings = ground.clips(trial.clips, seed, ground.shape), guided(frozen, scale, trial.steps)
        video, _ = generate(model, frozen, clips, settings, trial, seed, image=True, adapt=adapt, text=text)
        result = clips.scores(video, image=True)
        if not text:
            return result
        return result | contradictions.followed(model, frozen, settings, trial, seed, ground.shape, adapt=adapt)

    kind = "" if text else "-no-text"
    return part(work / "ti2v", f"{path.stem}-scale{scale:g}{kind}", (trial, path.name), make)


def later(row: Result, key: str = "psnr") -> float:
    """Mean PSNR of the frames after the first."""
    return float(np.mean(row[key][1:]))


def lines(ground: Ground, rows: Rows) -> list[list[str]]:
    """Table rows of every guidance and arm."""
    return [
        [
            f"{name}, {scale}",
            *(shown([row["psnr"][frame] for row in got], 2) for frame in (0, 1, -1)),
            *cells(ground, got),
        ]
        for scale, by_arm in rows.items()
        for name, got in by_arm.items()
    ]


def comparisons(ground: Ground, rows: Rows) -> list[Comparison]:
    """Replacement minus every other arm."""
    found = []
    for scale, by_arm in rows.items():
        own = by_arm[REPLACED]
        for name, got in by_arm.items():
            if name == REPLACED:
                continue
            what = f"replacement minus {name}, {scale}"
            for which, value in (("first frame PSNR", lambda row: row["psnr"][0]), ("later frames PSNR", later)):
                first, second = ([value(row) for row in each] for each in (own, got))
                found.append(Comparison(what=f"{what}: {which}", first=first, second=second, unit="dB", digits=2))
            found += compared(what, ground, own, got, ground.speed)
            found += contradictions.comparisons(what, own, got)
    return found


def draw(figure: "Figure", ground: Ground, rows: dict[str, list[Result]], real: list[Result]) -> None:
    """PSNR by frame against the true continuation and against the given frame, and speed."""
    first, second, third = figure.subplots(1, 3)
    x = range(FRAMES)
    for axes, key, title in (
        (first, "psnr", "PSNR against the truth [dB]"),
        (second, "psnr_to_first", "PSNR against the given frame [dB]"),
    ):
        for name, got in rows.items():
            band(axes, x, [row[key] for row in got], label=name)
        axes.plot(
            x,
            np.mean([row[key] for row in real], axis=0),
            color="#888888",
            linestyle="--",
            label="real, through the VAE",
        )
        axes.set(title=title, xlabel="frame")
        axes.grid(linewidth=0.3)
    speeds = {name: [row[ground.speed] for row in got] for name, got in rows.items()}
    bars(third, speeds, f"{ground.columns[ground.speed]} [% of real]")


def bars(axes: Any, values: dict[str, Sequence[float]], title: str) -> None:
    """One bar of the mean for every name, a dot for every seed."""
    for place, by_seed in enumerate(values.values()):
        axes.bar(place, np.mean(by_seed), color=f"C{place}", alpha=0.5)
        axes.plot([place] * len(by_seed), by_seed, "k.", markersize=4)
    axes.set_xticks(
        range(len(values)), [name.replace(", ", ",\n").replace(" ", "\n", 1) for name in values], fontsize=7
    )
    axes.set_title(title)


def sheet_rows(
    arms: dict[str, str],
    frozen: Frozen,
    recipe: Recipe,
    work: Path,
    trial: Trial,
    *,
    steps: int,
    batch: int,
    seed: int,
    scale: float,
) -> list[Row]:
    """The same test clips, real and by every arm (caption -> arm); green where all is as asked."""
    clips = frozen.ground.clips(min(trial.clips, SHEET_CLIPS), seed, frozen.ground.shape)
    videos = {"real": clips.video.numpy()}
    for name, arm in arms.items():
        model = ti2v_model(arm, seed, frozen, recipe, work, steps=steps, batch=batch)
        videos[name], _ = generate(
            model, frozen, clips, guided(frozen, scale, trial.steps), trial, seed, image=True, adapt=ARMS[arm].adapt
        )
    right = {name: clips.right(video) for name, video in videos.items()}
    return [
        Row(video=video[index], caption=f"{caption}: {name}", mark="right" if right[name][index] else "wrong")
        for index, caption in enumerate(clips.captions)
        for name, video in videos.items()
    ]


def main(
    smallest: Smallest = False, ground: Stand = DIGITS, seeds: Seeds = "0,1,2", out: Out = None, work: Work = WORK
) -> None:
    """Compare the ways of showing the image."""
    torch.set_num_threads(1)
    numbers, frozen = seeds_of("0" if smallest else seeds), frozen_parts(ground)
    stand, work = frozen.ground, folder_of(frozen.ground, work)
    trial, recipe = trial_on(stand, smallest=smallest), recipe_on(stand, smallest=smallest)
    steps, batch = (2, 2) if smallest else (STEPS, 16)
    target = out or default_out("image-conditioning", stand)
    guidances = {"no guidance": 1.0, f"JIT {SCALE:g}": SCALE}
    rows: Rows = {name: {arm: [] for arm in ORDER} for name in guidances}
    for seed in numbers:
        for name, scale in guidances.items():
            for arm in ORDER:
                found = arm_scores(arm, seed, frozen, recipe, work, trial, scale, steps=steps, batch=batch)
                rows[name][arm].append(found)
                typer.echo(f"seed {seed} {arm} {name}: {found}", err=True)
    real = [validation(frozen, seed, trial, stand.shape) for seed in numbers]
    head = ["arm", "frame 0 PSNR dB", "frame 1 PSNR dB", "last frame PSNR dB", *heads(stand)]
    bases = [base_name("t2v", seed, frozen, recipe, work) for seed in numbers]
    report = Report(
        title=f"Frame replacement against cross-attention for the image{stand.place}",
        question="Which way of showing the image keeps the first frame, and what does it do to the frames after it?",
        setup=(
            f"{MINI_SAYS}, TI2V for {steps} steps at batch {batch} from the T2V base of the seed ({'; '.join(bases)}), "
            f"image dropout 0.1. Test clips: {trial.clips} a seed, {sampled(frozen, trial)}. PSNR against the true "
            f"continuation.{stand.continuation} The image of cross-attention is the {(stand.shape.size // TOKEN) ** 2} "
            "patches of the clean first latent through a linear, or an MLP 4x as wide (*large projection*); the "
            "paper's large one is a ResNet."
        ),
        paper=(
            "VBench I2V average / total / dynamic degree: cross-attention 68.2 / 73.0 / 42.4; with large projection "
            "72.3 / 75.3 / 22.2; frame replacement 75.8 / 77.3 / 36.6; both 74.4 / 77.1 / 35.4."
        ),
        tables=[
            *table(
                head, [*lines(stand, rows), ["*real clips through the VAE*", *lines(stand, {"": {"": real}})[0][1:]]]
            ),
            *contradictions.tables(
                "arm", {f"{arm}, {way}": got for way, by in rows.items() for arm, got in by.items()}
            ),
        ],
        comparisons=comparisons(stand, rows),
        data={"bases": bases, "rows": rows, "real": real},
        seeds=numbers,
    )
    shown_rows = rows[f"JIT {SCALE:g}"]
    sheet = target.with_name(f"{target.stem}-clips.png")
    text = save(report, target, lambda figure: draw(figure, stand, shown_rows, real), (12, 3.6), sheet.name)
    contact_sheet(
        sheet_rows(
            {name: name for name in ORDER},
            frozen,
            recipe,
            work,
            trial,
            steps=steps,
            batch=batch,
            seed=numbers[0],
            scale=SCALE,
        ),
        sheet,
        columns=len(ORDER) + 1,
        zoom=1,
        heading=f"seed {numbers[0]}, JIT {SCALE:g}; green: all as asked",
    )
    typer.echo(text)


if __name__ == "__main__":
    command.run(main)
