"""Which steps may skip the blocks, and the weights of the residuals that they go on from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.sampling.schedule import schedule
from stiv_deploy.runtime.sampling.skipping import FIRST_SHARE, FIRST_TIME, KNOWN, residual_weights, skippable

EPS = 2.0**-52


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    """Times of a run, and some of its steps from the third on."""
    steps = draw(st.integers(KNOWN + 1, 20))
    times = schedule(steps, draw(st.floats(0.25, 8.0)), draw(st.floats(1.0, 4.0))).tolist()
    return times, sorted(draw(st.sets(st.integers(KNOWN, steps - 1), min_size=1)))


@given(run=runs(), slope=st.floats(-3, 3), start=st.floats(-3, 3))
def test_residuals_that_are_linear_in_time_are_met(
    run: tuple[list[float], list[int]], slope: float, start: float
) -> None:
    """To the roundings of both weights, their products and the residuals themselves."""
    times, skipped = run
    known: list[float] = []
    for step, weights in enumerate(residual_weights(times, skipped)):
        own = start + slope * times[step]
        if step not in skipped:
            assert weights is None
            known.append(own)
            continue
        assert weights is not None
        last, before = weights
        size = (abs(start) + abs(slope)) * (abs(last) + abs(before))
        # A difference of two times loses bits where these are near to each other: as many as the weights are large.
        allowed = 16 * EPS * size / min(np.diff(times))
        assert last * known[-1] + before * known[-2] == pytest.approx(own, rel=0, abs=allowed)
        assert last + before == pytest.approx(1, rel=0, abs=4 * EPS * (abs(last) + abs(before)))


def test_weights_worked_out_by_hand() -> None:
    """From 0 and 1/4 to 1/2: one such length ahead; to 3/4: two. Then from 1/4 and 7/8 to 15/16: a tenth."""
    times = [0.0, 0.25, 0.5, 0.75, 0.875, 0.9375, 1.0]
    found = list(residual_weights(times, (2, 3, 5)))
    assert found == [None, None, (2.0, -1.0), (3.0, -2.0), None, (1.1, -0.1)]


@given(steps=st.integers(1, 60), shift=st.floats(0.25, 8.0), stretch=st.floats(1.0, 4.0))
def test_proposed_are_late_steps_behind_two_others(steps: int, shift: float, stretch: float) -> None:
    times = schedule(steps, shift, stretch).tolist()
    found = skippable(times)
    late = [step for step in range(KNOWN, steps) if times[step] >= FIRST_TIME and step >= FIRST_SHARE * steps]
    assert found == late
    assert found == list(range(found[0], steps)) if found else steps <= KNOWN or max(times[:-1]) < FIRST_TIME


def test_the_first_ones_are_left_alone_by_number_and_by_time() -> None:
    even = [step / 20 for step in range(21)]
    assert skippable(even)[0] == 4, "a fifth of the steps"
    slow = [0.0, 0.02, 0.05, 0.1, 0.13, 0.5, 1.0]
    assert skippable(slow) == [4, 5]
    assert skippable([0.0, 0.5, 1.0]) == []
