"""Solvers as data: what each evaluation of the model does to a sample, so that one loop and one graph serve all.

An evaluation gives the velocity at ``timestep``; the ``step`` graph then moves the sample by ``dt`` along a weighted
sum of this velocity and the previous one, to what the model sees next, at ``next_timestep``. Where ``hold``, the sample
itself stays: a predictor's result is only looked at, and the corrector starts from where the predictor did.
"""

from functools import lru_cache
from typing import NamedTuple

from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver

EULER = (1.0, 0.0)
MEAN = (0.5, 0.5)
"""Heun's corrector: the mean of the velocities at both ends of the step."""


class Evaluation(NamedTuple):
    """One evaluation: times (0 noise, 1 data), step, weights of this and the previous velocity.

    One without ``hold`` completes a step of the schedule.
    """

    timestep: float
    next_timestep: float
    dt: float
    weights: tuple[float, float] = EULER
    hold: bool = False


@lru_cache
def evaluations(settings: SamplingSettings) -> tuple[Evaluation, ...]:
    """Euler's one evaluation a step, or Heun's two; the last step, to t = 1, is Euler in either solver."""
    times = settings.times()
    planned: list[Evaluation] = []
    for start, end in zip(times.tolist(), times.tolist()[1:], strict=False):
        if settings.solver is Solver.HEUN and end < 1:
            planned.append(Evaluation(start, end, end - start, hold=True))
            planned.append(Evaluation(end, end, end - start, MEAN))
        else:
            planned.append(Evaluation(start, end, end - start))
    return tuple(planned)
