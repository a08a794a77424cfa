"""Tuned defaults: which grid a number of steps gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stiv_deploy.runtime.bundle.tuned import ONE_A_STEP, Tuned, TunedGrid


def grid(solver: str, steps: int, shift: float, tried: float) -> TunedGrid:
    return TunedGrid(solver=solver, steps=steps, time_shift=shift, tried=tried, error=2 * tried)


TUNED = Tuned(
    bundle="b",
    clips=4,
    reference_error=1e-3,
    grids=(
        grid("euler", 4, 2, 0.2),
        grid("heun", 4, 1, 0.05),
        grid("ab2", 4, 4, 0.3),
        grid("euler", 10, 1.5, 0.1),
        grid("ab2", 10, 3, 0.01),
    ),
)


@pytest.mark.parametrize(
    ("steps", "solver", "found"),
    [
        (4, None, ("euler", 4)),  # Heun's four steps are seven evaluations
        (10, None, ("ab2", 10)),
        (6, None, ("euler", 4)),  # 1.5 times, and 10 is 1.7 times
        (7, None, ("ab2", 10)),
        (1, None, ("euler", 4)),
        (500, None, ("ab2", 10)),
        (10, "euler", ("euler", 10)),
        (10, "heun", ("heun", 4)),
        (4, "ab2", ("ab2", 4)),
    ],
)
def test_the_best_that_costs_as_much_is_taken(steps: int, solver: str | None, found: tuple[str, int]) -> None:
    taken = TUNED.grid(steps, solver)
    assert taken is not None
    assert (taken.solver, taken.steps) == found


def test_fitted_weights_are_taken_for_their_own_number_of_steps_alone() -> None:
    weights = ((1.5, -0.5),) * 9
    for tried in (0.005, 0.02):
        fitted = TunedGrid(solver="ab2", steps=10, time_shift=1, solver_weights=weights, tried=tried, error=0)
        both = Tuned(**TUNED.model_dump(exclude={"grids"}), grids=(*TUNED.grids, fitted))
        assert (both.grid(10) == fitted) == (both.grid(10, "ab2") == fitted) == (tried < 0.01)
        assert both.grid(11) == both.grid(9) == TUNED.grids[-1]


def test_a_solver_that_was_not_tried_has_none() -> None:
    only = TUNED.model_copy(update={"grids": TUNED.grids[1:2]})
    assert only.grid(4, "ab2") is None
    assert only.grid(4) is None, "Heun's steps cost more"
    assert only.best() == []


def test_the_best_are_listed_once_each() -> None:
    assert [(each.solver, each.steps) for each in TUNED.best()] == [("euler", 4), ("ab2", 10)]


@given(st.integers(1, 10_000), st.sampled_from(["euler", "heun", "ab2", None]))
def test_the_nearest_number_of_steps_is_taken(steps: int, solver: str | None) -> None:
    taken = TUNED.grid(steps, solver)
    assert taken is not None
    fits = [each for each in TUNED.grids if each.solver == solver or (solver is None and each.solver in ONE_A_STEP)]
    ratios = [max(each.steps / steps, steps / each.steps) for each in fits]
    assert max(taken.steps / steps, steps / taken.steps) == min(ratios)


@pytest.mark.parametrize(
    ("solver", "steps", "given"), [("euler", 3, 2), ("heun", 3, 2), ("ab2", 3, 3), ("ab2", 4, 2), ("ab2", 1, 1)]
)
def test_weights_are_of_ab2_and_of_all_steps_but_the_first(solver: str, steps: int, given: int) -> None:
    with pytest.raises(ValidationError, match=f"want solver weights of ab2 and {steps - 1} steps, got {given} of"):
        TunedGrid(solver=solver, steps=steps, time_shift=1, solver_weights=((1, 0),) * given, tried=0, error=0)


def test_two_grids_of_one_solver_and_steps_are_refused() -> None:
    with pytest.raises(ValidationError, match="one grid for a solver, its weights and a number of steps, got two"):
        Tuned(bundle="b", clips=2, reference_error=0, grids=(TUNED.grids[0], grid("euler", 4, 3, 0.1)))
