"""Frame replacement against cross-attention for the image, and both together, frame by frame.

    python benchmarks/studies/image_conditioning.py [--smallest] [--seeds 0,1,2]

Every arm starts from the same T2V base of its seed and trains TI2V for as many steps on the same draws. By
cross-attention the image comes as tokens of the first frame's clean latents beside the text's; frame 0 is then
generated like the others, and its loss counts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import above  # noqa: F401  # isort: split
import command
import numpy as np
import torch
import typer
from base import FULL, SMALLEST, Recipe, base_name
from evaluation import Trial, clips_for, generate, scores, validation
from harness import FRAMES, MINI_SAYS, Frozen, frozen_parts
from records import WORK, part, seeds_of, shown
from report import Comparison, Out, Report, Seeds, Smallest, Work, band, default_out, save, table
from scorers import brightness, judge
from ti2v import ARMS, STEPS, arm_path, ti2v_model

from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.plots import Row, contact_sheet
from stiv_deploy.stiv_ref.sampler import SamplingSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
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


def settings(scale: float, steps: int) -> SamplingSettings:
    """JIT-CFG at ``scale``; no guidance at 1."""
    mode = GuidanceMode.NONE if scale == 1 else GuidanceMode.JIT
    return SamplingSettings(steps=steps, guidance_mode=mode, guidance_scale=scale)


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
    """Scores of one arm and seed at one guidance scale; trains it first if it is not there."""
    path = arm_path(name, seed, ARMS[name].training(steps, batch), recipe, work)

    def make() -> Result:
        model = ti2v_model(name, seed, frozen, recipe, work, steps=steps, batch=batch)
        clips = clips_for(trial.clips, seed)
        video, _ = generate(
            model,
            frozen,
            clips,
            settings(scale, trial.steps),
            trial,
            seed,
            image=True,
            adapt=ARMS[name].adapt,
            text=text,
        )
        return scores(video, clips, image=True)

    kind = "" if text else "-no-text"
    return part(work / "ti2v", f"{path.stem}-scale{scale:g}{kind}", (trial, path.name), make)


def later(row: Result, key: str = "psnr") -> float:
    """Mean PSNR of the frames after the first."""
    return float(np.mean(row[key][1:]))


def lines(rows: Rows) -> list[list[str]]:
    """Table rows of every guidance and arm."""
    found = []
    for scale, by_arm in rows.items():
        for name, got in by_arm.items():
            cells = [f"{name}, {scale}"]
            cells.append(shown([row["psnr"][0] for row in got], 2))
            cells.append(shown([row["psnr"][1] for row in got], 2))
            cells.append(shown([row["psnr"][-1] for row in got], 2))
            cells += [shown([row[key] for row in got]) for key in ("motion", "digit", "direction")]
            found.append(cells)
    return found


def comparisons(rows: Rows) -> list[Comparison]:
    """Replacement minus every other arm."""
    found = []
    for scale, by_arm in rows.items():
        for name, got in by_arm.items():
            if name == REPLACED:
                continue
            for what, value, unit in (
                ("first frame PSNR", lambda row: row["psnr"][0], "dB"),
                ("later frames PSNR", later, "dB"),
                ("motion", lambda row: row["motion"], "points of real speed"),
            ):
                found.append(
                    Comparison(
                        what=f"replacement minus {name}, {scale}: {what}",
                        first=[value(row) for row in by_arm[REPLACED]],
                        second=[value(row) for row in got],
                        unit=unit,
                        digits=2,
                    )
                )
    return found


def draw(figure: "Figure", rows: dict[str, list[Result]], real: list[Result]) -> None:
    """PSNR by frame against the true continuation and against the given frame, and motion."""
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
    bars(third, {name: [row["motion"] for row in got] for name, got in rows.items()}, "motion [% of real]")


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
    """The same test clips, real and by every arm (caption -> arm); green where digit and direction are right."""
    clips = clips_for(min(trial.clips, SHEET_CLIPS), seed)
    videos = {"real": clips.video.numpy()}
    for name, arm in arms.items():
        model = ti2v_model(arm, seed, frozen, recipe, work, steps=steps, batch=batch)
        videos[name], _ = generate(
            model, frozen, clips, settings(scale, trial.steps), trial, seed, image=True, adapt=ARMS[arm].adapt
        )
    rows = []
    for index, caption in enumerate(clips.captions):
        for name, video in videos.items():
            seen = judge(brightness(video[index : index + 1]), [clips.digits[index]], [clips.directions[index]])[0]
            right = seen.digit_right and seen.direction_right
            rows.append(Row(video=video[index], caption=f"{caption}: {name}", mark="right" if right else "wrong"))
    return rows


def main(smallest: Smallest = False, seeds: Seeds = "0,1,2", out: Out = None, work: Work = WORK) -> None:
    """Compare the ways of showing the image."""
    torch.set_num_threads(1)
    trial = Trial(clips=2, steps=2) if smallest else Trial()
    recipe, steps, batch = (SMALLEST, 2, 2) if smallest else (FULL, STEPS, 16)
    numbers, frozen, target = (
        seeds_of("0" if smallest else seeds),
        frozen_parts(),
        out or default_out("image-conditioning"),
    )
    guidances = {"no guidance": 1.0, f"JIT {SCALE:g}": SCALE}
    rows: Rows = {name: {arm: [] for arm in ORDER} for name in guidances}
    for seed in numbers:
        for name, scale in guidances.items():
            for arm in ORDER:
                found = arm_scores(arm, seed, frozen, recipe, work, trial, scale, steps=steps, batch=batch)
                rows[name][arm].append(found)
                typer.echo(f"seed {seed} {arm} {name}: {found}", err=True)
    real = [validation(frozen, seed, trial) for seed in numbers]
    head = ["arm", "frame 0 PSNR dB", "frame 1 PSNR dB", "last frame PSNR dB", "motion %", "digit %", "direction %"]
    bases = [base_name("t2v", seed, recipe, work) for seed in numbers]
    report = Report(
        title="Frame replacement against cross-attention for the image",
        question="Which way of showing the image keeps the first frame, and what does it do to the frames after it?",
        setup=(
            f"{MINI_SAYS}, TI2V for {steps} steps at batch {batch} from the T2V base of the seed ({'; '.join(bases)}), "
            f"image dropout 0.1. Test clips: {trial.clips} a seed, {trial.steps} Euler steps. PSNR against the true "
            "continuation: image and caption fix it. The image of cross-attention is the 16 patches of the clean first "
            "latent through a linear, or an MLP 4x as wide (*large projection*); the paper's large one is a ResNet."
        ),
        paper=(
            "VBench I2V average / total / dynamic degree: cross-attention 68.2 / 73.0 / 42.4; with large projection "
            "72.3 / 75.3 / 22.2; frame replacement 75.8 / 77.3 / 36.6; both 74.4 / 77.1 / 35.4."
        ),
        tables=table(head, [*lines(rows), ["*real clips through the VAE*", *lines({"": {"": real}})[0][1:]]]),
        comparisons=comparisons(rows),
        data={"bases": bases, "rows": rows, "real": real},
        seeds=numbers,
    )
    shown_rows = rows[f"JIT {SCALE:g}"]
    sheet = target.with_name(f"{target.stem}-clips.png")
    text = save(report, target, lambda figure: draw(figure, shown_rows, real), (12, 3.6), sheet.name)
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
        heading=f"seed {numbers[0]}, JIT {SCALE:g}; green: digit and direction as asked",
    )
    typer.echo(text)


if __name__ == "__main__":
    command.run(main)
