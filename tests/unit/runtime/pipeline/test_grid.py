"""Several clips as one: where they and their labels stand, and how large the whole is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.pipeline.grid import BACKGROUND, GAP, LABEL, columns_of, fitted, grid, grid_sides, grid_upscale

RED, BLUE = (255, 0, 0), (0, 0, 255)
FONT = ImageFont.load_default(LABEL - 12)


def clip(*colors: tuple[int, int, int]) -> np.ndarray:
    """A clip of 8x8 pixels, one frame of each color."""
    return np.broadcast_to(np.array(colors, np.uint8)[:, None, None], (len(colors), 8, 8, 3))


def test_clips_stand_in_rows_and_are_enlarged() -> None:
    clips = [clip(RED, BLUE), clip(BLUE, RED), clip(RED, RED)]
    frames = grid(clips, ["", "", ""], 5)
    assert frames.shape == (2, *grid_sides(3, 40, 40), 3)
    for index, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        left, top = GAP + column * (40 + GAP), GAP + row * (40 + LABEL + GAP)
        for time, frame in enumerate(frames):
            assert (frame[top : top + 40, left : left + 40] == clips[index][time, 0, 0]).all()
    assert (frames[0, -GAP:] == BACKGROUND).all()
    assert (frames[0, 2 * GAP + 40 + LABEL :, 2 * GAP + 40 :] == BACKGROUND).all()


def test_labels_stand_under_their_clips_within_their_width() -> None:
    wide = np.zeros((1, 8, 32, 3), np.uint8)
    frame = grid([wide, wide], ["", "digit three moving right and on and on and on"], 5, columns=2)[0]
    ink = np.argwhere((frame != BACKGROUND).any(axis=-1) & (frame != 0).any(axis=-1))
    top, left = GAP + 40, GAP + 160 + GAP
    assert top <= ink[:, 0].min() <= ink[:, 0].max() < top + LABEL
    assert left <= ink[:, 1].min() <= ink[:, 1].max() < left + 160


@given(st.text(max_size=60), st.integers(0, 300))
@settings(deadline=None)
def test_a_label_is_whole_or_ends_in_dots_and_fits(label: str, width: int) -> None:
    label = " ".join(label.split())
    shown = fitted(label, FONT, width)
    assert FONT.getlength(shown) <= width
    assert shown in ("", label) or label.startswith(shown.removesuffix("..."))
    assert shown != "" or not label or FONT.getlength(label[0] + "...") > width


@given(st.integers(1, 1000))
def test_a_grid_has_room_for_all_and_is_about_square(count: int) -> None:
    columns = columns_of(count)
    rows = -(-count // columns)
    assert rows * columns >= count
    assert 0 <= columns - rows <= 1


def test_clips_are_made_visible_as_far_as_the_whole_stays_small() -> None:
    assert grid_upscale(1, 32, 32) == grid_upscale(9, 32, 32) == 8
    assert grid_upscale(100, 32, 32) < 8
    assert grid_upscale(4, 256, 256) == 1
    assert grid_upscale(100, 32, 32, 3) == 3


def test_clips_of_two_shapes_are_none() -> None:
    with pytest.raises(OutputError, match="of one shape and a label each"):
        grid([clip(RED), clip(RED, BLUE)], ["", ""])
