"""Causal against full temporal attention, text-to-video.

    python benchmarks/studies/causal_time.py [--smallest] [--ground world] [--seeds 0,1,2]

Both arms start from the T2I base of the seed and get the training of the T2V base, on the same draws; the arm with full
attention *is* that base.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import above  # noqa: F401  # isort: split
import command
import torch
import typer
from base import Recipe, base, base_name, base_path, kept_or_made, recipe_on, train_with_notes
from columns import cells, compared, heads
from evaluation import LOSS_TIMES, Trial, generate, guided, held_out_loss, sampled, trial_on
from ground import FRAMES, Ground, Result
from grounds import DIGITS, Stand, folder_of
from harness import MINI_SAYS, Frozen, carry_over, frozen_parts, mini
from records import WORK, part, seeds_of, shown
from report import Comparison, Out, Report, Seeds, Smallest, Work, band, default_out, save, table
from variants import CausalStiv

from stiv_deploy.stiv_ref.model import Stiv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS: dict[str, type[Stiv]] = {"full": Stiv, "causal": CausalStiv}
SCALES = (1.0, 2.0, 4.0)


def arm_model(name: str, seed: int, frozen: Frozen, recipe: Recipe, work: Path) -> Stiv:
    """The trained model of an arm."""

    def make() -> tuple[dict[str, torch.Tensor], Result]:
        model = mini(frozen.ground, seed=seed, build=CausalStiv)
        carry_over(base("t2i", seed, frozen, recipe, work), model)
        return train_with_notes(model, recipe.t2v, frozen, seed)

    if name == "full":
        tensors = base("t2v", seed, frozen, recipe, work)
    else:
        tensors = kept_or_made(work / "causal" / base_path("t2v", seed, frozen, recipe, work).name, make)
    model = mini(frozen.ground, seed=seed, build=ARMS[name])
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def arm_result(name: str, seed: int, frozen: Frozen, recipe: Recipe, work: Path, trial: Trial) -> Result:
    """Held-out loss and scores at every scale of one arm and seed."""

    def make() -> Result:
        model = arm_model(name, seed, frozen, recipe, work)
        clips = frozen.ground.clips(trial.clips, seed, frozen.ground.shape)
        result: Result = {"loss": held_out_loss(model, frozen, recipe.t2v.phases[0], clips=trial.loss_clips)}
        for scale in SCALES:
            video, _ = generate(model, frozen, clips, guided(frozen, scale, trial.steps), trial, seed, image=False)
            result[f"{scale:g}"] = clips.scores(video, image=False)
        return result

    return part(work / "causal", f"{name}-{recipe.name(frozen)}-{seed}", (trial, recipe), make)


def lines(ground: Ground, rows: dict[str, list[Result]]) -> list[list[str]]:
    """Table rows of every scale and arm."""
    return [
        [f"{name}, {way(scale)}", *cells(ground, [row[f"{scale:g}"] for row in got])]
        for scale in SCALES
        for name, got in rows.items()
    ]


def way(scale: float) -> str:
    """The name of a guidance scale."""
    return "no guidance" if scale == 1 else f"JIT {scale:g}"


def comparisons(ground: Ground, rows: dict[str, list[Result]]) -> list[Comparison]:
    """Full minus causal."""
    what = "full minus causal"

    def lost(name: str, value: Callable[[Result], float]) -> Comparison:
        first, second = ([value(row["loss"]) for row in rows[arm]] for arm in ARMS)
        return Comparison(what=f"{what}: {name}", first=first, second=second, digits=4)

    found = [lost("held-out loss", lambda loss: loss["mean"])]
    for frame in (0, FRAMES - 1):
        found.append(lost(f"held-out loss of frame {frame}", lambda loss, frame=frame: loss["by_frame"][frame]))
    for scale in SCALES:
        first, second = ([row[f"{scale:g}"] for row in rows[arm]] for arm in ARMS)
        found += compared(f"{what}, {way(scale)}", ground, first, second)
    return found


def draw(figure: "Figure", ground: Ground, rows: dict[str, list[Result]]) -> None:
    """Held-out loss by frame and by time (relative to full attention), and accuracy over the scale."""
    first, second, third = figure.subplots(1, 3)
    for name, got in rows.items():
        label = f"{name} attention"
        band(first, range(FRAMES), [row["loss"]["by_frame"] for row in got], label=label)
        ratios = [
            [100 * (a / b - 1) for a, b in zip(row["loss"]["by_time"], full["loss"]["by_time"], strict=True)]
            for row, full in zip(got, rows["full"], strict=True)
        ]
        band(second, LOSS_TIMES, ratios, label=label)
        band(third, SCALES, [[row[f"{scale:g}"][ground.whole] for scale in SCALES] for row in got], label=label)
    first.set(title="held-out loss by frame", xlabel="frame")
    second.set(title="held-out loss above full attention [%]", xlabel="time (0 noise, 1 data)")
    third.set(title=f"{ground.columns[ground.whole]} right [%]", xlabel="guidance scale")
    for axes in (first, second, third):
        axes.grid(linewidth=0.3)


def main(
    smallest: Smallest = False, ground: Stand = DIGITS, seeds: Seeds = "0,1,2", out: Out = None, work: Work = WORK
) -> None:
    """Compare causal with full temporal attention."""
    torch.set_num_threads(1)
    numbers, frozen = seeds_of("0" if smallest else seeds), frozen_parts(ground)
    stand, work = frozen.ground, folder_of(frozen.ground, work)
    trial, recipe = trial_on(stand, smallest=smallest), recipe_on(stand, smallest=smallest)
    rows: dict[str, list[Result]] = {name: [] for name in ARMS}
    for seed in numbers:
        for name in ARMS:
            rows[name].append(arm_result(name, seed, frozen, recipe, work, trial))
            typer.echo(f"seed {seed} {name}: {rows[name][-1]}", err=True)
    bases = [base_name("t2i", seed, frozen, recipe, work) for seed in numbers]
    losses = [
        [
            name,
            shown([row["loss"]["mean"] for row in got], 4),
            *(shown([row["loss"]["by_frame"][f] for row in got], 4) for f in (0, FRAMES - 1)),
        ]
        for name, got in rows.items()
    ]
    report = Report(
        title=f"Causal against full temporal attention{stand.place}",
        question="What does it cost if a frame cannot see later frames?",
        setup=(
            f"{MINI_SAYS}, T2V for {recipe.t2v.steps} steps at batch {recipe.t2v.phases[0].batch} from the T2I base of "
            f"the seed ({'; '.join(bases)}). Test clips: {trial.clips} a seed, {sampled(frozen, trial)}; held-out "
            f"loss on {trial.loss_clips} test clips at 8 times, the same noise for both."
        ),
        paper="VBench total: base T2V-XL 78.25, with causal temporal attention 74.30.",
        tables=[
            *table(["arm, guidance", *heads(stand)], lines(stand, rows)),
            "",
            *table(["arm", "held-out loss", "of frame 0", f"of frame {FRAMES - 1}"], losses),
        ],
        comparisons=comparisons(stand, rows),
        data={"bases": bases, "rows": rows},
        seeds=numbers,
    )
    target = out or default_out("causal-time", stand)
    typer.echo(save(report, target, lambda figure: draw(figure, stand, rows), (12, 3.6)))


if __name__ == "__main__":
    command.run(main)
