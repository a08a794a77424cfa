"""Coverage of shapes, against counting points, and that a pixel does not depend on the others."""

import numpy as np
import pytest

from stiv_deploy.stiv_ref.data.world.shapes import REACH, coverage
from stiv_deploy.stiv_ref.world_settings import SHAPES, Shape

R = np.float32(9.3)


def grid(side: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    places = ((np.arange(side) + 0.5) * step - side * step / 2).astype(np.float32)
    return places[None, :], places[:, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_the_share_of_points_inside(shape: Shape) -> None:
    fine = coverage(shape, *grid(32 * 8, 1 / 8), R / 1)
    inside = (fine > 0.5).reshape(32, 8, 32, 8).mean((1, 3))
    coarse = coverage(shape, *grid(32, 1), R)
    # One distance a pixel stands for the edge in it: at corners that is a quarter of a pixel off.
    assert np.abs(coarse - inside).max() < 0.4
    assert coarse.sum() == pytest.approx(inside.sum(), rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_within_its_reach_and_different_from_the_others(shape: Shape) -> None:
    x, y = grid(64, 1)
    here = coverage(shape, x, y, R)
    outside = (np.abs(x) > REACH * R + 1) | (np.abs(y) > REACH * R + 1)
    assert not here[outside].any()
    for other in set(SHAPES) - {shape}:
        there = coverage(other, x, y, R)
        assert np.minimum(here, there).sum() / np.maximum(here, there).sum() < 0.85


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_the_rest_of_the_array(shape: Shape) -> None:
    x, y = grid(33, 1)
    whole = coverage(shape, x, y, R)
    assert np.array_equal(whole[5:12, 3:20], coverage(shape, x[:, 3:20].copy(), y[5:12].copy(), R))
