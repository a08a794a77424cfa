"""How one clip is sampled: steps, guidance, solver; everything about a run that is not a tensor."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.guidance import GuidanceMode, GuidanceRow, Unseen, branch_weights, guidance_rows
from stiv_deploy.runtime.sampling.schedule import schedule


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

    Raises :class:`RequestError` for a value that cannot be sampled with.
    """

    steps: int = 50
    guidance_mode: GuidanceMode = GuidanceMode.JIT
    guidance_scale: float = 7.5
    image_scale: float = 1.5
    renorm: bool = True
    solver: Solver = Solver.EULER
    time_shift: float = 1.0
    unseen: Unseen = Unseen.NOISED

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int | np.integer) or isinstance(self.steps, bool):
            raise RequestError(f"num_inference_steps must be a whole number, got {self.steps!r}")
        self.weights()
        self.times()

    def times(self) -> np.ndarray:
        """Sampling times, fp64 [steps + 1]."""
        return schedule(self.steps, self.time_shift)

    def weights(self) -> np.ndarray:
        """Branch weights, fp32 [branches]."""
        return branch_weights(self.guidance_mode, self.guidance_scale, self.image_scale)

    def rows(self) -> list[GuidanceRow]:
        """The rows of the model that a sample needs, the conditional one first."""
        return guidance_rows(self.guidance_mode, self.weights())

    @property
    def renormalizes(self) -> bool:
        """Whether guidance keeps the norm of the conditional velocity; without guidance it has it anyway."""
        return self.renorm and self.guidance_mode is not GuidanceMode.NONE
