"""Tuned defaults: which grid a number of steps gets."""

from typing import Any

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


def skipping(steps: int, skipped: tuple[int, ...], tried: float, **changes: Any) -> TunedGrid:
    plain = {"solver": "ab2", "steps": steps, "time_shift": 2, "skipped_steps": skipped, "tried": tried, "error": 0}
    return TunedGrid.model_validate(plain | changes)


FITTED = ((1.5, -0.5),) * 9
SKIPPING = (
    skipping(10, (4, 6), 1e-4, solver_weights=FITTED),
    skipping(10, (5, 7), 2e-4, solver="euler"),
    skipping(6, (4,), 1e-5),
    skipping(25, (9, 11), 1e-6),
)
"""Each nearer than all others of as many steps."""
BOTH = Tuned(**TUNED.model_dump(exclude={"grids"}), grids=(*SKIPPING, *TUNED.grids))


@given(st.integers(1, 10_000), st.sampled_from(["euler", "heun", "ab2", None]))
def test_nobody_skips_who_did_not_ask_for_it(steps: int, solver: str | None) -> None:
    assert BOTH.grid(steps, solver) == TUNED.grid(steps, solver)
    assert BOTH.best() == TUNED.best()


def test_grids_that_skip_are_found_by_steps_and_solver_the_nearest_first() -> None:
    ab2, euler, few, many = SKIPPING
    assert BOTH.skipping() == [many, few, ab2, euler]
    assert BOTH.skipping(10) == [ab2, euler]
    assert BOTH.skipping(10, "euler") == [euler]
    assert BOTH.skipping(solver="ab2") == [many, few, ab2]
    assert BOTH.skipping(9) == BOTH.skipping(10, "heun") == TUNED.skipping() == [], "no nearest: they are of their own"


def test_a_grid_that_skips_stands_beside_one_that_does_not_but_not_beside_another() -> None:
    weights = {"solver_weights": FITTED}
    whole = skipping(10, (), 0.1, **weights)
    values = TUNED.model_dump(exclude={"grids"})
    assert Tuned(**values, grids=(SKIPPING[0], whole)).grid(10) == whole
    with pytest.raises(ValidationError, match="one grid for a solver, its weights and a number of steps, got two"):
        Tuned(**values, grids=(SKIPPING[0], skipping(10, (8,), 0.1, **weights)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"solver": "heun"}, r"want ascending skipped steps of 6, got \[2, 4\] of heun"),
        ({"skipped_steps": (4, 2)}, r"want ascending skipped steps of 6, got \[4, 2\] of ab2"),
        ({"skipped_steps": (2, 2)}, r"got \[2, 2\] of ab2"),
        ({"skipped_steps": (2, 6)}, r"of 6, got \[2, 6\]"),
        ({"skipped_steps": (-1, 2)}, "greater than or equal to 0"),
        ({"skipped_steps": (2.5,)}, "valid integer"),
        ({"skipped_steps": (2, 10_001)}, "less than or equal to 10000"),
    ],
)
def test_steps_that_are_none_to_skip_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        skipping(6, (2, 4), 0, **changes)


def test_steps_of_grids_that_skip_are_no_line_of_the_defaults() -> None:
    """Beside fitted weights of ten steps, 25 would have those of AB2's own rule."""
    fitted = TunedGrid(solver="ab2", steps=10, time_shift=1, solver_weights=FITTED, tried=0.001, error=0)
    own = TUNED.model_dump(exclude={"grids"})
    without, both = (Tuned(**own, grids=(*TUNED.grids, fitted, *more)) for more in ((), SKIPPING[3:]))
    assert both.best() == without.best() == [TUNED.grids[0], fitted]
