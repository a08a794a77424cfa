"""Flow matching: path, target, loss mask, time shift and how timesteps are drawn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.stiv_ref.flow import (
    flow_loss,
    interpolate,
    sample_timesteps,
    schedule,
    shift_time,
    velocity_target,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_path_goes_from_noise_to_data() -> None:
    data, noise = normal(3, 2, 4, 5, 5), normal(3, 2, 4, 5, 5, seed=1)
    assert torch.equal(interpolate(data, noise, torch.zeros(3)), noise)
    assert torch.equal(interpolate(data, noise, torch.ones(3)), data)
    middle = interpolate(data, noise, torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(middle[0], 0.25 * data[0] + 0.75 * noise[0])
    assert torch.equal(middle[2], data[2])


def test_target_is_the_slope_of_the_path() -> None:
    data, noise = normal(2, 3), normal(2, 3, seed=1)
    t, dt = torch.tensor([0.3, 0.7], dtype=torch.float64), 1e-3
    slope = (interpolate(data, noise, t + dt) - interpolate(data, noise, t)) / dt
    torch.testing.assert_close(velocity_target(data, noise), slope, rtol=1e-9, atol=1e-9)


def test_loss_ignores_given_frames() -> None:
    prediction, target = normal(2, 3, 4, 2, 2), normal(2, 3, 4, 2, 2, seed=1)
    given_frames = torch.tensor([[True, False, False], [False, False, False]])
    loss = flow_loss(prediction, target, given_frames)
    wanted = [(prediction[0, 1:] - target[0, 1:]).square().mean(), (prediction[1] - target[1]).square().mean()]
    torch.testing.assert_close(loss.double(), torch.stack(wanted), rtol=1e-6, atol=0)
    prediction[0, 0] = 1e6
    assert torch.equal(flow_loss(prediction, target, given_frames), loss)


def test_loss_of_a_wholly_given_clip_is_zero() -> None:
    assert (
        flow_loss(normal(1, 2, 1, 1, 1), normal(1, 2, 1, 1, 1, seed=1), torch.ones(1, 2, dtype=torch.bool)).item() == 0
    )


@given(t=st.floats(0, 1), shift=st.floats(0.1, 10))
def test_shift_is_that_of_sigma(t: float, shift: float) -> None:
    """Stable Diffusion 3, eq. 23, in its own variable sigma = 1 - t: shift * sigma / (1 + (shift - 1) * sigma)."""
    sigma = 1 - t
    wanted = 1 - shift * sigma / (1 + (shift - 1) * sigma)
    got = shift_time(torch.tensor(t, dtype=torch.float64), shift).item()
    assert got == pytest.approx(wanted, abs=1e-12)


@given(steps=st.integers(1, 200), shift=st.floats(0.1, 10), stretch=st.floats(1, 10))
def test_schedule_rises_from_0_to_1(steps: int, shift: float, stretch: float) -> None:
    times = schedule(steps, shift, stretch)
    assert times.dtype == torch.float64
    assert len(times) == steps + 1
    assert times[0] == 0
    assert times[-1] == 1
    assert (times.diff() > 0).all()


def test_schedule_without_shift_is_even() -> None:
    torch.testing.assert_close(schedule(4), torch.tensor([0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    assert schedule(4, 3.0)[2] == pytest.approx(0.25)  # 0.5 / (0.5 + 3 * 0.5)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        schedule(steps)


N = 20_000


def kolmogorov(values: torch.Tensor, cdf: torch.Tensor) -> float:
    """Largest distance of the empirical distribution of ``values`` to ``cdf`` at the sorted values."""
    return (torch.arange(1, len(values) + 1) / len(values) - cdf).abs().max().item()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("logit_normal", [True, False])
def test_timesteps_follow_their_distribution(logit_normal: bool, shift: float) -> None:
    drawn = sample_timesteps(N, logit_normal=logit_normal, shift=shift, generator=torch.Generator().manual_seed(0))
    values = drawn.double().sort().values
    assert 0 <= values[0] < values[-1] <= 1
    unshifted = shift * values / (1 + (shift - 1) * values)  # inverse of t / (t + shift (1 - t))
    cdf = torch.special.ndtr(torch.logit(unshifted)) if logit_normal else unshifted
    assert kolmogorov(values, cdf) < 1.95 / math.sqrt(N)  # p = 0.001


def test_timesteps_are_seeded() -> None:
    first, second, other = (
        sample_timesteps(8, logit_normal=True, shift=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
