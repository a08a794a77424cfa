"""RoPE against rotation by complex numbers, and its defining property: scores depend on relative positions only."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.stiv_ref.rope import positions, rotate, spatial_table, temporal_table

DIM, THETA = 16, 50.0
ROUNDING = 4 * 2.0**-24  # of an fp32 cosine or sine, which the tables hold, with room for a product of two


def complex_rotation(x: np.ndarray, position: np.ndarray, theta: float = THETA) -> np.ndarray:
    """Turn the complex pairs (i, i + N/2) of ``x`` [..., N] by position * theta^(-i / pairs), in fp64."""
    pairs = x.shape[-1] // 2
    z = x[..., :pairs] + 1j * x[..., pairs:]
    z = z * np.exp(1j * position[..., None] * theta ** (-np.arange(pairs) / pairs))
    return np.concatenate((z.real, z.imag), axis=-1)


def complex_rotation_2d(x: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Pairs 0..N/4-1 turn with the row, the others with the column; each half has its own frequencies."""
    quarter = x.shape[-1] // 4
    order = np.arange(x.shape[-1]).reshape(4, quarter)
    by_row, by_column = order[[0, 2]].ravel(), order[[1, 3]].ravel()
    out = np.empty_like(x)
    out[..., by_row] = complex_rotation(x[..., by_row], row)
    out[..., by_column] = complex_rotation(x[..., by_column], column)
    return out


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(frames=st.integers(1, 12), base=st.integers(1, 12))
def test_temporal_rotation_is_complex_multiplication(frames: int, base: int) -> None:
    x = normal(2, frames, DIM)
    got = rotate(x, *(table.double() for table in temporal_table(frames, DIM, base, THETA)))
    position = np.arange(frames) * min(1.0, base / frames)
    np.testing.assert_allclose(got, complex_rotation(x.numpy(), position), atol=ROUNDING * float(x.abs().max()) * 2)


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), base=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_spatial_rotation_is_complex_multiplication(rows: int, columns: int, base: tuple[int, int]) -> None:
    x = normal(rows * columns, DIM)
    got = rotate(x, *(table.double() for table in spatial_table((rows, columns), DIM, base, THETA)))
    row, column = (place.ravel().astype(float) for place in np.indices((rows, columns)))
    wanted = complex_rotation_2d(x.numpy(), row * min(1, base[0] / rows), column * min(1, base[1] / columns))
    np.testing.assert_allclose(got, wanted, atol=ROUNDING * float(x.abs().max()) * 2)


def test_rotation_keeps_norms_and_dtype() -> None:
    x = normal(3, 7, DIM)
    cos, sin = temporal_table(7, DIM, 7, THETA)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(rotate(x, cos.double(), sin.double()).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert rotate(x.half(), cos.half(), sin.half()).dtype == torch.float16


def test_temporal_scores_depend_on_the_distance_only() -> None:
    q, k = normal(DIM), normal(DIM, seed=1)
    cos, sin = (table.double() for table in temporal_table(9, DIM, 9, THETA))
    scores = rotate(q.expand(9, DIM), cos, sin) @ rotate(k.expand(9, DIM), cos, sin).T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1  # and they do depend on it


def test_spatial_scores_depend_on_both_distances_only() -> None:
    rows, columns = 4, 5
    q, k = normal(DIM), normal(DIM, seed=1)
    tables = [table.double() for table in spatial_table((rows, columns), DIM, (rows, columns), THETA)]
    q_all, k_all = (rotate(x.expand(rows * columns, DIM), *tables) for x in (q, k))
    scores = (q_all @ k_all.T).reshape(rows, columns, rows, columns)
    for row, column in [(0, 1), (1, 0), (2, 3), (1, 1)]:
        here, there = scores[0, 0, row, column], scores[1, 1, 1 + row, 1 + column]
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    assert (scores[0, 0, 1, 0] - scores[0, 0, 0, 1]).abs() > 1e-3  # a row is not a column


@pytest.mark.parametrize(("size", "base", "last"), [(8, 8, 7.0), (4, 8, 3.0), (16, 8, 7.5), (1, 8, 0.0)])
def test_positions_are_squeezed_only_beyond_the_base(size: int, base: int, last: float) -> None:
    got = positions(size, base)
    assert got.dtype == torch.float64
    assert got[0] == 0
    assert got[-1].item() == last
