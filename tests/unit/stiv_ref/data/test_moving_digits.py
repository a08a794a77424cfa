"""The data: what moves is the caption's digit, the caption's way, at the stated speed, inside the canvas."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from stiv_deploy.stiv_ref.data import moving_digits
from stiv_deploy.stiv_ref.data.moving_digits import (
    DIGIT,
    DIGIT_WORDS,
    DIRECTIONS,
    SPEED,
    WORDS,
    Clips,
    MovingDigits,
    caption,
    handwriting,
    micro_conditions,
)
from stiv_deploy.stiv_ref.digit_canvas import SIZE

MOST = (SIZE - DIGIT) // SPEED + 1


@pytest.fixture(scope="module")
def clips() -> Clips:
    return MovingDigits("train").draw(80, 8, torch.Generator().manual_seed(0))


def test_shape_range_and_grey(clips: Clips) -> None:
    assert clips.video.shape == (80, 8, 3, SIZE, SIZE)
    assert clips.video.dtype == torch.float32
    assert clips.video.min() == -1
    assert clips.video.max() <= 1
    assert torch.equal(clips.video[:, :, 0], clips.video[:, :, 2])


def test_every_frame_is_the_last_one_moved_by_the_speed(clips: Clips) -> None:
    """Exactly: the digit that leaves nothing behind and loses no pixel stayed inside the canvas."""
    for video, direction in zip(clips.video, clips.directions, strict=True):
        rows, columns = DIRECTIONS[direction]
        for before, after in zip(video, video[1:], strict=False):
            assert torch.equal(after, before.roll((SPEED * rows, SPEED * columns), (-2, -1)))
        assert len({float(frame.sum()) for frame in video.double()}) == 1


def test_captions_tell_the_truth(clips: Clips) -> None:
    for text, digit, direction in zip(clips.captions, clips.digits, clips.directions, strict=True):
        assert text == f"digit {DIGIT_WORDS[digit]} moving {direction}"
    assert set(clips.directions) == set(DIRECTIONS)
    assert set(clips.digits) == set(range(10))
    assert set(" ".join(clips.captions).split()) <= set(WORDS)


def test_still_images_have_still_captions() -> None:
    still = MovingDigits("train").draw(3, 1, torch.Generator().manual_seed(0))
    assert still.video.shape[:2] == (3, 1)
    assert still.captions == [f"digit {DIGIT_WORDS[digit]}" for digit in still.digits]
    assert caption(3, None) == "digit three"


def test_the_picture_is_the_handwriting_sample() -> None:
    """Some 16x16 window of a still equals one of the split's images of that label (but for the range's rounding)."""
    data = MovingDigits("test")
    still = data.draw(10, 1, torch.Generator().manual_seed(2))
    for video, digit in zip(still.video, still.digits, strict=True):
        frame = (video[0, 0] + 1) / 2
        windows = frame.unfold(0, DIGIT, 1).unfold(1, DIGIT, 1).flatten(0, 1).flatten(1)
        same_label = data.images[torch.from_numpy(np.flatnonzero(data.labels == digit))].flatten(1)
        assert torch.cdist(windows, same_label, p=torch.inf).min() < 1e-6


def test_splits_are_disjoint_and_complete() -> None:
    train, test = MovingDigits("train"), MovingDigits("test")

    def keys(data: MovingDigits) -> set[bytes]:
        return {image.numpy().tobytes() for image in data.images}

    assert not keys(train) & keys(test)
    assert len(train.labels) + len(test.labels) == 1797
    assert len(test.labels) == 300
    assert set(test.labels) == set(range(10))


def test_draws_are_seeded() -> None:
    def draw(seed: int) -> Tensor:
        return MovingDigits("train").draw(4, 2, torch.Generator().manual_seed(seed)).video

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_most_frames_fit_and_one_more_is_refused() -> None:
    data = MovingDigits("test")
    assert data.draw(2, MOST, torch.Generator()).video.shape[1] == MOST
    with pytest.raises(
        ValueError, match=f"{MOST + 1} frames at 2 pixels a frame leave the canvas; there can be 1 to {MOST}"
    ):
        data.draw(2, MOST + 1, torch.Generator())


def test_micro_conditions() -> None:
    assert micro_conditions(2, 8).tolist() == [[32, 32, 0, 0, 1, 8]] * 2


def test_the_handwriting_is_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file read without it, or asked of it where there is no such file."""
    from sklearn.datasets import load_digits

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sklearn.datasets", None)  # to import it would raise
        read = handwriting()
    monkeypatch.setattr(moving_digits, "find_spec", lambda _: None)
    for found in (read, handwriting()):
        for part, wanted in zip(found, load_digits(return_X_y=True), strict=True):
            np.testing.assert_array_equal(part, wanted)
            assert part.dtype == wanted.dtype
