"""Skipping the blocks of some evaluations, against fewer steps of as many evaluations. Sampling only.

    python benchmarks/studies/residual_skip.py [CHECKPOINT ...] [--smallest] [--ground world] [--seeds 0,1,2,3,4,5,6,7]

A seed is a clip, its prompt and its noise; those of odd seeds are given their first frame. Errors are relative L2 of
the final latents against the exact flow of the same checkpoint. Fewer steps are sampled in two ways: over a grid of
fewer steps, and over the grid that skips with the skipped times left out. Checkpoints that say what they were trained
on are asked for clips of the world, others for moving digits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import patch

import above  # noqa: F401  # isort: split
import command
import numpy as np
import torch
import typer
from grounds import DIGITS, Stand, ground_of
from records import WORK, part, seeds_of
from report import Comparison, Out, Report, Seeds, Smallest, Work, default_out, save, table
from skips import Evaluated, Skipping, every, fixed_share, norm_ratios, within_budget

from stiv_deploy.runtime.sampling.tuning import relative_errors
from stiv_deploy.stiv_ref import sampler
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, checkpoint_hash, load_checkpoint
from stiv_deploy.stiv_ref.config import model_config
from stiv_deploy.stiv_ref.data.digit_requests import balanced_requests, real_clips
from stiv_deploy.stiv_ref.data.world.clips import World
from stiv_deploy.stiv_ref.flow import schedule
from stiv_deploy.stiv_ref.generation import sampling_inputs, settings_of
from stiv_deploy.stiv_ref.sampler import SamplingInputs, Solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
FIRST_SEED = 700_000
LEFT_OUT, PLAIN, ANY = "left out", "plain", "any"
"""Fewer steps that a skip is compared with: its own grid without the skipped times, plain grids, the best of all."""
LARGE_LATENTS, LARGE_TEXT = (20, 4, 64, 64), 77
"""20 frames of 512 x 512 pixels, of one row, and text tokens: for the share that a skip still costs in large models."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is tried: the steps of the exact flow, plain grids (``steps``, ``shifts``), and ``bases`` that skip."""

    exact: int = 60
    exact_shift: float = 2.0
    steps: tuple[int, ...] = (8, 10, 12, 16)
    shifts: tuple[float, ...] = (2.0, 4.0)
    bases: tuple[int, ...] = (16,)
    budget_bases: tuple[int, ...] = (16,)
    budget: float = 0.1
    euler: tuple[int, ...] = (10, 16)
    """Steps of Euler's plain grids, at the checkpoint's own time shift; the last is the base that skips."""


SMALLEST = Plan(exact=4, steps=(2,), shifts=(1.0,), bases=(5,), budget_bases=(5,), euler=(2, 5))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way of sampling: a grid, and what becomes of some of its steps.

    Without an ``order`` they are left out of the grid; with one their blocks are skipped.
    """

    solver: Solver
    steps: int
    shift: float
    chosen: tuple[int, ...] = ()
    order: int | None = None

    @property
    def name(self) -> str:
        """A name for a file."""
        how = "left out" if self.order is None else f"skip order {self.order}"
        chosen = f" {how} {'-'.join(map(str, self.chosen))}" if self.chosen else ""
        return f"{self.solver} {self.steps} shift {self.shift:g}{chosen}"

    @property
    def skips(self) -> tuple[int, ...]:
        """Steps whose blocks are skipped."""
        return () if self.order is None else self.chosen

    def times(self) -> torch.Tensor:
        """Sampling times fp64, the last one is 1."""
        kept = [step for step in range(self.steps + 1) if self.order is not None or step not in self.chosen]
        return schedule(self.steps, self.shift)[kept]


class Clips:
    """The clips of one checkpoint, and their errors by each run, kept in ``folder``."""

    def __init__(self, path: Path, seeds: Sequence[int], plan: Plan, folder: Path) -> None:
        self.checkpoint, self.seeds, self.plan, self.label = load_checkpoint(path), seeds, plan, path.name
        self.hash = checkpoint_hash(path)[:12]
        self._evaluated: Evaluated = {}
        self.folder = folder / f"{self.hash}-{'-'.join(map(str, seeds))}"

    @cached_property
    def inputs(self) -> SamplingInputs:
        """Noise, text and given frames of all clips: of odd seeds the first is given."""
        prompts, first = asked_of(self.checkpoint, self.seeds)
        inputs = sampling_inputs(self.checkpoint, prompts, [FIRST_SEED + seed for seed in self.seeds], first)
        given = inputs.frame_mask & torch.tensor([seed % 2 == 1 for seed in self.seeds])[:, None]
        return inputs._replace(frame_mask=given)

    def latents(self, run: Run) -> tuple[np.ndarray, Skipping]:
        """Final latents fp32 [clips, T, C, h, w] of a run, and the model that it was sampled with."""
        own = settings_of(self.checkpoint.config.sampling)
        settings = replace(own, solver=run.solver, steps=run.steps, time_shift=run.shift)
        model = Skipping(self.checkpoint.model, run.skips, run.order or 0, self._evaluated)
        with patch.object(sampler, "schedule", lambda *_: run.times()):
            latents = sampler.sample(model, self.inputs, settings)  # type: ignore[arg-type]
        return latents.numpy(), model

    @cached_property
    def exact(self) -> np.ndarray:
        """What stands for the exact flow."""
        run = Run(solver=Solver.AB2, steps=self.plan.exact, shift=self.plan.exact_shift)
        kept = part(self.folder, "exact", run, lambda: {"latents": self.latents(run)[0].tolist()})
        return np.array(kept["latents"], np.float32)

    @cached_property
    def exact_errors(self) -> list[float]:
        """Error of each clip of :attr:`exact`: a third of what half as many steps of a second order differ by."""
        half = Run(solver=Solver.AB2, steps=self.plan.exact // 2, shift=self.plan.exact_shift)
        return [error / 3 for error in self.errors(half)]

    def errors(self, run: Run) -> list[float]:
        """Error of each clip."""
        return self._measured(run)["errors"]

    def ratios(self, run: Run) -> list[float]:
        """Ratios of the norms of the residuals by step, of a run that skips nothing."""
        return self._measured(run)["ratios"]

    def _measured(self, run: Run) -> Result:
        return part(self.folder, run.name, (run, self.plan.exact, self.plan.exact_shift), lambda: self._measure(run))

    def _measure(self, run: Run) -> Result:
        latents, model = self.latents(run)
        errors = relative_errors(latents, self.exact).tolist()
        typer.echo(f"{self.label}, {run.name}: {typical(errors):.4f}", err=True)
        return {"errors": errors, "ratios": [] if run.skips else norm_ratios(model.norms)}

    @cached_property
    def fixed(self) -> float:
        """What a skipped evaluation costs, in evaluations."""
        shape = tuple(self.inputs.noise.shape[1:])
        return fixed_share(self.checkpoint.config.model, shape, self.inputs.text.states.shape[1])

    def evaluations(self, run: Run) -> float:
        """What a run costs."""
        return len(run.times()) - 1 - (1 - self.fixed) * len(run.skips)


def typical(errors: Sequence[float]) -> float:
    """Geometric mean: one clip that becomes another one must not count for all."""
    return float(np.exp(np.mean(np.log(errors))))


def asked_of(checkpoint: Checkpoint, seeds: Sequence[int]) -> tuple[list[str], torch.Tensor]:
    """Prompts, and true first frames fp32 [clips, 3, H, W] in [-1, 1], of held-out clips."""
    own = checkpoint.config.sampling
    if checkpoint.config.trained is None:
        requests = balanced_requests(max(seeds) + 1, moving=True)
        first = real_clips(requests, own.frames)[:, 0]
        return [requests.prompts[seed] for seed in seeds], first[list(seeds)]
    world = World(frames=own.frames, side=own.height, split="test")
    clips = [world.clip(seed) for seed in seeds]
    first = torch.from_numpy(np.stack([clip.frames[0] for clip in clips])).permute(0, 3, 1, 2)
    return [clip.caption.text for clip in clips], first / 127.5 - 1


def plain(clips: Clips) -> list[Run]:
    """Grids whose steps are all sampled, Euler's last."""
    plan, own = clips.plan, clips.checkpoint.config.sampling.time_shift
    grids = [Run(solver=Solver.AB2, steps=steps, shift=shift) for steps in plan.steps for shift in plan.shifts]
    return [*grids, *(Run(solver=Solver.EULER, steps=steps, shift=own) for steps in plan.euler)]


def masks(clips: Clips, base: Run) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Every rule's name, the steps that it chooses of ``base``, and the orders that are tried with it."""
    yield "every 2nd", every(2, base.steps, base.shift), (1, 0)
    if base.solver is Solver.AB2:
        yield "2 of 3", every(3, base.steps, base.shift), (1,)
        if base.steps in clips.plan.budget_bases:
            budget = within_budget(clips.plan.budget, clips.ratios(base), base.steps, base.shift)
            yield f"budget {clips.plan.budget:g}", budget, (1,)


def skipping(clips: Clips) -> Iterator[tuple[str, Run]]:
    """All runs that skip, with their rules."""
    plan = clips.plan
    bases = [Run(solver=Solver.AB2, steps=steps, shift=shift) for steps in plan.bases for shift in plan.shifts]
    for base in (*bases, plain(clips)[-1]):
        for rule, steps, orders in masks(clips, base):
            yield from ((rule, replace(base, chosen=steps, order=order)) for order in orders if steps)


def rows(clips: Clips) -> list[Result]:
    """What every skip costs and gives, and what fewer steps do."""
    skips, fewer = list(skipping(clips)), plain(clips)
    for _, run in skips:
        clips.errors(run), clips.errors(replace(run, order=None))
    left_out = [replace(run, order=None) for _, run in skips]
    return [_row(clips, rule, run, fewer, [*fewer, *left_out]) for rule, run in skips]


def _row(clips: Clips, rule: str, run: Run, fewer: Sequence[Run], all_grids: Sequence[Run]) -> Result:
    others = {
        LEFT_OUT: replace(run, order=None),
        PLAIN: best(clips, run, [each for each in fewer if each.solver is run.solver]),
        ANY: best(clips, run, all_grids),
    }
    return _result(clips, run) | {
        "rule": rule,
        "order": run.order,
        "fewer": {name: _result(clips, other) for name, other in others.items()},
        "ratios": {name: typical(clips.errors(run)) / typical(clips.errors(each)) for name, each in others.items()},
    }


def best(clips: Clips, run: Run, others: Sequence[Run]) -> Run:
    """Of ``others`` the nearest to the exact flow that costs no more than ``run``; if all cost more, the cheapest."""
    allowed = [each for each in others if clips.evaluations(each) <= clips.evaluations(run)]
    cheapest = min(others, key=clips.evaluations)
    return min(allowed or [cheapest], key=lambda each: typical(clips.errors(each)))


def _result(clips: Clips, run: Run) -> Result:
    errors = clips.errors(run)
    return {
        "clips": clips.label,
        "run": run.name,
        "solver": str(run.solver),
        "steps": run.steps,
        "shift": run.shift,
        "evaluations": clips.evaluations(run),
        "errors": errors,
        "error": typical(errors),
    }


def grids(clips: Clips) -> list[Result]:
    """Errors of all that was sampled without skips; ``left_out`` says whether times are missing."""
    runs = dict.fromkeys([*plain(clips), *(replace(run, order=None) for _, run in skipping(clips))])
    return [_result(clips, run) | {"left_out": bool(run.chosen)} for run in runs]


HEAD = ("grid, skipped", "order", "evaluations", "error", "by times left out", "by plain grids", "by the best of all")


def lines(found: Sequence[Result]) -> list[list[str]]:
    """Table rows."""
    return [
        [
            f"{row['clips']}, {row['solver']} {row['steps']}, shift {row['shift']:g}, {row['rule']}",
            f"{row['order']}",
            f"{row['evaluations']:.1f}",
            f"{row['error']:.4f}",
            *(f"{row['ratios'][name]:.2f}" for name in (LEFT_OUT, PLAIN, ANY)),
        ]
        for row in sorted(found, key=lambda row: (row["clips"], row["solver"], row["steps"], row["shift"]))
    ]


def comparisons(found: Sequence[Result]) -> list[Comparison]:
    """Every skip against the same times left out, in logarithms of the error."""
    return [
        Comparison(
            what=f"{row['clips']}, {row['solver']} {row['steps']}, shift {row['shift']:g}, {row['rule']}, order "
            f"{row['order']}: error by that of the times left out",
            first=[100 * math.log(error) for error in row["errors"]],
            second=[100 * math.log(error) for error in row["fewer"][LEFT_OUT]["errors"]],
            unit="% (logarithm)",
        )
        for row in found
    ]


def draw(figure: "Figure", without: Sequence[Result], found: Sequence[Result]) -> None:
    """Error over evaluations by AB2, of fewer steps and of skips, by checkpoint."""
    ab2 = [row for row in (*without, *found) if row["solver"] == Solver.AB2]
    kinds = (
        ("fewer steps", "o", lambda row: row.get("left_out") is False),
        ("times left out", "s", lambda row: row.get("left_out") is True),
        ("skips, order 0", "x", lambda row: row.get("order") == 0),
        ("skips, order 1", "+", lambda row: row.get("order") == 1),
    )
    labels = list(dict.fromkeys(row["clips"] for row in ab2))
    for axes, label in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels, strict=True):
        for name, mark, belongs in kinds:
            own = [row for row in ab2 if row["clips"] == label and belongs(row)]
            axes.semilogy([row["evaluations"] for row in own], [row["error"] for row in own], mark, label=name)
        axes.set(title=f"{label}, AB2", xlabel="evaluations", ylabel="relative L2 error of latents")
        axes.grid(True, which="both", linewidth=0.3)


def shares(tried: Sequence[Clips]) -> str:
    """What a skipped evaluation costs, here and in the large models."""
    here = {each.checkpoint.config.model.blocks: each.fixed for each in tried}
    large = {config.blocks: fixed_share(config, LARGE_LATENTS, LARGE_TEXT) for config in map(model_config, ("XL", "M"))}
    return ", ".join(f"{100 * share:.2g} % with {blocks} blocks" for blocks, share in {**here, **large}.items())


def main(
    checkpoints: Annotated[list[Path] | None, typer.Argument(help="Checkpoints. [default: that of the ground]")] = None,
    smallest: Smallest = False,
    ground: Stand = DIGITS,
    seeds: Seeds = "0,1,2,3,4,5,6,7",
    out: Out = None,
    work: Work = WORK,
) -> None:
    """Skip evaluations' blocks, or take fewer steps?"""
    torch.set_num_threads(1)
    plan, numbers = (SMALLEST, [0]) if smallest else (Plan(), seeds_of(seeds))
    stand = ground_of(ground)
    tried = [Clips(path, numbers, plan, work / "residual-skip") for path in checkpoints or [stand.checkpoint]]
    found = [row for clips in tried for row in rows(clips)]
    without = [row for clips in tried for row in grids(clips)]
    report = Report(
        title="Skipping the blocks of an evaluation",
        question="At equal cost, is it nearer to the exact flow to skip the blocks of some steps, or to take fewer?",
        setup=setup(tried, plan),
        paper="Does not skip. MagCache (arXiv 2506.09045) and others compare at equal steps, not evaluations.",
        tables=table(HEAD, lines(found)),
        comparisons=comparisons(found),
        data={"grids": without, "skips": found, "exact_errors": {each.label: each.exact_errors for each in tried}},
        seeds=numbers,
    )
    typer.echo(
        save(report, out or default_out("residual-skip", stand), lambda figure: draw(figure, without, found), (10, 4.5))
    )


def setup(tried: Sequence[Clips], plan: Plan) -> str:
    """What was compared, how."""
    known = ", ".join(
        f"{each.label} ({each.hash}) {typical(each.exact_errors):.4f}, at most {max(each.exact_errors):.4f}"
        for each in tried
    )
    ours = f"{', '.join(map(str, plan.steps))} AB2 steps at shifts {', '.join(f'{each:g}' for each in plan.shifts)}"
    return (
        f"Sampling only, the guidance that each checkpoint recommends, {len(tried[0].seeds)} clips, every second one "
        f"given its first frame. Relative L2 error of final latents (geometric mean over the clips) against "
        f"{plan.exact} AB2 steps at shift {plan.exact_shift:g}, whose own error is: {known}. Of the steps that may be "
        "skipped, every second one is, or two of three, or those of MagCache's rule; none in the first fifth of the "
        "steps, nor before time 0.12. The residual of a skipped step is the last one (order 0) or on the line through "
        f"the last two (order 1). It costs the share of arithmetic that embed and head have ({shares(tried)}); memory "
        "traffic is not counted, to the skips' advantage. The last columns are the error by that of fewer steps of no "
        f"more evaluations: over the same grid without the skipped times; the best plain grid of the same solver "
        f"({ours}; {', '.join(map(str, plan.euler))} of Euler at the checkpoint's own); and the best of all these by "
        "any solver. Below 1 the skips are nearer."
    )


if __name__ == "__main__":
    command.run(main)
