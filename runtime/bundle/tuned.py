"""What tuning found out about a bundle, kept in its manifest: each solver's best times by the number of steps."""

import math
from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, model_validator

from stiv_deploy.runtime.bundle.bounds import SHIFT_LIMITS, STEP_LIMIT, STRETCH_LIMITS, Digest, Steps, Weights
from stiv_deploy.runtime.bundle.contract import Frozen

SolverName = Literal["euler", "heun", "ab2"]
ONE_A_STEP: tuple[SolverName, ...] = ("euler", "ab2")
"""Solvers with one evaluation a step: which of them is taken by default does not change what a step costs."""


class TunedGrid(Frozen):
    """The sampling times with which ``solver`` comes nearest to the exact flow in so many ``steps``.

    ``solver_weights`` are AB2's where they were fitted to the model; at these times and in these steps alone they mean
    anything. Those of ``skipped_steps`` skip the blocks. ``tried`` and ``error`` are relative L2 errors of latents,
    means over the clips that chose and over the others.
    """

    solver: SolverName
    steps: int = Field(ge=1, le=STEP_LIMIT)
    time_shift: float = Field(ge=SHIFT_LIMITS[0], le=SHIFT_LIMITS[1])
    late_stretch: float = Field(default=1.0, ge=STRETCH_LIMITS[0], le=STRETCH_LIMITS[1])
    solver_weights: Weights = ()
    skipped_steps: Steps = ()
    tried: float = Field(ge=0)
    error: float = Field(ge=0)

    @property
    def weights(self) -> str:
        """Whose its solver's weights are, in a word."""
        return "fitted" if self.solver_weights else "its own"

    @property
    def kind(self) -> tuple[int, str, str, bool]:
        """What one bundle has one grid for: steps, solver, whose weights, and whether steps are skipped."""
        return self.steps, self.solver, self.weights, bool(self.skipped_steps)

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = len(self.solver_weights)
        if given and (self.solver != "ab2" or given != self.steps - 1):
            raise ValueError(f"want solver weights of ab2 and {self.steps - 1} steps, got {given} of {self.solver}")
        skipped = self.skipped_steps
        if skipped and (
            self.solver not in ONE_A_STEP or list(skipped) != sorted({*skipped}) or skipped[-1] >= self.steps
        ):
            raise ValueError(f"want ascending skipped steps of {self.steps}, got {list(skipped)} of {self.solver}")
        return self


class Tuned(Frozen):
    """Each solver's best grids for numbers of steps, measured on so many ``clips``.

    ``bundle`` is the hash of the bundle that they hold for; ``reference_error`` is the relative L2 error of what stood
    for the exact flow.
    """

    bundle: Digest
    clips: int = Field(ge=2)
    reference_error: float = Field(ge=0)
    grids: tuple[TunedGrid, ...] = Field(min_length=1, max_length=1_000)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({each.kind for each in self.grids}) < len(self.grids):
            raise ValueError("want one grid for a solver, its weights and a number of steps, got two")
        return self

    def skipping(self, steps: int | None = None, solver: str | None = None) -> list[TunedGrid]:
        """The grids with skipped steps, of so many ``steps`` and ``solver`` where they are named, the nearest first."""
        found = [each for each in self.grids if each.skipped_steps and each.steps == (steps or each.steps)]
        return sorted((each for each in found if each.solver == (solver or each.solver)), key=lambda each: each.tried)

    def grid(self, steps: int, solver: str | None = None) -> TunedGrid | None:
        """The best grid for a number of ``steps``, with ``solver`` if one is named; None if that was never tried.

        All its steps are evaluated: none is skipped.

        Numbers of steps that were not tried are served by the nearest one, by its ratio, of those without fitted
        weights. Of several solvers with one evaluation a step the best is taken.
        """
        whole = [each for each in self.grids if not each.skipped_steps]
        known = [each for each in whole if not each.solver_weights or each.steps == steps]
        fits = [each for each in known if (each.solver in ONE_A_STEP if solver is None else each.solver == solver)]
        return min(fits, key=lambda each: (abs(math.log(each.steps / steps)), each.tried), default=None)

    def best(self) -> list[TunedGrid]:
        """The grids that are taken where no solver is named, by ascending steps."""
        known = sorted({each.steps for each in self.grids if not each.skipped_steps})
        found: Iterable[TunedGrid | None] = (self.grid(steps) for steps in known)
        return list(dict.fromkeys(each for each in found if each is not None))
