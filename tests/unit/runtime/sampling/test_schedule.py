import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.schedule import schedule
from stiv_deploy.stiv_ref import flow

shifts = st.floats(0.05, 20.0)


@given(steps=st.integers(1, 300), shift=shifts)
def test_schedule_is_the_reference_schedule(steps: int, shift: float) -> None:
    # linspace may round differently by one unit in the last place, which shift_time multiplies by at most
    # max(shift, 1 / shift); its own three operations add one unit each.
    tolerance = (max(shift, 1 / shift) + 3) * np.finfo(np.float64).eps
    np.testing.assert_allclose(schedule(steps, shift), flow.schedule(steps, shift).numpy(), rtol=0, atol=tolerance)


@given(steps=st.integers(1, 300), shift=shifts)
def test_schedule_rises_from_exactly_zero_to_exactly_one(steps: int, shift: float) -> None:
    times = schedule(steps, shift)
    assert times.shape == (steps + 1,)
    assert times[0] == 0
    assert times[-1] == 1
    assert (np.diff(times) > 0).all()


def test_shift_spends_more_steps_near_noise() -> None:
    assert schedule(4, 3.0)[2] == pytest.approx(0.5 / (0.5 + 3 * 0.5))


@pytest.mark.parametrize("steps", [0, -1])
def test_too_few_steps(steps: int) -> None:
    with pytest.raises(RequestError, match=f"num_inference_steps must be at least 1, got {steps}"):
        schedule(steps)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_bad_shift(shift: float) -> None:
    with pytest.raises(RequestError, match="time_shift must be positive and finite"):
        schedule(4, shift)
