"""GIF and WebP: every frame is kept, whatever changes in it, and times add up."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stiv_deploy.runtime.pipeline.animations import write_gif, write_webp


def make_clip(frames: int) -> np.ndarray:
    """A grey square that moves right and grows brighter on black."""
    clip = np.zeros((frames, 12, 31, 3), np.uint8)
    for index in range(frames):
        clip[index, 3:9, 2 + 2 * index : 7 + 2 * index] = 100 + 5 * index
    return clip


WRITERS = {"gif": write_gif, "webp": write_webp}


def animation(folder: Path, kind: str, clip: np.ndarray, fps: float = 8) -> tuple[list[np.ndarray], list[int]]:
    """Frames, and milliseconds of each, of a file of ``clip``."""
    path = folder / f"clip.{kind}"
    WRITERS[kind](path, clip, fps, "comment")
    frames, times = [], []
    with Image.open(path) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            frames.append(np.asarray(image.convert("RGB")))
            times.append(image.info["duration"])
    return frames, times


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("fps", [0.5, 3, 8, 24000 / 1001, 30, 50])
def test_times_of_an_animation_add_up(tmp_path: Path, kind: str, fps: float) -> None:
    _, times = animation(tmp_path, kind, make_clip(frames=13), fps)
    tick = 10 if kind == "gif" else 1
    assert len(times) == 13
    assert np.abs(np.cumsum(times) - 1000 * np.arange(1, 14) / fps).max() <= tick / 2 + 1e-6


@pytest.mark.parametrize(("fps", "kept"), [(60, 10), (100, 6), (1000, 1)])
def test_a_fast_gif_is_thinned_to_what_players_show(tmp_path: Path, fps: float, kept: int) -> None:
    clip = make_clip(frames=13)
    frames, times = animation(tmp_path, "gif", clip, fps)
    assert len(frames) == kept
    assert min(times) >= (20 if kept > 1 else 10)
    assert sum(times) == pytest.approx(13_000 / fps, abs=5)
    assert np.array_equal(frames[0], clip[0])
    assert len(animation(tmp_path, "webp", clip, fps)[0]) == 13


@pytest.mark.parametrize("kind", WRITERS)
def test_a_still_clip_keeps_its_frames(tmp_path: Path, kind: str) -> None:
    clip = make_clip(frames=2)[[0, 0, 0, 1, 1, 0]]
    for frames in (clip, clip[:3], clip[:1]):
        assert np.array_equal(animation(tmp_path, kind, frames)[0], frames)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_few_pixels_is_kept(tmp_path: Path, data: st.DataObject) -> None:
    height, width = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    places = st.tuples(st.integers(0, height - 1), st.integers(0, width - 1), st.integers(0, 255))
    clip = np.zeros((4, height, width, 3), np.uint8)
    for frame in range(1, 4):
        clip[frame] = clip[frame - 1]
        for row, column, value in data.draw(st.lists(places, max_size=3)):
            clip[frame, row, column] = value
    for kind in WRITERS:
        assert np.array_equal(animation(tmp_path, kind, clip)[0], clip), kind
