import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.schedule import LATE, schedule, shift_time
from stiv_deploy.stiv_ref import flow

shifts = st.floats(0.05, 20.0)
stretches = st.one_of(st.just(1.0), st.floats(1.0, 10.0))


@given(steps=st.integers(1, 300), shift=shifts, stretch=stretches)
def test_schedule_is_the_reference_schedule(steps: int, shift: float, stretch: float) -> None:
    # linspace may round differently by one unit in the last place, which shift_time multiplies by at most
    # max(shift, 1 / shift); its own three operations add one unit each. A stretch has five operations before that, and
    # multiplies what they err by.
    units = max(shift, 1 / shift) * (1 if stretch == 1 else 6 * stretch) + 3
    theirs = flow.schedule(steps, shift, stretch).numpy()
    np.testing.assert_allclose(schedule(steps, shift, stretch), theirs, rtol=0, atol=units * np.finfo(np.float64).eps)


@given(steps=st.integers(1, 300), shift=shifts, stretch=stretches)
def test_schedule_rises_from_exactly_zero_to_exactly_one(steps: int, shift: float, stretch: float) -> None:
    times = schedule(steps, shift, stretch)
    assert times.shape == (steps + 1,)
    assert times[0] == 0
    assert times[-1] == 1
    assert (np.diff(times) > 0).all()


def test_shift_spends_more_steps_near_noise() -> None:
    assert schedule(4, 3.0)[2] == pytest.approx(0.5 / (0.5 + 3 * 0.5))


@given(steps=st.integers(2, 300), shift=shifts, stretch=stretches)
def test_late_steps_are_so_much_longer_than_early_ones(steps: int, shift: float, stretch: float) -> None:
    times = schedule(steps, shift, stretch)
    way = shift_time(times, 1 / shift)  # as it was before the shift
    lengths = np.diff(way)
    early, late = lengths[times[1:] <= LATE], lengths[times[:-1] >= LATE]
    for each in (early, late):
        assert each.size == 0 or np.ptp(each) <= 1e-9
    if early.size and late.size:
        assert late[0] / early[0] == pytest.approx(stretch, rel=1e-6)


@pytest.mark.parametrize("steps", [0, -1])
def test_too_few_steps(steps: int) -> None:
    with pytest.raises(RequestError, match=f"num_inference_steps must be at least 1, got {steps}"):
        schedule(steps)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_bad_shift(shift: float) -> None:
    with pytest.raises(RequestError, match="time_shift must be positive and finite"):
        schedule(4, shift)


@pytest.mark.parametrize("stretch", [0.9, -1.0, math.nan, math.inf])
def test_bad_stretch(stretch: float) -> None:
    with pytest.raises(RequestError, match="late_stretch must be finite and at least 1"):
        schedule(4, 1.0, stretch)
