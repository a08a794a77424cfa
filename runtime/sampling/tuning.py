"""Which solver and time grid come nearest to the exact flow of a model, for each number of its evaluations.

The exact flow is not known. In its stead stands AB2 with so many steps that twice as many change little: halving the
steps of a rule of second order leaves a quarter of the error, so that the finer of two runs errs by a third of their
difference. Errors are relative L2 of whole latents, clip by clip. One half of the clips chooses, the other judges what
was chosen: so no luck of the choice is reported as a gain.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np

from stiv_deploy.runtime.bundle.bounds import SHIFT_LIMITS, STEP_LIMIT, Steps, Weights
from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.skipping import skippable
from stiv_deploy.runtime.sampling.solvers import block_evaluations

STRETCHED = ((2**-0.5, 2.0), (0.5, 2.0), (0.5, 3.0))
"""Late steps so much longer are tried, at so much of the time shift that is best where all steps are equal."""
FITTED = ((0.5, 4.0), (2**-1.5, 6.0), (0.25, 10.0), (2**-2.5, 10.0))
"""The same, for grids whose weights are fitted: these bear longer late steps."""
SKIPPED = ((0.5, 3.0), (2**-1.5, 5.0))
"""The same, for grids that skip the blocks of every second late step: shorter late steps cost little there."""
UNTIL = (0.4, 0.6, 0.8)
"""Times until which guidance is tried."""
FIRST_STEPS = 60
"""Steps of the coarsest run that may stand for the exact flow."""


class Grid(Frozen):
    """A solver and its sampling times: so many ``steps``, shifted by ``time_shift``, late ones longer.

    ``solver_weights`` are AB2's, where they were fitted. ``skipped_steps`` skip the blocks. ``guidance_until`` ends the
    guidance of all clips at that time; None leaves it as they have it.
    """

    solver: Solver
    steps: int
    time_shift: float
    late_stretch: float = 1.0
    solver_weights: Weights = ()
    skipped_steps: Steps = ()
    guidance_until: float | None = None

    @classmethod
    def of(cls, settings: SamplingSettings) -> Self:
        """The grid of ``settings``, whose guidance it leaves to the clips."""
        own = (name for name in cls.model_fields if name != "guidance_until")
        return cls.model_validate({name: getattr(settings, name) for name in own})

    @property
    def evaluations(self) -> int:
        """Evaluations of the model's blocks, guidance branches counted as one."""
        return block_evaluations(self.settings)

    @property
    def settings(self) -> SamplingSettings:
        """Solver and times as a run has them."""
        return SamplingSettings(**self.model_dump(exclude={"guidance_until"}))

    @property
    def weights(self) -> str:
        """Whose its solver's weights are, in a word."""
        return "fitted" if self.solver_weights else "its own"

    @property
    def times(self) -> str:
        """Its times in words."""
        stretch = "" if self.late_stretch == 1 else f", late steps {self.late_stretch:g} times as long"
        skipped = f", {len(self.skipped_steps)} skipped" if self.skipped_steps else ""
        return f"shift {self.time_shift:.3g}{stretch}{skipped}{', fitted weights' if self.solver_weights else ''}"


Sampled = Callable[[Grid], np.ndarray]
"""Latents fp32 [clips, T, C, h, w] by a grid, of the same noise and conditions every time."""
Told = Callable[[Grid], None]
"""Hears of each grid before it is sampled by."""


class Exact(NamedTuple):
    """What stands for the exact flow: latents [clips, T, C, h, w], their grid, and the largest error of a clip."""

    latents: np.ndarray
    grid: Grid
    error: float


class Point(Frozen):
    """A grid that was tried, with its mean error over the clips that choose (``tried``) and that judge (``error``)."""

    grid: Grid
    evaluations: int
    tried: float
    error: float


class Interval(Frozen):
    """A grid whose guidance ends early, the rows of the model that a clip takes by it, and what to compare it with.

    ``fewer`` is the best grid that takes no more rows and is guided as the clips are: fewer steps instead.
    """

    point: Point
    rows: float
    fewer: Point

    @property
    def worthwhile(self) -> bool:
        """Whether it comes nearer to the exact flow, by the clips that choose, than fewer steps do."""
        return self.point.tried < self.fewer.tried


class Skip(Frozen):
    """A grid some of whose steps skip the blocks, and ``fewer``: the best of all others with no more evaluations."""

    point: Point
    fewer: Point

    @property
    def worthwhile(self) -> bool:
        """Whether it comes nearer to the exact flow than fewer steps do, by the clips that choose and by the others.

        Weights can meet a few clips that they are fitted to too well, and skips hang on them more.
        """
        return self.point.tried < self.fewer.tried and self.point.error < self.fewer.error


def relative_errors(latents: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Relative L2 error of each clip, fp64 [clips], of ``latents`` against ``exact`` [clips, ...]."""
    wrong, right = (np.asarray(each, np.float64).reshape(len(exact), -1) for each in (latents, exact))
    return np.linalg.norm(wrong - right, axis=1) / np.linalg.norm(right, axis=1)


def converged(sampled: Sampled, time_shift: float, tolerance: float, most: int, told: Told) -> Exact:
    """The exact flow to within ``tolerance``, or as near as ``most`` steps come; its ``error`` says how near."""
    grid = Grid(solver=Solver.AB2, steps=FIRST_STEPS, time_shift=time_shift)
    told(grid)
    latents = sampled(grid)
    while True:
        coarse, grid = latents, grid.model_copy(update={"steps": 2 * grid.steps})
        told(grid)
        latents = sampled(grid)
        error = float(relative_errors(coarse, latents).max()) / 3
        if error <= tolerance or 2 * grid.steps > most:
            return Exact(latents, grid, error)


def measured(sampled: Sampled, exact: Exact, grid: Grid) -> Point:
    """The errors of ``grid``."""
    return judged(sampled(grid), exact, grid)


def judged(latents: np.ndarray, exact: Exact, grid: Grid) -> Point:
    """The errors of ``latents`` [clips, T, C, h, w] by ``grid``; clips of even number choose, the others judge."""
    errors = relative_errors(latents, exact.latents)
    return Point(
        grid=grid, evaluations=grid.evaluations, tried=float(errors[::2].mean()), error=float(errors[1::2].mean())
    )


def searched(
    sampled: Sampled,
    exact: Exact,
    budgets: Iterable[int],
    solvers: Sequence[Solver],
    shifts: Sequence[float],
    told: Told,
) -> Iterator[Point]:
    """Every grid that is tried: for each budget of evaluations and solver all ``shifts``, two beside the best one, and
    :data:`STRETCHED` of the best of these.

    ``shifts`` ascend. A solver's steps are as many as the budget has room for.
    """

    def point(grid: Grid) -> Point:
        told(grid)
        return measured(sampled, exact, grid)

    for budget in budgets:
        for solver in solvers:
            steps = steps_within(solver, budget)
            grids = [Grid(solver=solver, steps=steps, time_shift=shift) for shift in shifts]
            tried = [point(grid) for grid in grids]
            best = min(range(len(tried)), key=lambda index: tried[index].tried)
            tried += [point(grids[0].model_copy(update={"time_shift": shift})) for shift in _beside(shifts, best)]
            yield from tried
            best_grid = min(tried, key=lambda each: each.tried).grid
            yield from (point(stretched(best_grid, *each)) for each in STRETCHED)


def to_fit(tried: Iterable[Point]) -> list[Grid]:
    """Grids of AB2 whose weights are worth fitting, by steps: the best one, and :data:`FITTED` of the best shift."""
    return list(dict.fromkeys(grid for _, grid in _of_ab2(tried, FITTED)))


def to_skip(tried: Iterable[Point]) -> list[Grid]:
    """Grids of AB2 that skip the blocks of every second late step, with as many evaluations as others in ``tried``.

    For each number the times are those of the best one, and :data:`SKIPPED` of the best shift.
    """
    found = (_with_skips(grid, budget) for budget, grid in _of_ab2(tried, SKIPPED))
    return list(dict.fromkeys(grid for grid in found if grid is not None))


def _of_ab2(tried: Iterable[Point], shapes: Sequence[tuple[float, float]]) -> Iterator[tuple[int, Grid]]:
    """Of each number of AB2's steps in ``tried`` the best grid, and ``shapes`` of the best with equal steps."""
    ascending = sorted(tried, key=lambda each: (each.grid.steps, each.tried))
    ab2 = [each.grid for each in ascending if each.grid.solver is Solver.AB2 and each.grid.steps > 1]
    for steps in dict.fromkeys(each.steps for each in ab2):
        mine = [each for each in ab2 if each.steps == steps]
        equal = next(each for each in mine if each.late_stretch == 1)
        yield from ((steps, grid) for grid in (mine[0], *(stretched(equal, *each) for each in shapes)))


def _with_skips(grid: Grid, budget: int) -> Grid | None:
    """The times of ``grid`` in more steps than ``budget``, which is left where every second late one skips."""
    for steps in range(budget + 1, min(2 * budget, STEP_LIMIT) + 1):
        longer = grid.model_copy(update={"steps": steps, "solver_weights": ()})
        skipped = tuple(skippable(longer.settings.times().tolist())[::2])
        if steps - len(skipped) == budget:
            return longer.model_copy(update={"skipped_steps": skipped})
    return None


def skips(found: Iterable[Point], best: Sequence[Point]) -> Iterator[Skip]:
    """Each point ``found``, which skips blocks, with the one of ``best`` that it is to beat; evaluations ascend."""
    for point in found:
        fewer = [each for each in best if each.evaluations <= point.evaluations]
        yield Skip(point=point, fewer=min(fewer, key=lambda each: each.tried))


def nearest(found: Iterable[Skip]) -> list[Skip]:
    """Of each number of evaluations the skips that come nearest, by the clips that choose; evaluations ascend."""
    far_first = sorted(found, key=lambda each: (each.point.evaluations, -each.point.tried))
    return [*{each.point.evaluations: each for each in far_first}.values()]


def stretched(grid: Grid, part: float, stretch: float) -> Grid:
    """``grid`` with late steps ``stretch`` times as long, at so large a ``part`` of its time shift."""
    shift = max(part * grid.time_shift, SHIFT_LIMITS[0])
    return grid.model_copy(update={"time_shift": shift, "late_stretch": stretch})


def intervals(
    sampled: Sampled, exact: Exact, best: Sequence[Point], rows: Callable[[Grid], float], told: Told
) -> Iterator[Interval]:
    """Each grid of ``best`` with guidance that ends at each of :data:`UNTIL`, where another one takes no more rows.

    ``rows`` tells how many rows of the model a clip takes by a grid, all its evaluations together.
    """
    taken = [(rows(each.grid), each) for each in best]
    for own, point in taken:
        for until in UNTIL:
            grid = point.grid.model_copy(update={"guidance_until": until})
            cost = rows(grid)
            fewer = [each for needed, each in taken if needed <= cost]
            told(grid)
            if fewer and cost < own:
                cheapest = min(fewer, key=lambda each: each.tried)
                yield Interval(point=measured(sampled, exact, grid), rows=cost, fewer=cheapest)


def steps_within(solver: Solver, budget: int) -> int:
    """The most steps that ``solver`` takes with at most ``budget`` evaluations, which are one or more."""
    return (budget + 1) // 2 if solver is Solver.HEUN else budget


def _beside(shifts: Sequence[float], index: int) -> list[float]:
    """Geometric means of the shift at ``index`` with its neighbours."""
    near = (other for other in (index - 1, index + 1) if 0 <= other < len(shifts))
    return [float(np.sqrt(shifts[index] * shifts[other])) for other in near]


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats with as few evaluations, by what they were tried at; evaluations ascend."""
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.evaluations, each.tried)):
        if not best or point.tried < best[-1].tried:
            best.append(point)
    return best
