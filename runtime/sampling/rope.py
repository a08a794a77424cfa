"""Rotary tables, made once a request size: 1D over frames, 2D over a frame's rows and columns.

Source: RoFormer (arXiv 2104.09864); interpolated positions on larger grids as in STIV (arXiv 2412.07730). The layout
is "rotate half": the graphs rotate pairs (i, i + head_dim / 2).
"""

import numpy as np

from stiv_deploy.runtime.bundle.contract import ModelFacts


def positions(size: int, base: int) -> np.ndarray:
    """Positions 0..size-1, fp64 [size]; beyond ``base`` they are squeezed into the trained range: pos * base / size."""
    return np.arange(size, dtype=np.float64) * min(1.0, base / size)


def _angles(position: np.ndarray, pairs: int, theta: float) -> np.ndarray:
    """Rotation angles [N, pairs] of ``position`` [N]: position * theta^(-i / pairs)."""
    frequency = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    return position[:, None] * frequency


def _tables(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def temporal_table(frames: int, head_dim: int, base: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine tables, fp32 [frames, head_dim / 2], for attention across frames."""
    return _tables(_angles(positions(frames, base), head_dim // 2, theta))


def spatial_table(
    grid: tuple[int, int], head_dim: int, base: tuple[int, int], theta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine tables, fp32 [rows * columns, head_dim / 2].

    The first half of the pairs rotates with the row, the second half with the column.
    """
    rows, columns = grid
    row = _angles(positions(rows, base[0]), head_dim // 4, theta)
    column = _angles(positions(columns, base[1]), head_dim // 4, theta)
    return _tables(np.concatenate((np.repeat(row, columns, axis=0), np.tile(column, (rows, 1))), axis=1))


def rope_tables(model: ModelFacts, dims: dict[str, int]) -> dict[str, np.ndarray]:
    """The rotary inputs of a block graph by name, for a request of these dimensions."""
    grid = (dims["latent_height"] // model.patch[1], dims["latent_width"] // model.patch[1])
    spatial = spatial_table(grid, model.head_dim, model.base_grid, model.rope_theta)
    tables = dict(zip(("spatial_cos", "spatial_sin"), spatial, strict=True))
    if model.temporal:
        temporal = temporal_table(dims["token_frames"], model.head_dim, model.base_frames, model.rope_theta)
        tables |= zip(("temporal_cos", "temporal_sin"), temporal, strict=True)
    return tables
