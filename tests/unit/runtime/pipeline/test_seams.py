"""Seams: the step where chunks meet, beside the steps inside of them."""

from pathlib import Path

import numpy as np
import pytest

from stiv_deploy.runtime.pipeline.seams import Seam, measured
from stiv_deploy.runtime.pipeline.timeline import Piece, Timeline


def timeline_of(folder: Path, *pieces: list[float]) -> Timeline:
    """Frames of one value each, piece after piece."""
    count, made = 0, []
    for number, values in enumerate(pieces):
        made.append(Piece(f"{number}.npy", tuple(range(count, count + len(values)))))
        count += len(values)
    timeline = Timeline(folder, made)
    for piece, values in zip(made, pieces, strict=True):
        timeline.keep(piece, np.array(values, np.float32)[:, None, None, None].repeat(4, axis=1))
    return timeline


@pytest.mark.parametrize(
    ("pieces", "seams"),
    [
        ([[0, 1, 2], [3, 4]], [Seam(3, 1.0)]),
        ([[0, 1, 2], [5, 6, 7], [7, 8]], [Seam(3, 3.0), Seam(6, 0.0)]),
        ([[0, 1, 2, 3]], []),
        ([[0], [2], [3]], [Seam(1, round(2 / 1.5, 4)), Seam(2, round(1 / 1.5, 4))]),
        ([[0]], []),
    ],
)
def test_steps_at_joints_by_the_usual_step(tmp_path: Path, pieces: list[list[float]], seams: list[Seam]) -> None:
    assert measured(timeline_of(tmp_path, *pieces)) == seams
