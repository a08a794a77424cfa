"""Rotary position embedding: 1D over frames, 2D over a frame's rows and columns.

Source: RoFormer (arXiv 2104.09864) for the rotation; STIV (arXiv 2412.07730) uses it in 2D on spatial and in 1D on
temporal attention, with interpolated positions on larger grids. Pairs are (i, i + Dh/2), the "rotate half" layout.
"""

import torch
from torch import Tensor


def positions(size: int, base: int) -> Tensor:
    """Positions 0..size-1, fp64 [size]; beyond ``base`` they are squeezed into the trained range: pos * base / size."""
    return torch.arange(size, dtype=torch.float64) * min(1.0, base / size)


def _angles(position: Tensor, pairs: int, theta: float) -> Tensor:
    """Rotation angles [N, pairs] of ``position`` [N]: position * theta^(-i / pairs)."""
    frequency = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return position[:, None] * frequency


def temporal_table(frames: int, head_dim: int, base: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, fp32 [frames, head_dim / 2], for attention across frames."""
    angle = _angles(positions(frames, base), head_dim // 2, theta)
    return angle.cos().float(), angle.sin().float()


def spatial_table(grid: tuple[int, int], head_dim: int, base: tuple[int, int], theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, fp32 [rows * columns, head_dim / 2].

    The first half of the pairs rotates with the row, the second half with the column.
    """
    rows, columns = grid
    row = _angles(positions(rows, base[0]), head_dim // 4, theta)
    column = _angles(positions(columns, base[1]), head_dim // 4, theta)
    angle = torch.cat(
        (row.repeat_interleave(columns, dim=0), column.repeat(rows, 1)), dim=1
    )  # (rows * columns, Dh / 2)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [..., N, Dh] by the tables [N, Dh / 2]; the dtype is kept."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
