"""The README's picture: where clips and labels stand in it, and what its file is."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

BenchmarkModule = Callable[[str], ModuleType]
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def script(benchmark_module: BenchmarkModule) -> ModuleType:
    return benchmark_module("clip_grid")


def clip(*colors: tuple[int, int, int]) -> np.ndarray:
    """A clip of 8x8 pixels, one frame of each color."""
    return np.broadcast_to(np.array(colors, np.uint8)[:, None, None], (len(colors), 8, 8, 3))


def corner(script: ModuleType, row: int, column: int) -> tuple[int, int]:
    """Left and top pixel of an 8x8 clip, enlarged 5 times."""
    return script.GAP + column * (40 + script.GAP), script.GAP + row * (40 + script.LABEL + script.GAP)


def test_clips_stand_in_rows_and_are_enlarged(script: ModuleType) -> None:
    clips = [clip(RED, BLUE), clip(BLUE, RED), clip(RED, RED)]
    pictures = script.grid(clips, ["", "", ""], 2, 5)
    assert len(pictures) == 2
    for index, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        left, top = corner(script, row, column)
        for time, picture in enumerate(pictures):
            part = np.asarray(picture.crop((left, top, left + 40, top + 40)))
            assert (part == clips[index][time, 0, 0]).all()
    assert pictures[0].getpixel(corner(script, 1, 1)) == script.BACKGROUND


def test_labels_stand_under_their_clips_within_their_width(script: ModuleType) -> None:
    longest = max(script.PROMPTS, key=len)
    wide = np.zeros((1, 8, 32, 3), np.uint8)
    picture = np.asarray(script.grid([wide, wide], ["", longest], 2, 5)[0])
    ink = np.argwhere((picture != script.BACKGROUND).any(axis=-1) & (picture != 0).any(axis=-1))
    top, left = script.GAP + 40, script.GAP + 160 + script.GAP
    assert ink[:, 0].min() >= top
    assert ink[:, 0].max() < top + script.LABEL
    assert ink[:, 1].min() >= left
    assert ink[:, 1].max() < left + 160


def test_the_file_is_an_endless_animation_that_waits_at_its_end(script: ModuleType, tmp_path: Path) -> None:
    pictures = script.grid([clip(RED, BLUE, RED)], ["red"], 1, 5)
    script.write_gif(tmp_path / "clips.gif", pictures, fps=8)
    with Image.open(tmp_path / "clips.gif") as image:
        durations, colors = [], []
        for index in range(image.n_frames):
            image.seek(index)
            durations.append(image.info["duration"])
            colors.append(image.convert("RGB").getpixel(corner(script, 0, 0)))
        assert image.info["loop"] == 0
    assert durations == [120, 120, script.HOLD_MS]  # GIF counts hundredths of a second
    assert colors == [RED, BLUE, RED]


def test_every_digit_is_shown_once(script: ModuleType) -> None:
    digits = [prompt.split()[1] for prompt in script.PROMPTS]
    assert len(set(digits)) == len(digits) == 10
