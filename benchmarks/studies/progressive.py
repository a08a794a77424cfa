"""Progressive initialization against scratch at equal compute: text-to-video at 48 pixels.

    python benchmarks/studies/progressive.py [--smallest] [--seeds 0,1,2]

*Progressive*: T2I at 32 pixels -> T2I at 48; T2V at 32 from the same T2I; then T2V at 48 with the spatial weights of
T2I-48 and the temporal weights of T2V-32. *Text from T2V*: the same, but what reads the text (cross-attention, text and
pooled projections) comes from T2V-32 too: T2I has never read a word of motion. *Whole T2V*: T2V at 48 from all weights
of T2V-32. *Scratch*: T2V at 48 from random weights.

Compute is counted in video-token updates (batch x frames x tokens of a frame, over the steps); a token of an image
model counts 0.8 of one, 16 D^2 multiplications a block against 20 D^2. Every arm's last stage is as long as the compute
that its earlier stages leave, so that all arms spend the same in all.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import above  # noqa: F401  # isort: split
import command
import torch
import typer
from base import FULL, SMALLEST, Recipe, base, base_name, base_path, kept_or_made, notes_of, train_with_notes
from evaluation import Trial, clips_for, generate, held_out_loss, scores, validation
from harness import MINI_SAYS, Frozen, Training, carry_over, frozen_parts, mini, t2i, video
from image_conditioning import settings
from records import WORK, part, seeds_of, shown
from report import Comparison, Out, Report, Seeds, Smallest, Work, band, default_out, save, table

from stiv_deploy.stiv_ref.initialization import is_temporal, reads_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stiv_deploy.stiv_ref.model import Stiv

Result = dict[str, Any]
SIZE = 48
ORDER = ("progressive", "progressive, text from T2V", "whole T2V", "scratch")
FROM_LOW: dict[str, Callable[[str], bool]] = {
    "progressive": is_temporal,
    "progressive, text from T2V": lambda name: is_temporal(name) or reads_text(name),
}
"""Which weights the progressive arms take from the low-resolution T2V; the others come from the T2I."""
SCALES = (1.0, 2.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long the stages at 48 pixels are: T2I, and the last stage of the progressive arm, in steps."""

    recipe: Recipe = FULL
    image_steps: int = 150
    image_batch: int = 32
    last_steps: int = 250
    batch: int = 8
    looks: int = 6
    loss_clips: int = 16

    @property
    def image(self) -> Training:
        """T2I at 48 pixels."""
        return Training(phases=(t2i(self.image_steps, batch=self.image_batch, size=SIZE),), stage=4)

    def earlier(self, name: str) -> float:
        """Compute before the last stage of an arm."""
        low = self.recipe.t2i.cost + self.recipe.t2v.cost
        return {"whole T2V": low, "scratch": 0.0}.get(name, low + self.image.cost)

    def last(self, name: str) -> Training:
        """The last stage of an arm: T2V at 48 pixels, the first half of its times shifted by 20, the other by 3."""
        step = video("t2v", 1, size=SIZE, batch=self.batch).step_cost
        total = self.earlier("progressive") + self.last_steps * step
        steps = round((total - self.earlier(name)) / step)
        first = steps // 2
        halves = ((first, 20.0), (steps - first, 3.0))
        phases = tuple(video("t2v", count, time_shift=shift, size=SIZE, batch=self.batch) for count, shift in halves)
        return Training(phases=phases, stage=5)


TINY_PLAN = Plan(recipe=SMALLEST, image_steps=1, image_batch=2, last_steps=2, batch=1, looks=1, loss_clips=1)


def image_model(seed: int, frozen: Frozen, plan: Plan, work: Path) -> dict[str, torch.Tensor]:
    """Weights of T2I at 48 pixels, from T2I at 32."""

    def make() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        model = mini(temporal=False, seed=seed)
        carry_over(base("t2i", seed, frozen, plan.recipe, work), model)
        return train_with_notes(model, plan.image, frozen, seed)

    return kept_or_made(work / "progressive" / f"t2i-{SIZE}-{digest(plan.image, plan.recipe)}-{seed}.safetensors", make)


def digest(*what: object) -> str:
    """Eight hex digits that tell settings apart."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:8]


def start(name: str, seed: int, frozen: Frozen, plan: Plan, work: Path) -> "Stiv":
    """The model of an arm before its last stage."""
    model = mini(seed=seed)
    if name == "whole T2V":
        carry_over(base("t2v", seed, frozen, plan.recipe, work), model)
    if name in FROM_LOW:
        carry_over(image_model(seed, frozen, plan, work), model)
        carry_over(base("t2v", seed, frozen, plan.recipe, work), model, only=FROM_LOW[name])
    return model


def arm_result(name: str, seed: int, frozen: Frozen, plan: Plan, work: Path, trial: Trial) -> Result:
    """Loss over compute, and scores after it, of one arm and seed."""
    training, curve = plan.last(name), []
    path = work / "progressive" / f"{name.replace(',', '').replace(' ', '-')}-{digest(plan)}-{seed}.safetensors"
    phase = training.phases[0]

    def fresh() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        model = start(name, seed, frozen, plan, work)

        def observe(step: int) -> None:
            loss = held_out_loss(model, frozen, phase, clips=plan.loss_clips)
            curve.append([plan.earlier(name) + step * phase.step_cost, loss["mean"]])

        every = max(1, training.steps // plan.looks)
        tensors, notes = train_with_notes(model, training, frozen, seed, observe=observe, every=every)
        return tensors, notes | {"curve": curve}

    def make() -> Result:
        model = mini(seed=seed)
        model.load_state_dict(kept_or_made(path, fresh))
        model.eval().requires_grad_(False)
        notes, clips = notes_of(path), clips_for(trial.clips, seed, SIZE)
        result: Result = {"curve": notes["curve"], "seconds": notes["seconds"], "steps": training.steps}
        for scale in SCALES:
            made, _ = generate(model, frozen, clips, settings(scale, trial.steps), trial, seed, image=False)
            result[f"{scale:g}"] = scores(made, clips, image=False)
        return result

    return part(work / "progressive", path.stem, (trial, plan), make)


def lines(rows: dict[str, list[Result]]) -> list[list[str]]:
    """Table rows of every arm."""
    found = []
    for name, got in rows.items():
        cells = [
            name,
            str(got[0]["steps"]),
            shown([row["curve"][0][1] for row in got], 3),
            shown([row["curve"][-1][1] for row in got], 4),
        ]
        for scale in SCALES[1:]:
            cells += [shown([row[f"{scale:g}"][key] for row in got]) for key in ("digit", "direction")]
        found.append([*cells, shown([row["seconds"] for row in got], 0)])
    return found


def comparisons(rows: dict[str, list[Result]]) -> list[Comparison]:
    """Each initialization minus scratch, and the two against each other."""
    found = []
    pairs = [(name, "scratch") for name in ORDER[:-1]] + [(name, "whole T2V") for name in FROM_LOW]
    for first, second in pairs:
        values = [[row["curve"][-1][1] for row in rows[name]] for name in (first, second)]
        found.append(
            Comparison(
                what=f"{first} minus {second}: held-out loss at the end", first=values[0], second=values[1], digits=4
            )
        )
        for scale in SCALES[1:]:
            for key in ("digit", "direction", "both"):
                values = [[row[f"{scale:g}"][key] for row in rows[name]] for name in (first, second)]
                found.append(
                    Comparison(
                        what=f"{first} minus {second}: {key} right, JIT {scale:g}",
                        first=values[0],
                        second=values[1],
                        unit="points",
                    )
                )
    return found


def draw(figure: "Figure", rows: dict[str, list[Result]]) -> None:
    """Held-out loss over compute, and accuracy over the guidance scale."""
    first, second, third = figure.subplots(1, 3)
    for name, got in rows.items():
        band(
            first,
            [place / 1e6 for place, _ in got[0]["curve"]],
            [[loss for _, loss in row["curve"]] for row in got],
            label=name,
        )
        for axes, key in ((second, "digit"), (third, "direction")):
            band(axes, SCALES, [[row[f"{scale:g}"][key] for scale in SCALES] for row in got], label=name)
    first.set(title=f"held-out T2V loss at {SIZE} pixels", xlabel="compute [million video-token updates]", yscale="log")
    second.set(title="digit right [%]", xlabel="guidance scale")
    third.set(title="direction right [%]", xlabel="guidance scale")
    for axes in (first, second, third):
        axes.grid(linewidth=0.3, which="both")


def compute_lines(plan: Plan) -> list[list[str]]:
    """Where each arm's compute goes."""
    rows = []
    for name in ORDER:
        low = {"T2I 32": plan.recipe.t2i.cost, "T2V 32": plan.recipe.t2v.cost} if name != "scratch" else {}
        high = {"T2I 48": plan.image.cost} if name in FROM_LOW else {}
        parts = low | high | {"T2V 48": plan.last(name).cost}
        rows.append(
            [
                name,
                *(f"{parts.get(key, 0) / 1e6:.2f}" for key in ("T2I 32", "T2I 48", "T2V 32", "T2V 48")),
                f"{sum(parts.values()) / 1e6:.2f}",
            ]
        )
    return rows


def main(smallest: Smallest = False, seeds: Seeds = "0,1,2", out: Out = None, work: Work = WORK) -> None:
    """Compare progressive initialization with scratch."""
    torch.set_num_threads(1)
    trial, plan = (Trial(clips=2, steps=2), TINY_PLAN) if smallest else (Trial(), Plan())
    numbers, frozen = seeds_of("0" if smallest else seeds), frozen_parts()
    rows: dict[str, list[Result]] = {name: [] for name in ORDER}
    for seed in numbers:
        for name in ORDER:
            rows[name].append(arm_result(name, seed, frozen, plan, work, trial))
            typer.echo(f"seed {seed} {name}: {rows[name][-1]}", err=True)
    real = [validation(frozen, seed, trial, SIZE) for seed in numbers]
    bases = [base_name(task, seed, plan.recipe, work) for seed in numbers for task in ("t2i", "t2v")]
    base_seconds = [
        notes_of(base_path(task, seed, plan.recipe, work))["seconds"] for seed in numbers for task in ("t2i", "t2v")
    ]
    head = [
        "arm",
        "steps at 48",
        "loss before the last stage",
        "held-out loss",
        "digit %, JIT 2",
        "direction %, JIT 2",
        "digit %, JIT 4",
        "direction %, JIT 4",
        "seconds of the last stage",
    ]
    spent = ["compute [million video-token updates]", "T2I 32", "T2I 48", "T2V 32", "T2V 48", "in all"]
    report = Report(
        title="Progressive initialization against scratch at equal compute",
        question="Is a high-resolution T2V better when it starts from a T2I of its size and a T2V of a smaller one?",
        setup=(
            f"{MINI_SAYS}, {SIZE} pixels (36 tokens a frame; base 32 pixels, 16 tokens), 8 frames, bases "
            f"{'; '.join(bases)}. Test clips: {trial.clips} a seed, {trial.steps} Euler steps, shrunk to 32 pixels for "
            f"the scorers; held-out loss on {plan.loss_clips} test clips at 8 times. Compute is counted in video-token "
            "updates; a token of an image model counts 0.8. The base stages are charged in full, although other models "
            "use them too."
        ),
        paper=(
            "VBench total of T2V at 512 pixels at equal compute (about 6e21 FLOP): from scratch 77.78, from T2I-512 "
            "78.13, from T2V-256 78.49, from both 78.83. TI2V: from T2V 77.9, from T2I 77.2."
        ),
        tables=[*table(spent, compute_lines(plan)), "", *table(head, lines(rows))],
        comparisons=comparisons(rows),
        data={"bases": bases, "base_seconds": base_seconds, "rows": rows, "real": real},
        seeds=numbers,
        notes=[
            f"Scorers on real {SIZE}-pixel clips through the VAE: digit {shown([row['digit'] for row in real])} %, "
            f"direction {shown([row['direction'] for row in real])} %."
        ],
    )
    typer.echo(save(report, out or default_out("progressive"), lambda figure: draw(figure, rows), (12, 3.6)))


if __name__ == "__main__":
    command.run(main)
