"""Motion staleness of image-to-video, with and without image dropout in training.

    python benchmarks/studies/motion_staleness.py [--smallest] [--ground world] [--seeds 0,1,2]

Three TI2V models of a seed from the same T2V base, on the same draws: no image dropout, 0.1, 0.5. A *stale* clip moves
with less than half of the real speed. Also measured: what is left of text-to-video, which image dropout trains on.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import above  # noqa: F401  # isort: split
import command
import numpy as np
import torch
import typer
from base import Recipe, base_name, recipe_on
from columns import cells, compared, heads
from evaluation import Trial, generate, guided, held_out_loss, sampled, trial_on, validation
from ground import FRAMES, Ground, Result
from grounds import DIGITS, Stand, folder_of
from harness import MINI_SAYS, Frozen, frozen_parts
from image_conditioning import arm_scores, bars, later, sheet_rows
from records import WORK, part, seeds_of, shown
from report import Comparison, Out, Report, Seeds, Smallest, Work, band, default_out, save, table
from ti2v import ARMS, STEPS, arm_path, ti2v_model

from stiv_deploy.stiv_ref.plots import contact_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = dict[str, dict[str, list[Result]]]
ORDER = {"none": "no image dropout", "0.1": "frame replacement", "0.5": "image dropout 0.5"}
WAYS = {"no guidance": (1.0, True), "JIT 2": (2.0, True), "JIT 4": (4.0, True), "image only, no guidance": (1.0, False)}
"""What is asked of a model: guidance scale, and whether it gets the text."""
PLOTTED = "JIT 4"


def text_to_video(
    name: str, seed: int, frozen: Frozen, recipe: Recipe, work: Path, trial: Trial, *, steps: int, batch: int
) -> Result:
    """What the model of an arm still can without an image: held-out loss and scores at JIT 2."""
    ground = frozen.ground
    training = ARMS[name].training(ground, steps, batch)
    path = arm_path(name, seed, training, frozen, recipe, work)

    def make() -> Result:
        model = ti2v_model(name, seed, frozen, recipe, work, steps=steps, batch=batch)
        clips = ground.clips(trial.clips, seed, ground.shape)
        video, _ = generate(model, frozen, clips, guided(frozen, 2.0, trial.steps), trial, seed, image=False)
        losses = {
            name: held_out_loss(model, frozen, training.phases[0], image=image, clips=trial.loss_clips)["mean"]
            for name, image in (("t2v_loss", False), ("ti2v_loss", True))
        }
        return clips.scores(video, image=False) | losses

    return part(work / "ti2v", f"{path.stem}-t2v", (trial, path.name), make)


def lines(ground: Ground, rows: Rows) -> list[list[str]]:
    """Table rows of image-to-video."""
    return [
        [
            f"{way}, image dropout {name}",
            shown([row["stale"] for row in got]),
            *cells(ground, got),
            shown([later(row) for row in got], 2),
            shown([row["psnr_to_first"][-1] for row in got], 2),
        ]
        for way, by_arm in rows.items()
        for name, got in by_arm.items()
    ]


def text_lines(ground: Ground, kept: dict[str, list[Result]]) -> list[list[str]]:
    """Table rows of text-to-video after the training."""
    return [
        [
            f"image dropout {name}",
            *(shown([row[key] for row in got], 4) for key in ("ti2v_loss", "t2v_loss")),
            *cells(ground, got),
        ]
        for name, got in kept.items()
    ]


def comparisons(ground: Ground, rows: Rows, kept: dict[str, list[Result]]) -> list[Comparison]:
    """No dropout minus each dropout."""
    found = []
    for other in ("0.1", "0.5"):
        what = f"no dropout minus {other}"
        for way, by_arm in rows.items():
            found += compared(f"{what}, {way}", ground, by_arm["none"], by_arm[other], ground.speed, "stale")
        for key, label in (("t2v_loss", "held-out loss without image"), ("ti2v_loss", "held-out loss with image")):
            first, second = ([row[key] for row in kept[name]] for name in ("none", other))
            found.append(Comparison(what=f"{what}: {label}", first=first, second=second, digits=4))
        found += compared(f"{what}, without image, JIT 2", ground, kept["none"], kept[other])
    return found


def draw(figure: "Figure", ground: Ground, rows: Rows, kept: dict[str, list[Result]], real: list[Result]) -> None:
    """Speed by way of asking, likeness to the given frame by frame, and the loss without an image."""
    first, second, third = figure.subplots(1, 3, width_ratios=(1.5, 1, 0.8))
    for index, (name, _) in enumerate(ORDER.items()):
        for place, by_arm in enumerate(rows.values()):
            values = [row[ground.speed] for row in by_arm[name]]
            x = place + 0.27 * (index - 1)
            first.bar(
                x,
                np.mean(values),
                0.25,
                color=f"C{index}",
                alpha=0.5,
                label=f"image dropout {name}" if place == 0 else None,
            )
            first.plot([x] * len(values), values, "k.", markersize=3)
        band(second, range(FRAMES), [row["psnr_to_first"] for row in rows[PLOTTED][name]])
    first.set_xticks(range(len(rows)), [way.replace(", ", ",\n") for way in rows], fontsize=8)
    first.set_title(f"{ground.columns[ground.speed]} [% of real]")
    first.axhline(100, color="#888888", linewidth=1, linestyle="--")
    second.plot(
        range(FRAMES),
        np.mean([row["psnr_to_first"] for row in real], axis=0),
        color="#888888",
        linestyle="--",
        label="real",
    )
    second.set(title=f"PSNR against the given frame [dB], {PLOTTED}", xlabel="frame")
    bars(
        third,
        {f"dropout {name}": [row["t2v_loss"] for row in got] for name, got in kept.items()},
        "held-out loss without image",
    )


def main(
    smallest: Smallest = False, ground: Stand = DIGITS, seeds: Seeds = "0,1,2", out: Out = None, work: Work = WORK
) -> None:
    """Look for stale motion."""
    torch.set_num_threads(1)
    numbers, frozen = seeds_of("0" if smallest else seeds), frozen_parts(ground)
    stand, work = frozen.ground, folder_of(frozen.ground, work)
    trial, recipe = trial_on(stand, smallest=smallest), recipe_on(stand, smallest=smallest)
    steps, batch = (2, 2) if smallest else (STEPS, 16)
    target = out or default_out("motion-staleness", stand)
    rows: Rows = {way: {name: [] for name in ORDER} for way in WAYS}
    kept: dict[str, list[Result]] = {name: [] for name in ORDER}
    for seed in numbers:
        for name, arm in ORDER.items():
            for way, (scale, text) in WAYS.items():
                rows[way][name].append(
                    arm_scores(arm, seed, frozen, recipe, work, trial, scale, steps=steps, batch=batch, text=text)
                )
                typer.echo(f"seed {seed} {name} {way}: {rows[way][name][-1]}", err=True)
            kept[name].append(text_to_video(arm, seed, frozen, recipe, work, trial, steps=steps, batch=batch))
    real = [validation(frozen, seed, trial, stand.shape) for seed in numbers]
    bases = [base_name("t2v", seed, frozen, recipe, work) for seed in numbers]
    head = ["asked", "stale clips %", *heads(stand), "later frames PSNR dB", "last frame against given, PSNR dB"]
    text_head = ["without image, JIT 2", "held-out TI2V loss", "held-out T2V loss", *heads(stand)]
    report = Report(
        title=f"Motion staleness with and without image dropout{stand.place}",
        question="Does a model that always sees its first frame in training repeat it? Does image dropout cure that?",
        setup=(
            f"{MINI_SAYS}, TI2V by frame replacement for {steps} steps at batch {batch} from the T2V base of the seed "
            f"({'; '.join(bases)}). Test clips: {trial.clips} a seed, {sampled(frozen, trial)}. *Image only*: the "
            f"caption is empty, so that any direction would do. {stand.shape.size} pixels, {FRAMES} frames."
        ),
        paper=(
            "Seen at 512 pixels and 8 B parameters, not below: dynamic degree 10.2 without image dropout, 24.0 with it "
            "(8 % of the images, and JIT-CFG)."
        ),
        tables=[
            *table(
                head, [*lines(stand, rows), ["*real clips through the VAE*", *lines(stand, {"": {"": real}})[0][1:]]]
            ),
            "",
            *table(text_head, text_lines(stand, kept)),
        ],
        comparisons=comparisons(stand, rows, kept),
        data={"bases": bases, "rows": rows, "text_to_video": kept, "real": real},
        seeds=numbers,
    )
    pictured = {f"image dropout {name}": arm for name, arm in ORDER.items()}
    sheet = target.with_name(f"{target.stem}-clips.png")
    text = save(report, target, lambda figure: draw(figure, stand, rows, kept, real), (13, 3.6), sheet.name)
    contact_sheet(
        sheet_rows(pictured, frozen, recipe, work, trial, steps=steps, batch=batch, seed=numbers[0], scale=4.0),
        sheet,
        columns=len(ORDER) + 1,
        zoom=1,
        heading=f"seed {numbers[0]}, {PLOTTED}; green: all as asked",
    )
    typer.echo(text)


if __name__ == "__main__":
    command.run(main)
