"""Runs of the reference sampler whose AB2 weights are fitted to a model, and their errors against its exact flow.

Some of their steps can be left out or guessed in part (:mod:`guesses`). What is fitted is fitted to some clips, by
:mod:`stiv_deploy.runtime.sampling.fitting`, and judged by others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import above  # noqa: F401  # isort: split
import numpy as np
import torch
import typer
from guesses import Pair, ReusedDifference, SkippedBlocks
from records import part
from residual_skip import Clips, Plan, typical
from torch import Tensor

from stiv_deploy.runtime.sampling.fitting import ExactPath, WeightFit
from stiv_deploy.runtime.sampling.tuning import relative_errors
from stiv_deploy.stiv_ref import sampler
from stiv_deploy.stiv_ref.conditioning import replace_frames
from stiv_deploy.stiv_ref.flow import schedule
from stiv_deploy.stiv_ref.generation import settings_of
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingInputs, Solver, Velocity, guided_velocity
from stiv_deploy.stiv_ref.text import TextStates

Result = dict[str, Any]
Grid = tuple[int, float, float]
"""Steps, time shift, and how many times as long late steps are."""


class Weights(StrEnum):
    """Whose weights AB2 takes; ``ALONG`` are fitted too, but each step begins on the exact flow."""

    OWN = "own"
    FITTED = "fitted"
    ALONG = "fitted along the exact flow"


class How(StrEnum):
    """What becomes of the steps that are chosen."""

    LEFT_OUT = "left out"
    SKIPPED = "blocks skipped"
    REUSED = "difference reused"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way of sampling: a grid, AB2's weights, the clips they are fitted to (none: all), and the chosen steps.

    Runs that skip are fitted, as the residuals of their steps are.
    """

    grid: Grid
    weights: Weights = Weights.FITTED
    clips: tuple[int, ...] = ()
    chosen: tuple[int, ...] = ()
    how: How = How.LEFT_OUT

    @property
    def name(self) -> str:
        """A name for a file."""
        clips = f" to {'-'.join(map(str, self.clips))}" if self.clips else ""
        chosen = f", {self.how} {'-'.join(map(str, self.chosen))}" if self.chosen else ""
        return f"{named(self.grid)}, {self.weights}{clips}{chosen}"

    def times(self) -> list[float]:
        """Sampling times, the last one is 1."""
        gone = self.chosen if self.how is How.LEFT_OUT else ()
        return [time for step, time in enumerate(schedule(*self.grid).tolist()) if step not in gone]

    @property
    def evaluations(self) -> int:
        """Evaluations of the blocks, guidance branches counted as one; a reused difference saves none."""
        return self.grid[0] - (0 if self.how is How.REUSED else len(self.chosen))

    @property
    def rows(self) -> int:
        """Rows of the model that a clip takes, two for a guided evaluation."""
        return 2 * self.evaluations - (len(self.chosen) if self.how is How.REUSED else 0)


def named(grid: Grid) -> str:
    """A grid in words."""
    steps, shift, stretch = grid
    return f"{steps} steps, shift {shift:g}" + ("" if stretch == 1 else f", late {stretch:g} times")


class Fit(NamedTuple):
    """What was fitted to a run: AB2's weights of all steps but the first, and the skipped steps' of residuals."""

    weights: tuple[Pair, ...]
    pairs: dict[int, Pair]


NOTHING = Fit((), {})


class AlongFit(WeightFit):
    """Fits a step's weights to where the exact flow leads from the exact flow, not from where earlier steps led."""

    def __init__(self, times: Sequence[float], path: ExactPath, chosen: Sequence[int]) -> None:
        super().__init__(times, path, chosen)
        self._ends, self._exact = times[1:], path

    def __call__(self, step: int, latents: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Where the next step begins, fp32 [clips, ...]: on the exact flow."""
        super().__call__(step, latents, after)
        return self._exact.at(self._ends[step - 1]).astype(np.float32)


class Trials:
    """The runs of one checkpoint, judged by the clips numbered ``seeds``, kept in ``folder``.

    What is fitted is fitted to as many clips that follow them. ``exact`` AB2 steps at time shift ``exact_shift`` stand
    for the exact flow.
    """

    def __init__(self, path: Path, seeds: Sequence[int], exact: int, exact_shift: float, folder: Path) -> None:
        plan = Plan(exact=exact, exact_shift=exact_shift)
        others = [max(seeds) + 1 + place for place in range(len(seeds))]
        self.judging, self.fitting = (Clips(path, each, plan, folder) for each in (seeds, others))
        self._steps, self._shift, self._folder = exact, exact_shift, self.judging.folder
        self.model = self.judging.checkpoint.model
        self.settings = replace(settings_of(self.judging.checkpoint.config.sampling), solver=Solver.AB2)

    @cached_property
    def states(self) -> list[np.ndarray]:
        """The exact flow of the clips that weights are fitted to: latents fp32 [clips, T, C, h, w] at all its times."""
        states: list[np.ndarray] = []
        fine = replace(self.settings, steps=self._steps, time_shift=self._shift, late_stretch=1.0)
        last = sampler.sample(self.model, self.fitting.inputs, fine, lambda _, x, __: states.append(x.numpy()))
        return [*states, last.numpy()]

    def path(self, chosen: Sequence[int]) -> ExactPath:
        """The exact flow of the clips ``chosen`` of those."""
        path = ExactPath(schedule(self._steps, self._shift).tolist(), chosen)
        for step, (before, after) in enumerate(pairwise(self.states), 1):
            path(step, before, after)
        return path

    def fit(self, run: Run) -> Fit:
        """What is fitted to ``run``."""
        chosen = list(run.clips or range(len(self.fitting.seeds)))
        inputs, times = some(self.fitting.inputs, chosen), run.times()
        kind = AlongFit if run.weights is Weights.ALONG else WeightFit
        fit = kind(times, self.path(chosen), range(len(chosen)))
        model = modelled(self.model, run, {})
        rolled(guided_velocity(model, inputs, self.settings), inputs, times, fit)
        return Fit(tuple(fit.weights), model.pairs if isinstance(model, SkippedBlocks) else {})

    def errors(self, run: Run) -> list[float]:
        """Error of each clip."""
        return self.measured(run)["errors"]

    def error(self, run: Run) -> float:
        """Geometric mean over the clips."""
        return typical(self.errors(run))

    def measured(self, run: Run) -> Result:
        """A run's ``errors``, and the ``weights`` and ``pairs`` of residuals that were fitted to it."""
        settings = (run, self._steps, self._shift, self.fitting.seeds)
        return part(self._folder, run.name, settings, lambda: self._measure(run))

    def _measure(self, run: Run) -> Result:
        fit = NOTHING if run.weights is Weights.OWN else self.fit(run)
        errors = relative_errors(self.latents(run, fit), self.judging.exact).tolist()
        typer.echo(f"{self.judging.label}, {run.name}: {typical(errors):.4f}", err=True)
        return {"errors": errors, "weights": fit.weights, "pairs": [fit.pairs[step] for step in sorted(fit.pairs)]}

    def latents(self, run: Run, fit: Fit) -> np.ndarray:
        """Final latents fp32 [clips, T, C, h, w] of the clips that judge, by the reference sampler."""
        settings, times = replace(self.settings, solver_weights=fit.weights), run.times()
        with patch.object(sampler, "schedule", lambda *_: torch.tensor(times, dtype=torch.float64)):
            return sampler.sample(modelled(self.model, run, fit.pairs), self.judging.inputs, settings).numpy()


def modelled(model: Stiv, run: Run, pairs: dict[int, Pair]) -> Any:
    """The model that ``run`` is sampled with, ``pairs`` being the weights of residuals that are known already."""
    if not run.chosen or run.how is How.LEFT_OUT:
        return model
    return SkippedBlocks(model, run.chosen, pairs) if run.how is How.SKIPPED else ReusedDifference(model, run.chosen)


def some(inputs: SamplingInputs, chosen: Sequence[int]) -> SamplingInputs:
    """The inputs of the clips ``chosen``."""
    rows = list(chosen)
    return SamplingInputs(
        *(TextStates(*(each[rows] for each in one)) if isinstance(one, TextStates) else one[rows] for one in inputs)
    )


def rolled(velocity: Velocity, inputs: SamplingInputs, times: Sequence[float], follow: WeightFit) -> Tensor:
    """Latents by Euler's steps over ``times``, after each of which ``follow`` says where clips go on from instead."""
    latents = replace_frames(inputs.noise, inputs.clean, inputs.frame_mask)
    for step, (time, end) in enumerate(pairwise(times), 1):
        after = latents + (end - time) * velocity(latents, time, end)
        after = replace_frames(after, inputs.clean, inputs.frame_mask)
        latents = torch.from_numpy(follow(step, latents.numpy(), after.numpy()))
    return latents
