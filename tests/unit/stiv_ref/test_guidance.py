"""Guidance rules as algebra, and the renormalization."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stiv_deploy.stiv_ref.guidance import cfg_renorm, jit_cfg, sit_cfg

scales = st.floats(-10, 10)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 4, 2, 2)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


COND, IMAGE, NULL = normal(0), normal(1), normal(2)


@given(s=scales)
def test_jit_is_the_weighted_sum(s: float) -> None:
    torch.testing.assert_close(jit_cfg(COND, NULL, s), s * COND + (1 - s) * NULL, rtol=0, atol=1e-13 * (1 + abs(s)))


@given(text=scales, image=scales)
def test_sit_is_the_weighted_sum(text: float, image: float) -> None:
    wanted = text * COND + (image - text) * IMAGE + (1 - image) * NULL
    torch.testing.assert_close(sit_cfg(COND, IMAGE, NULL, text, image), wanted, rtol=0, atol=1e-12 * (1 + abs(text)))


@given(s=scales)
def test_sit_with_equal_scales_is_jit(s: float) -> None:
    """u + s (i - u) + s (c - i) = u + s (c - u): the image-only branch cancels."""
    got = sit_cfg(COND, IMAGE, NULL, s, s)
    torch.testing.assert_close(got, jit_cfg(COND, NULL, s), rtol=0, atol=1e-12 * (1 + abs(s)))


def test_scale_one_and_zero() -> None:
    torch.testing.assert_close(jit_cfg(COND, NULL, 1.0), COND)
    torch.testing.assert_close(jit_cfg(COND, NULL, 0.0), NULL)
    torch.testing.assert_close(sit_cfg(COND, IMAGE, NULL, 1.0, 1.0), COND)
    torch.testing.assert_close(sit_cfg(COND, IMAGE, NULL, 0.0, 1.0), IMAGE)
    torch.testing.assert_close(sit_cfg(COND, IMAGE, NULL, 0.0, 0.0), NULL)


MASKS = [[[False] * 3] * 2, [[True, False, False], [False] * 3], [[True, False, True], [False, True, True]]]


@pytest.mark.parametrize("mask", MASKS)
def test_renorm_keeps_the_direction_and_takes_the_conditional_norm_of_generated_frames(mask: list[list[bool]]) -> None:
    frame_mask = torch.tensor(mask)
    guided = jit_cfg(COND, NULL, 5.0)
    got = cfg_renorm(guided, COND, frame_mask)
    for sample in range(2):
        generated = ~frame_mask[sample]
        torch.testing.assert_close(got[sample, generated].norm(), COND[sample, generated].norm())
        ratio = (got / guided)[sample]
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))
        assert ratio.flatten()[0] > 0


def test_renorm_ignores_given_frames() -> None:
    frame_mask = torch.tensor(MASKS[1])
    guided, conditional = normal(3), COND.clone()
    before = cfg_renorm(guided, conditional, frame_mask)
    guided, conditional = guided.clone(), conditional.clone()
    guided[0, 0] *= 50
    conditional[0, 0] *= 0.01
    after = cfg_renorm(guided, conditional, frame_mask)
    torch.testing.assert_close(after[0, 1:], before[0, 1:])
    torch.testing.assert_close(after[1], before[1])


def test_renorm_of_zero_velocity_is_finite() -> None:
    zero = torch.zeros(1, 2, 1, 1, 1)
    assert torch.equal(cfg_renorm(zero, zero + 1, torch.zeros(1, 2, dtype=torch.bool)), zero)


def test_renorm_of_a_zero_velocity_is_zero() -> None:
    conditional, mask = torch.full((1, 2, 4, 8, 8), 9.0), torch.zeros(1, 2, dtype=torch.bool)
    assert torch.equal(cfg_renorm(torch.zeros_like(conditional), conditional, mask), torch.zeros_like(conditional))
