"""The scorers that judge generated clips are judged on real ones first, and on clips that are wrong on purpose."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from stiv_deploy.stiv_ref.data.moving_digits import Clips, MovingDigits

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def scorers() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import scorers
    finally:
        sys.path.remove(str(BENCHMARKS))
    return scorers


@pytest.fixture(scope="module")
def clips() -> Clips:
    return MovingDigits("test").draw(100, 8, torch.Generator().manual_seed(3))


def test_real_test_clips_are_recognized(scorers: ModuleType, clips: Clips) -> None:
    """What is wanted of a judge: at least 97 % of digits and 99 % of directions of clips it has never seen."""
    video = scorers.brightness(clips.video.numpy())
    scores = scorers.percentages(scorers.judge(video, clips.digits, clips.directions))
    assert scores["digit"] >= 97
    assert scores["direction"] >= 99


def test_position_does_not_matter(scorers: ModuleType) -> None:
    image = MovingDigits("test").images[5].numpy()
    digits = set()
    for top, left in ((0, 0), (16, 16), (0, 16), (7, 9)):
        frame = np.zeros((32, 32), np.float32)
        frame[top : top + 16, left : left + 16] = image
        digits.add(scorers.digit_scorer().digit(frame[None]))
    assert len(digits) == 1


def test_dimness_and_background_ripple_do_not_matter(scorers: ModuleType, clips: Clips) -> None:
    ripple = np.random.default_rng(0).uniform(0, 0.1, (20, 8, 32, 32)).astype(np.float32)
    video = 0.8 * scorers.brightness(clips.video.numpy()[:20]) + ripple
    scores = scorers.percentages(scorers.judge(video, clips.digits[:20], clips.directions[:20]))
    assert scores["digit"] >= 95
    assert scores["direction"] == 100


def test_wrong_labels_score_wrong(scorers: ModuleType, clips: Clips) -> None:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    video = scorers.brightness(clips.video.numpy()[:20])
    wrong_digits = [(digit + 1) % 10 for digit in clips.digits[:20]]
    judged = scorers.judge(video, wrong_digits, [opposite[way] for way in clips.directions[:20]])
    scores = scorers.percentages(judged)
    assert scores["direction"] == 0
    assert scores["digit"] <= 5
    assert scores["both"] == 0


def test_reversed_clips_move_the_other_way(scorers: ModuleType, clips: Clips) -> None:
    clip = scorers.brightness(clips.video.numpy()[0])
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert scorers.direction(clip[::-1]) == opposite[scorers.direction(clip)]


def test_empty_clips_have_no_direction(scorers: ModuleType) -> None:
    assert scorers.direction(np.zeros((8, 32, 32), np.float32)) is None
    assert scorers.digit_scorer().digit(np.zeros((1, 32, 32), np.float32)) in range(10)
    [judged] = scorers.judge(np.zeros((1, 8, 32, 32), np.float32), [0], ["up"])
    assert not judged.direction_right


def test_stills_are_scored_without_direction(scorers: ModuleType) -> None:
    data = MovingDigits("test")
    stills = [np.pad(image, 8)[None] for image in data.images.numpy()]
    judged = scorers.judge(stills, data.labels.tolist(), [None] * len(stills))
    assert scorers.percentages(judged, moving=False) == {"digit": pytest.approx(98.5, abs=1.5)}
