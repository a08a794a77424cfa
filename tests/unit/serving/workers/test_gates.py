"""Videos that do not look like one."""

import numpy as np
import pytest

from stiv_deploy.serving.workers.gates import suspicions


@pytest.mark.parametrize(
    ("frames", "bright", "moving", "found"),
    [
        (3, 8, False, ["black", "frozen"]),
        (3, 9, False, ["frozen"]),
        (3, 200, True, []),
        (3, 8, True, ["black"]),
        (1, 200, False, []),
    ],
)
def test_black_and_frozen(frames: int, bright: int, moving: bool, found: list[str]) -> None:
    video = np.zeros((frames, 4, 4, 3), np.uint8)
    video[:, 1, 2] = bright
    if moving:
        video[-1, 3, 3, 0] = 5
    assert suspicions(video) == found
