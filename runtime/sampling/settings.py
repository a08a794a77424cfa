"""How one clip is sampled: steps, guidance, solver; everything about a run that is not a tensor."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from stiv_deploy.runtime.errors import RequestError, briefly
from stiv_deploy.runtime.sampling.guidance import (
    BRANCHES,
    GuidanceMode,
    GuidanceRow,
    Unseen,
    branch_weights,
    guidance_rows,
)
from stiv_deploy.runtime.sampling.schedule import schedule
from stiv_deploy.runtime.sampling.skipping import KNOWN

TIE = 1e-9
"""Times this near to an end of the guidance interval are at it: their last bits depend on who computes them."""


class Solver(StrEnum):
    """Ordinary differential equation solver: Euler (one model call a step), Heun (two, second order) or AB2.

    AB2, the Adams-Bashforth rule of two steps, is of second order too, with one model call a step: it uses the velocity
    of the step before again.
    """

    EULER = "euler"
    HEUN = "heun"
    AB2 = "ab2"


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Everything about a sampling run that is not a tensor. ``image_scale`` is used by SIT-CFG only.

    Evaluations at times from ``guidance_from`` to ``guidance_until``, both among them, are guided; all others need the
    conditional branch alone (a guidance interval, arXiv 2404.07724; times run from 0, noise, to 1, data).

    ``solver_weights`` are AB2's in every step but the first, of the velocity there and of the one before, in place of
    the rule's own (:mod:`~stiv_deploy.runtime.sampling.fitting`). ``skipped_steps``, counted from 0, do without the
    model's blocks (:mod:`~stiv_deploy.runtime.sampling.skipping`).

    Raises :class:`RequestError` for a value that cannot be sampled with.
    """

    steps: int = 50
    guidance_mode: GuidanceMode = GuidanceMode.JIT
    guidance_scale: float = 7.5
    image_scale: float = 1.5
    renorm: bool = True
    solver: Solver = Solver.EULER
    time_shift: float = 1.0
    late_stretch: float = 1.0
    solver_weights: tuple[tuple[float, float], ...] = ()
    skipped_steps: tuple[int, ...] = ()
    unseen: Unseen = Unseen.NOISED
    guidance_from: float = 0.0
    guidance_until: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int | np.integer) or isinstance(self.steps, bool):
            raise RequestError(f"num_inference_steps must be a whole number, got {self.steps!r}")
        if not 0 <= self.guidance_from <= self.guidance_until <= 1:
            raise RequestError(
                f"guidance runs from time {self.guidance_from:g} until {self.guidance_until:g}; give 0 (noise) <= "
                "guidance_from <= guidance_until <= 1 (data)"
            )
        self.weights()
        self.times()
        self._check_solver_weights()
        self._check_skipped_steps()

    def _check_solver_weights(self) -> None:
        given = len(self.solver_weights)
        if given and self.solver is not Solver.AB2:
            raise RequestError(f"solver_weights are of ab2, the solver is {self.solver}; leave them out")
        if given not in (0, self.steps - 1):
            raise RequestError(
                f"solver_weights are of every step but the first, {self.steps - 1} here, got {given}; they are of "
                "another number of steps: leave them out, or ask for that"
            )

    def _check_skipped_steps(self) -> None:
        skipped = self.skipped_steps
        if not skipped:
            return
        if self.solver is Solver.HEUN:
            raise RequestError("skipped_steps are of solvers with one evaluation a step; use euler or ab2")
        if list(skipped) != sorted(set(skipped)) or not 0 <= skipped[0] <= skipped[-1] < self.steps:
            raise RequestError(
                f"skipped_steps are ascending numbers from 0 to {self.steps - 1} here, got {briefly(list(skipped))}; "
                "they are of another number of steps: leave them out, or ask for that"
            )
        some = self.guidance_mode is not GuidanceMode.NONE
        guided = [some and self.guides(time) for time in self.times()[:-1].tolist()]
        leaving, before = set(skipped), list[bool]()
        for step, own in enumerate(guided):
            if step not in leaving:
                before = [*before[1 - KNOWN :], own]
            elif before != [own] * KNOWN:
                raise RequestError(
                    f"step {step} cannot be skipped: it goes on along the last {KNOWN} steps that were not, which must "
                    "be there and guided as it is; leave it out of skipped_steps, or guidance_from, guidance_until or "
                    "skip_blocks out"
                )

    def times(self) -> np.ndarray:
        """Sampling times, fp64 [steps + 1]."""
        return schedule(self.steps, self.time_shift, self.late_stretch)

    def weights(self) -> np.ndarray:
        """Branch weights, fp32 [branches]."""
        return branch_weights(self.guidance_mode, self.guidance_scale, self.image_scale)

    def guides(self, timestep: float) -> bool:
        """Whether an evaluation at ``timestep`` is guided."""
        return self.guidance_from - TIE <= timestep <= self.guidance_until + TIE

    def rows(self, guided: bool = True) -> list[GuidanceRow]:
        """The rows of the model that an evaluation of a sample needs, the conditional one first."""
        if not guided:
            return [GuidanceRow(BRANCHES[self.guidance_mode][0], 1.0)]
        return guidance_rows(self.guidance_mode, self.weights())

    @property
    def renormalizes(self) -> bool:
        """Whether guidance keeps the norm of the conditional velocity; without guidance it has it anyway."""
        return self.renorm and self.guidance_mode is not GuidanceMode.NONE
