"""Solvers as data: what each evaluation of the model does to a sample, so that one loop and one graph serve all.

An evaluation gives the velocity at ``timestep``; the ``step`` graph then moves the sample by ``dt`` along a weighted
sum of this velocity and the previous one, to what the model sees next, at ``next_timestep``. Where ``hold``, the sample
itself stays: a predictor's result is only looked at, and the corrector starts from where the predictor did.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.skipping import residual_weights

EULER = (1.0, 0.0)
MEAN = (0.5, 0.5)
"""Heun's corrector: the mean of the velocities at both ends of the step."""


class Evaluation(NamedTuple):
    """One evaluation: times (0 noise, 1 data), step, weights of this and the previous velocity, whether it is guided.

    One without ``hold`` completes a step of the schedule. ``scale`` is the guidance scale, a condition of students.
    ``residuals`` are the weights of the last two residuals where the blocks are skipped, None where they run.
    """

    timestep: float
    next_timestep: float
    dt: float
    weights: tuple[float, float] = EULER
    hold: bool = False
    guided: bool = True
    scale: float = 1.0
    residuals: tuple[float, float] | None = None


@lru_cache
def evaluations(settings: SamplingSettings) -> tuple[Evaluation, ...]:
    """The evaluations of a run with ``settings``, in order; the first one uses no previous velocity.

    Where guidance begins or ends the velocity jumps, and a solver that looks back starts anew.
    """
    times = settings.times().tolist()
    planned = _weighed(_PLANS[settings.solver](times), settings.solver_weights)
    if settings.skipped_steps:
        skips = residual_weights(times, settings.skipped_steps)
        planned = (each._replace(residuals=own) for each, own in zip(planned, skips, strict=True))
    made = [each._replace(guided=settings.guides(each.timestep), scale=settings.guidance_scale) for each in planned]
    if settings.solver is Solver.AB2:
        return tuple(
            each if before.guided == each.guided else each._replace(weights=EULER)
            for before, each in pairwise([made[0], *made])
        )
    return tuple(made)


def _weighed(planned: Iterator[Evaluation], weights: Sequence[tuple[float, float]]) -> Iterator[Evaluation]:
    """``planned`` with the ``weights`` of all but the first, if there are any."""
    if not weights:
        return planned
    return (each._replace(weights=own) for each, own in zip(planned, (EULER, *weights), strict=True))


def most_rows(settings: SamplingSettings) -> int:
    """Rows of the model that the evaluation which needs most of a run with ``settings`` has."""
    return len(settings.rows(any(each.guided for each in evaluations(settings))))


def block_evaluations(settings: SamplingSettings) -> int:
    """Evaluations of the model's blocks of a run with ``settings``, guidance branches counted as one."""
    return sum(each.residuals is None for each in evaluations(settings))


def row_evaluations(settings: SamplingSettings) -> int:
    """Rows of the model that a run with ``settings`` takes, all its evaluations together but those without blocks."""
    return sum(len(settings.rows(each.guided)) for each in evaluations(settings) if each.residuals is None)


def anew(planned: tuple[Evaluation, ...], position: int) -> tuple[Evaluation, ...]:
    """``planned`` for a sample whose latents were changed before evaluation ``position``.

    The previous velocity is of other latents, so that this evaluation does without, as a run's first; a corrector
    becomes the Euler step that its predictor was.
    """
    predicted = position > 0 and planned[position - 1].hold
    again = planned[position - 1]._replace(hold=False) if predicted else planned[position]._replace(weights=EULER)
    return (*planned[:position], again, *planned[position + 1 :])


def _euler(times: Sequence[float]) -> Iterator[Evaluation]:
    for start, end in pairwise(times):
        yield Evaluation(start, end, end - start)


def _heun(times: Sequence[float]) -> Iterator[Evaluation]:
    """Predictor and corrector; the last step, to t = 1, is Euler."""
    for start, end in pairwise(times[:-1]):
        yield Evaluation(start, end, end - start, hold=True)
        yield Evaluation(end, end, end - start, MEAN)
    yield from _euler(times[-2:])


def _ab2(times: Sequence[float]) -> Iterator[Evaluation]:
    """One evaluation a step, whose velocity goes on along the line through the previous one; the first is Euler."""
    yield from _euler(times[:2])
    for before, start, end in zip(times, times[1:], times[2:], strict=False):
        yield Evaluation(start, end, end - start, adams_bashforth((end - start) / (start - before)))


def adams_bashforth(ratio: float) -> tuple[float, float]:
    """Weights of this velocity and the previous one for a step of ``ratio`` times the previous step's length.

    The Adams-Bashforth rule of order two on unequal steps (Hairer, Norsett, Wanner, Solving Ordinary Differential
    Equations I, section III.5).
    """
    return 1 + ratio / 2, -ratio / 2


_PLANS: dict[Solver, Callable[[Sequence[float]], Iterator[Evaluation]]] = {
    Solver.EULER: _euler,
    Solver.HEUN: _heun,
    Solver.AB2: _ab2,
}
"""Each solver's evaluations over sampling times."""
