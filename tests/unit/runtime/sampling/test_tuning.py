"""The search for a grid, on a flow whose exact solution is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stiv_deploy.runtime.bundle.bounds import STEP_LIMIT
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.skipping import FIRST_SHARE, FIRST_TIME
from stiv_deploy.runtime.sampling.solvers import evaluations
from stiv_deploy.runtime.sampling.tuning import (
    FIRST_STEPS,
    SKIPPED,
    STRETCHED,
    UNTIL,
    Exact,
    Grid,
    Point,
    converged,
    frontier,
    intervals,
    measured,
    relative_errors,
    searched,
    skips,
    steps_within,
    to_skip,
)

NOISE = np.random.default_rng(0).standard_normal((4, 1, 1, 2, 3))
SPREAD = 0.3
EXACT = Exact(0.5 + SPREAD * NOISE, Grid(solver=Solver.AB2, steps=1, time_shift=1), 0.0)


def velocity(x: np.ndarray, t: float) -> np.ndarray:
    """Of normal data of mean 0.5 and deviation SPREAD: E[data - noise | x_t = x]."""
    return 0.5 + (t * SPREAD**2 - (1 - t)) / ((t * SPREAD) ** 2 + (1 - t) ** 2) * (x - t * 0.5)


def sampled(grid: Grid) -> np.ndarray:
    base, seen, previous = NOISE, NOISE, np.zeros_like(NOISE)
    for each in evaluations(SamplingSettings(**grid.model_dump(exclude={"guidance_until"}))):
        current = velocity(seen, each.timestep)
        seen = base + each.dt * (each.weights[0] * current + each.weights[1] * previous)
        base, previous = base if each.hold else seen, current
    return base


def quiet(_grid: Grid) -> None:
    """Nobody listens."""


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_the_reference_knows_its_own_error(tolerance: float) -> None:
    asked: list[Grid] = []
    exact = converged(sampled, 1.0, tolerance, 4000, asked.append)
    assert exact.error <= tolerance
    assert [each.steps for each in asked] == [FIRST_STEPS * 2**power for power in range(len(asked))]
    assert exact.grid == asked[-1]
    true = relative_errors(exact.latents, EXACT.latents).max()
    # A third of the difference, up to terms of the next order: some tenths at 60 to 120 steps of this flow.
    assert exact.error == pytest.approx(true, rel=0.4)


def test_a_reference_ends_at_the_most_steps_and_says_how_near_it_is() -> None:
    exact = converged(sampled, 1.0, 1e-12, 250, quiet)
    assert exact.grid.steps == 240
    assert exact.error > 1e-12


def test_one_half_chooses_and_the_other_judges() -> None:
    grid = Grid(solver=Solver.EULER, steps=5, time_shift=1.0)
    errors = relative_errors(sampled(grid), EXACT.latents)
    point = measured(sampled, EXACT, grid)
    assert (point.tried, point.error) == (errors[[0, 2]].mean(), errors[[1, 3]].mean())
    assert point.evaluations == 5


def test_guidance_that_ends_early_is_compared_with_fewer_steps() -> None:
    """A clip takes two rows a step while it is guided, and one afterwards."""
    best = [measured(sampled, EXACT, Grid(solver=Solver.AB2, steps=steps, time_shift=1.0)) for steps in (4, 6, 10)]

    def rows(grid: Grid) -> float:
        return grid.steps * (1 + (1.0 if grid.guidance_until is None else grid.guidance_until))

    told: list[Grid] = []
    found = list(intervals(sampled, EXACT, best, rows, told.append))
    assert len(told) == len(best) * len(UNTIL)
    assert {(each.point.grid.steps, each.fewer.grid.steps) for each in found} == {(6, 4), (10, 6)}
    for each in found:
        assert rows(each.fewer.grid) <= each.rows == rows(each.point.grid) < rows(best[-1].grid)
        # Here guidance changes nothing, so that more steps for as many rows are a gain.
        assert each.worthwhile
    nothing = intervals(sampled, EXACT, best, lambda grid: grid.steps, quiet)
    assert list(nothing) == [], "clips without guidance"


def test_the_search_finds_what_trying_everything_finds() -> None:
    shifts = (0.5, 1.0, 2.0, 4.0)
    points = list(searched(sampled, EXACT, [6, 11], list(Solver), shifts, quiet))
    dense = np.geomspace(0.5, 4.0, 60)
    for budget in (6, 11):
        every = [
            measured(sampled, EXACT, Grid(solver=solver, steps=steps_within(solver, budget), time_shift=float(shift)))
            for solver in Solver
            for shift in dense
        ]
        best = min(every, key=lambda each: each.tried)
        mine = [each for each in points if each.evaluations <= budget]
        found = min((each for each in mine if each.grid.late_stretch == 1), key=lambda each: each.tried)
        assert min(mine, key=lambda each: each.tried).tried <= found.tried
        assert found.grid.solver is best.grid.solver
        # Shifts lie a factor of sqrt(2) apart around the best: half of that off at most.
        assert abs(math.log2(found.grid.time_shift / best.grid.time_shift)) <= 0.5
        assert found.tried <= 2 * best.tried


def test_longer_late_steps_are_tried_beside_the_best_shift() -> None:
    points = list(searched(sampled, EXACT, [6], [Solver.AB2], (0.001, 1.0, 2.0), quiet))
    even = [each for each in points if each.grid.late_stretch == 1]
    best = min(even, key=lambda each: each.tried).grid.time_shift
    wanted = {(best * part, stretch) for part, stretch in STRETCHED}
    assert {(each.grid.time_shift, each.grid.late_stretch) for each in points if each not in even} == wanted
    assert points[0].grid.times == "shift 0.001"
    assert points[-1].grid.times == f"shift {best / 2:.3g}, late steps 3 times as long"


def test_no_shift_below_the_least_is_tried() -> None:
    points = list(searched(sampled, EXACT, [6], [Solver.AB2], (0.001,), quiet))
    assert {each.grid.time_shift for each in points} == {0.001}


@given(budget=st.integers(1, 60), solver=st.sampled_from(list(Solver)))
def test_a_budget_is_used_and_not_exceeded(budget: int, solver: Solver) -> None:
    steps = steps_within(solver, budget)
    count = Grid(solver=solver, steps=steps, time_shift=1.0).evaluations
    assert count <= budget < Grid(solver=solver, steps=steps + 1, time_shift=1.0).evaluations


points = st.builds(
    lambda count, tried: Point(
        grid=Grid(solver=Solver.EULER, steps=count, time_shift=1.0), evaluations=count, tried=tried, error=0.0
    ),
    st.integers(1, 9),
    st.floats(0, 1),
)


@given(tried=st.lists(points, max_size=12))
def test_the_frontier_is_what_nothing_beats(tried: list[Point]) -> None:
    best = frontier(tried)
    assert [each.evaluations for each in best] == sorted({each.evaluations for each in best})
    for each in tried:
        assert any(kept.evaluations <= each.evaluations and kept.tried <= each.tried for kept in best)
    for kept in best:
        assert not any(each.evaluations <= kept.evaluations and each.tried < kept.tried for each in tried)


def point_of(tried: float, error: float = 0.0, **grid: object) -> Point:
    own = Grid.model_validate({"solver": Solver.AB2, "time_shift": 1.0} | grid)
    return Point(grid=own, evaluations=own.evaluations, tried=tried, error=error)


@settings(max_examples=50, deadline=None)
@given(evaluated=st.integers(1, 40), shift=st.floats(0.25, 8), stretch=st.sampled_from([1.0, 2.0, 3.0]))
def test_skips_are_proposed_of_every_second_late_step_at_equal_evaluations(
    evaluated: int, shift: float, stretch: float
) -> None:
    """With the times of the best of as many steps, and longer late steps beside the best of equal ones."""
    weights = ((1.5, -0.5),) * (evaluated - 1)
    nearest = point_of(0.1, steps=evaluated, time_shift=shift, late_stretch=stretch, solver_weights=weights)
    equal = [point_of(tried, steps=evaluated, time_shift=each) for tried, each in ((0.3, 1.0), (0.2, 2.0))]
    proposed = to_skip([*equal, nearest])
    base = shift if stretch == 1 else 2.0
    wanted = [(shift, stretch), *((base * part, longer) for part, longer in SKIPPED)]
    found = [(each.time_shift, each.late_stretch) for each in proposed]
    assert found == [each for each in dict.fromkeys(wanted) if each in found]
    assert len(found) == len({*wanted}) or evaluated <= 4, "behind two others, not the first ones"
    for each in proposed:
        assert each.solver is Solver.AB2
        assert each.evaluations == evaluated == each.steps - len(each.skipped_steps)
        assert each.solver_weights == (), "those are to be fitted anew"
        times = each.settings.times()
        late = [step for step in range(2, each.steps) if times[step] >= FIRST_TIME and step >= FIRST_SHARE * each.steps]
        assert each.skipped_steps == tuple(late[::2])
        assert each.times.endswith(f", {len(each.skipped_steps)} skipped")
    assert nearest.grid.times.endswith("fitted weights") == (evaluated > 1)


def test_no_more_steps_are_proposed_than_a_request_may_have() -> None:
    most = Grid(solver=Solver.AB2, steps=STEP_LIMIT, time_shift=1.0)
    assert to_skip([Point(grid=most, evaluations=STEP_LIMIT, tried=0.1, error=0.1)]) == []


def test_others_than_ab2_are_not_proposed_to_skip() -> None:
    assert to_skip(point_of(0.1, steps=6, solver=solver) for solver in (Solver.EULER, Solver.HEUN)) == []


def test_a_skip_is_worthwhile_where_it_beats_all_others_that_cost_no_more() -> None:
    """By the clips that choose, and by the others: weights that meet a few clips too well do not pass for a gain."""
    best = [point_of(0.4, 0.5, steps=4), point_of(0.2, 0.5, steps=6), point_of(0.1, 0.5, steps=10)]
    near, met = (point_of(0.15, error, steps=8, skipped_steps=(4, 6)) for error in (0.4, 0.9))
    far = point_of(0.25, 0.0, steps=10, skipped_steps=(3, 5, 7, 9))
    as_far = point_of(0.2, steps=7, skipped_steps=(5,))
    found = list(skips([near, met, far, as_far], best))
    assert [each.point for each in found] == [near, met, far, as_far]
    assert [each.fewer for each in found] == [best[1]] * 4
    assert [each.worthwhile for each in found] == [True, False, False, False]
    assert [each.fewer for each in skips([point_of(0.1, steps=5, skipped_steps=(3,))], best)] == [best[0]]
