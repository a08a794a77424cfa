"""Progressive initialization against scratch at equal compute: text-to-video at 16 pixels more than the bases'.

    python benchmarks/studies/progressive.py [--smallest] [--ground world] [--seeds 0,1,2]

*Progressive*, with digits: T2I at 32 pixels -> T2I at 48; T2V at 32 from the same T2I; then T2V at 48 with the spatial
weights of T2I-48 and the temporal weights of T2V-32. *Text from T2V*: the same, but what reads the text
(cross-attention, text and pooled projections) comes from T2V-32 too: T2I has never read a word of motion. *Whole T2V*:
T2V at 48 from all weights of T2V-32. *Scratch*: T2V at 48 from random weights. In the world it is 48 and 64 pixels.

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
from base import Recipe, base, base_name, base_path, kept_or_made, notes_of, recipe_on, train_with_notes
from columns import cells, compared, heads
from evaluation import Trial, generate, guided, held_out_loss, sampled, trial_on, validation
from ground import FRAMES, Ground, Result, Shape
from grounds import DIGITS, Stand, folder_of
from harness import MINI_SAYS, TOKEN, Frozen, Training, carry_over, frozen_parts, mini, t2i, video
from records import WORK, part, seeds_of, shown
from report import Comparison, Out, Report, Seeds, Smallest, Work, band, default_out, save, table

from stiv_deploy.stiv_ref.initialization import is_temporal, reads_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stiv_deploy.stiv_ref.model import Stiv

LARGER = 16
"""Pixels that clips have more than those of the bases."""
ORDER = ("progressive", "progressive, text from T2V", "whole T2V", "scratch")
FROM_LOW: dict[str, Callable[[str], bool]] = {
    "progressive": is_temporal,
    "progressive, text from T2V": lambda name: is_temporal(name) or reads_text(name),
}
"""Which weights the progressive arms take from the low-resolution T2V; the others come from the T2I."""
SCALES = (1.0, 2.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long the stages of larger pictures are: T2I, and the last stage of the progressive arm, in steps."""

    recipe: Recipe
    image_steps: int = 150
    image_batch: int = 32
    last_steps: int = 250
    batch: int = 8
    looks: int = 6
    loss_clips: int = 16

    @property
    def small(self) -> int:
        """Pixels of the bases."""
        return self.recipe.t2v.phases[0].size

    @property
    def size(self) -> int:
        """Pixels of the larger pictures."""
        return self.small + LARGER

    @property
    def image(self) -> Training:
        """T2I of the larger size."""
        return Training(phases=(t2i(self.image_steps, batch=self.image_batch, size=self.size),), stage=4)

    def earlier(self, name: str) -> float:
        """Compute before the last stage of an arm."""
        low = self.recipe.t2i.cost + self.recipe.t2v.cost
        return {"whole T2V": low, "scratch": 0.0}.get(name, low + self.image.cost)

    def last(self, name: str) -> Training:
        """The last stage of an arm: T2V of the larger size, with times shifted by 20, and in its second half by 3."""
        step = video("t2v", 1, size=self.size, batch=self.batch).step_cost
        total = self.earlier("progressive") + self.last_steps * step
        steps = round((total - self.earlier(name)) / step)
        first = steps // 2
        halves = ((first, 20.0), (steps - first, 3.0))
        options = {"size": self.size, "batch": self.batch}
        phases = tuple(video("t2v", count, time_shift=shift, **options) for count, shift in halves)
        return Training(phases=phases, stage=5)


def plan_on(ground: Ground, *, smallest: bool = False) -> Plan:
    """The plan on ``ground``; or a few steps."""
    recipe = recipe_on(ground, smallest=smallest)
    if smallest:
        return Plan(recipe=recipe, image_steps=1, image_batch=2, last_steps=2, batch=1, looks=1, loss_clips=1)
    return Plan(recipe=recipe)


def image_model(seed: int, frozen: Frozen, plan: Plan, work: Path) -> dict[str, torch.Tensor]:
    """Weights of T2I of the larger size, from the base's."""

    def make() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        model = mini(frozen.ground, temporal=False, seed=seed)
        carry_over(base("t2i", seed, frozen, plan.recipe, work), model)
        return train_with_notes(model, plan.image, frozen, seed)

    name = f"t2i-{plan.size}-{digest(plan.image, plan.recipe)}-{seed}.safetensors"
    return kept_or_made(work / "progressive" / name, make)


def digest(*what: object) -> str:
    """Eight hex digits that tell settings apart."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:8]


def start(name: str, seed: int, frozen: Frozen, plan: Plan, work: Path) -> "Stiv":
    """The model of an arm before its last stage."""
    model = mini(frozen.ground, seed=seed)
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
        model = mini(frozen.ground, seed=seed)
        model.load_state_dict(kept_or_made(path, fresh))
        model.eval().requires_grad_(False)
        notes, clips = notes_of(path), frozen.ground.clips(trial.clips, seed, Shape(FRAMES, plan.size))
        result: Result = {"curve": notes["curve"], "seconds": notes["seconds"], "steps": training.steps}
        for scale in SCALES:
            made, _ = generate(model, frozen, clips, guided(frozen, scale, trial.steps), trial, seed, image=False)
            result[f"{scale:g}"] = clips.scores(made, image=False)
        return result

    return part(work / "progressive", path.stem, (trial, plan), make)


def lines(rows: dict[str, list[Result]]) -> list[list[str]]:
    """Table rows of every arm: its last stage."""
    return [
        [
            name,
            str(got[0]["steps"]),
            shown([row["curve"][0][1] for row in got], 3),
            shown([row["curve"][-1][1] for row in got], 4),
            shown([row["seconds"] for row in got], 0),
        ]
        for name, got in rows.items()
    ]


def score_lines(ground: Ground, rows: dict[str, list[Result]]) -> list[list[str]]:
    """Table rows of every guidance and arm."""
    return [
        [f"{name}, JIT {scale:g}", *cells(ground, [row[f"{scale:g}"] for row in got])]
        for scale in SCALES[1:]
        for name, got in rows.items()
    ]


def comparisons(ground: Ground, rows: dict[str, list[Result]]) -> list[Comparison]:
    """Each initialization minus scratch, and the two against each other."""
    found = []
    pairs = [(name, "scratch") for name in ORDER[:-1]] + [(name, "whole T2V") for name in FROM_LOW]
    for pair in pairs:
        what = " minus ".join(pair)
        first, second = ([row["curve"][-1][1] for row in rows[name]] for name in pair)
        found.append(Comparison(what=f"{what}: held-out loss at the end", first=first, second=second, digits=4))
        for scale in SCALES[1:]:
            own, other = ([row[f"{scale:g}"] for row in rows[name]] for name in pair)
            found += compared(f"{what}, JIT {scale:g}", ground, own, other)
    return found


def panels(ground: Ground) -> list[str]:
    """Which of its scores are drawn: each that is right or wrong by itself."""
    return [key for key in ground.columns if key not in (ground.whole, ground.speed)]


def draw(figure: "Figure", ground: Ground, plan: Plan, rows: dict[str, list[Result]]) -> None:
    """Held-out loss over compute, and accuracy over the guidance scale."""
    keys = panels(ground)
    first, *others = figure.subplots(1, 1 + len(keys))
    for name, got in rows.items():
        band(
            first,
            [place / 1e6 for place, _ in got[0]["curve"]],
            [[loss for _, loss in row["curve"]] for row in got],
            label=name,
        )
        for axes, key in zip(others, keys, strict=True):
            band(axes, SCALES, [[row[f"{scale:g}"][key] for scale in SCALES] for row in got], label=name)
    label = "compute [million video-token updates]"
    first.set(title=f"held-out T2V loss at {plan.size} pixels", xlabel=label, yscale="log")
    for axes, key in zip(others, keys, strict=True):
        axes.set(title=f"{ground.columns[key]} right [%]", xlabel="guidance scale")
    for axes in (first, *others):
        axes.grid(linewidth=0.3, which="both")


def spent(plan: Plan, name: str) -> dict[str, float]:
    """Where an arm's compute goes, in million video-token updates."""
    low, scratch = plan.recipe, name == "scratch"
    return {
        f"T2I {plan.small}": 0.0 if scratch else low.t2i.cost / 1e6,
        f"T2I {plan.size}": plan.image.cost / 1e6 if name in FROM_LOW else 0.0,
        f"T2V {plan.small}": 0.0 if scratch else low.t2v.cost / 1e6,
        f"T2V {plan.size}": plan.last(name).cost / 1e6,
    }


def compute_table(plan: Plan) -> list[str]:
    """A table of where each arm's compute goes."""
    parts = {name: spent(plan, name) for name in ORDER}
    rows = [[name, *(f"{cost:.2f}" for cost in (*each.values(), sum(each.values())))] for name, each in parts.items()]
    return table(["compute [million video-token updates]", *parts["scratch"], "in all"], rows)


def main(
    smallest: Smallest = False, ground: Stand = DIGITS, seeds: Seeds = "0,1,2", out: Out = None, work: Work = WORK
) -> None:
    """Compare progressive initialization with scratch."""
    torch.set_num_threads(1)
    numbers, frozen = seeds_of("0" if smallest else seeds), frozen_parts(ground)
    stand, work = frozen.ground, folder_of(frozen.ground, work)
    trial, plan = trial_on(stand, smallest=smallest), plan_on(stand, smallest=smallest)
    rows: dict[str, list[Result]] = {name: [] for name in ORDER}
    for seed in numbers:
        for name in ORDER:
            rows[name].append(arm_result(name, seed, frozen, plan, work, trial))
            typer.echo(f"seed {seed} {name}: {rows[name][-1]}", err=True)
    real = [validation(frozen, seed, trial, Shape(FRAMES, plan.size)) for seed in numbers]
    made = [(task, seed) for seed in numbers for task in ("t2i", "t2v")]
    bases = [base_name(*each, frozen, plan.recipe, work) for each in made]
    base_seconds = [notes_of(base_path(*each, frozen, plan.recipe, work))["seconds"] for each in made]
    head = ["arm", f"steps at {plan.size}", "loss before the last stage", "held-out loss", "seconds of the last stage"]
    report = Report(
        title=f"Progressive initialization against scratch at equal compute{stand.place}",
        question="Is a high-resolution T2V better when it starts from a T2I of its size and a T2V of a smaller one?",
        setup=(
            f"{MINI_SAYS}, {plan.size} pixels ({(plan.size // TOKEN) ** 2} tokens a frame; base {plan.small} pixels, "
            f"{(plan.small // TOKEN) ** 2} tokens), {FRAMES} frames, bases {'; '.join(bases)}. Test clips: "
            f"{trial.clips} a seed, {sampled(frozen, trial)}; held-out loss on {plan.loss_clips} test clips at 8 "
            "times. Compute is counted in video-token updates; a token of an image model counts 0.8. The base stages "
            "are charged in full, although other models use them too."
        ),
        paper=(
            "VBench total of T2V at 512 pixels at equal compute (about 6e21 FLOP): from scratch 77.78, from T2I-512 "
            "78.13, from T2V-256 78.49, from both 78.83. TI2V: from T2V 77.9, from T2I 77.2."
        ),
        tables=[
            *compute_table(plan),
            "",
            *table(head, lines(rows)),
            "",
            *table(["arm, guidance", *heads(stand)], score_lines(stand, rows)),
        ],
        comparisons=comparisons(stand, rows),
        data={"bases": bases, "base_seconds": base_seconds, "rows": rows, "real": real},
        seeds=numbers,
        notes=[f"Scorers on real clips of that size through the VAE: {told_of(stand, real)}."],
    )
    target = out or default_out("progressive", stand)
    typer.echo(save(report, target, lambda figure: draw(figure, stand, plan, rows), (4 * len(panels(stand)) + 4, 3.6)))


def told_of(ground: Ground, rows: list[Result]) -> str:
    """All scores in a sentence."""
    return ", ".join(f"{words} {shown([row[key] for row in rows])} %" for key, words in ground.columns.items())


if __name__ == "__main__":
    command.run(main)
