"""Scene cuts: where the scenes were glued together, and where a person sees them in a real video."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.config import parse_config
from stiv_deploy.stiv_ref.data.decode import frames_of, probe
from stiv_deploy.stiv_ref.data.scenes import Detector, SceneCutter, SceneSettings
from stiv_deploy.stiv_ref.errors import ConfigError

pytest.importorskip("scenedetect", reason="the extra 'data' is not installed")


def scene(seed: int, frames: int) -> NDArray[np.uint8]:
    """Coloured tiles that move right by a pixel a frame, uint8 [F, 48, 64, 3]."""
    tiles = np.random.default_rng(seed).integers(0, 256, (6, 8 + frames // 8 + 1, 3), dtype=np.uint8)
    wide = tiles.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([wide[:, at : at + 64] for at in range(frames, 0, -1)])


def scenes_of(images: NDArray[np.uint8], fps: float = 25, **settings: object) -> list[tuple[int, int]]:
    cutter = SceneCutter(SceneSettings(**settings), fps)  # type: ignore[arg-type]
    for image in images:
        cutter.add(image)
    return cutter.scenes()


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_glued_scenes_are_cut_where_they_were_glued(detector: Detector) -> None:
    images = np.concatenate([scene(1, 20), scene(2, 31), scene(3, 25)])
    assert scenes_of(images, detector=detector) == [(0, 20), (20, 51), (51, 76)]


@settings(max_examples=15)
@given(st.lists(st.integers(18, 40), min_size=1, max_size=4))
def test_scenes_cover_all_frames_once(lengths: list[int]) -> None:
    images = np.concatenate([scene(seed, length) for seed, length in enumerate(lengths)])
    ends = np.cumsum(lengths).tolist()
    assert scenes_of(images) == list(zip([0, *ends[:-1]], ends, strict=True))


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_very_short_videos_are_one_scene(frames: int) -> None:
    assert scenes_of(scene(1, max(frames, 1))[:frames]) == [(0, frames)]


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_no_scene_is_shorter_than_asked(detector: Detector) -> None:
    """Two cuts 6 frames apart: at 25 fps both count for 0.2 s, one of them for 0.6 s."""
    images = np.concatenate([scene(1, 30), scene(2, 6), scene(3, 30)])
    assert len(scenes_of(images, detector=detector, min_seconds=0.2)) == 3
    assert len(scenes_of(images, detector=detector, min_seconds=0.6)) == 2


def test_threshold_decides() -> None:
    images = np.concatenate([scene(1, 20), scene(2, 20)])
    assert len(scenes_of(images, detector="content", threshold=250)) == 1
    assert len(scenes_of(images, detector="adaptive", threshold=200)) == 1


def test_adaptive_is_not_set_off_by_fast_motion() -> None:
    """A slow pan that is fast for a second: every frame of that changes as much as at a cut."""
    images = scene(1, 400)
    images = np.concatenate([images[:30], images[30:230:8], images[230:260]])
    assert len(scenes_of(images, detector="adaptive")) == 1
    assert len(scenes_of(images, detector="content")) > 1


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_real_video(real_clips: dict[str, Path], detector: Detector) -> None:
    """The cuts of 'bikes' were found by eye on a sheet of all its frames; the others are one shot each."""
    expected = {"bikes.mp4": [30, 76, 137, 187, 242], "bigbuckbunny.mp4": [], "carphone_pristine.mp4": []}
    for name, cuts in expected.items():
        info, cutter = probe(real_clips[name]), SceneCutter(SceneSettings(detector=detector), 25)
        for image in frames_of(real_clips[name], short_side=64):
            cutter.add(image)
        assert cutter.scenes() == list(zip([0, *cuts], [*cuts, info.frames], strict=True))


@pytest.mark.parametrize(
    "values", [{"detector": "magic"}, {"threshold": 0}, {"threshold": -1}, {"min_seconds": -1}, {"min_length": 3}]
)
def test_bad_settings(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"cuts: {next(iter(values))}"):
        parse_config(SceneSettings, values, "cuts")
