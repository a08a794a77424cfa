"""Scores of clips by their properties: stillness, known speed, blur; and thresholds."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from stiv_deploy.stiv_ref.config import parse_config
from stiv_deploy.stiv_ref.data.clips import Clip
from stiv_deploy.stiv_ref.data.decode import frames_of
from stiv_deploy.stiv_ref.data.filters import Meter, Thresholds, sharpness
from stiv_deploy.stiv_ref.errors import ConfigError

pytest.importorskip("cv2", reason="the extra 'data' is not installed")

Pixels = NDArray[np.uint8]


def smooth_texture(seed: int, height: int, width: int) -> Pixels:
    """Soft random blobs with enough contrast to follow, RGB uint8 [H, W, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)))


def sliding(seed: int, frames: int, speed: int, height: int = 96, width: int = 128) -> list[Pixels]:
    wide = smooth_texture(seed, height, width + speed * frames)
    return [np.ascontiguousarray(wide[:, speed * at : speed * at + width]) for at in range(frames)]


def scores(images: list[Pixels], fps: float = 25) -> tuple[float, float]:
    meter = Meter(fps)
    for image in images:
        meter.add(image)
    return meter.of_scene(0, len(images))


@given(st.integers(0, 99), st.sampled_from([1, 5, 10, 25, 60]))
@settings(max_examples=15)
def test_a_still_clip_has_no_motion(seed: int, fps: int) -> None:
    assert scores([smooth_texture(seed, 64, 80)] * 12, fps)[0] == 0


@pytest.mark.parametrize("fps", [8, 25, 60])
@pytest.mark.parametrize("speed", [1, 2, 3])
def test_motion_is_the_speed(speed: int, fps: int) -> None:
    """Pixels a frame, of 96, times frames a second. The flow errs by some percent, most where things enter."""
    assert scores(sliding(1, 20, speed), fps)[0] == pytest.approx(100 * speed / 96 * fps, rel=0.1)


def test_motion_does_not_depend_on_frame_rate_or_resolution() -> None:
    """The same movement, 24 pixels of 96 a second, filmed with twice the frames, and at twice the size.

    Enlarged blobs are flat inside, so that the flow is less sure there; per frame or in pixels it would be twice that.
    """
    large = [np.asarray(Image.fromarray(each).resize((256, 192))) for each in sliding(3, 24, 2)]
    for images, fps in ((sliding(3, 24, 2), 12), (sliding(3, 48, 1), 24), (large, 12)):
        assert scores(images, fps)[0] == pytest.approx(25, rel=0.15)


def test_motion_is_not_noise_nor_light_nor_contrast() -> None:
    """Why it is optical flow: the difference of frames ranks these the other way round."""
    still, rng = smooth_texture(1, 96, 128), np.random.default_rng(0)
    noisy = [np.clip(still + rng.normal(0, 4, still.shape), 0, 255).astype(np.uint8) for _ in range(12)]
    flicker = [np.clip(still * (1 + 0.04 * (at % 2)), 0, 255).astype(np.uint8) for at in range(12)]
    pale = [(each * 0.2 + 100).astype(np.uint8) for each in sliding(1, 12, 1)]
    difference = [
        np.mean([np.abs(a.astype(int) - b).mean() for a, b in pairwise(each)]) for each in (noisy, flicker, pale)
    ]
    assert difference[2] < min(difference[:2])
    assert scores(pale)[0] > 5 * max(scores(noisy)[0], scores(flicker)[0])


def test_tiny_pictures_have_motion_too() -> None:
    assert scores(sliding(1, 12, 1, height=8, width=12))[0] > 10
    assert scores([smooth_texture(1, 1, 1)] * 3) == (0, 0)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), radius=st.floats(1, 6), kind=st.sampled_from(["gauss", "box"]))
def test_a_blurred_copy_is_less_sharp(seed: int, radius: float, kind: str) -> None:
    picture = Image.fromarray(smooth_texture(seed, 64, 64)[..., 0])
    blur = ImageFilter.GaussianBlur(radius) if kind == "gauss" else ImageFilter.BoxBlur(radius)
    assert sharpness(np.asarray(picture.filter(blur))) < sharpness(np.asarray(picture))


def test_sharpness_falls_with_the_radius(real_clips: dict[str, Path]) -> None:
    picture = Image.fromarray(next(frames_of(real_clips["carphone_pristine.mp4"]))).convert("L")
    falling = [
        sharpness(np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)))) for radius in (0, 0.5, 1, 2, 4, 8)
    ]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > 10 * falling[3]


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    """Against the five-point stencil written out, with mirrored edges as OpenCV has them."""
    grey = smooth_texture(5, 20, 30)[..., 0]
    around = np.pad(grey.astype(np.float64), 1, mode="reflect")
    centre = around[1:-1, 1:-1]
    laplacian = around[2:, 1:-1] + around[:-2, 1:-1] + around[1:-1, 2:] + around[1:-1, :-2] - 4 * centre
    assert sharpness(grey) == pytest.approx(laplacian.var(), rel=1e-12)


def test_a_bad_encoding_is_less_sharp(real_clips: dict[str, Path]) -> None:
    good, bad = (
        scores(list(frames_of(real_clips[f"carphone_{name}.mp4"]))[:30])[1] for name in ("pristine", "distorted")
    )
    assert bad < good / 2


def test_motion_across_a_cut_belongs_to_no_scene() -> None:
    meter = Meter(8)
    for image in [smooth_texture(1, 64, 64)] * 5 + [smooth_texture(2, 64, 64)] * 5:
        meter.add(image)
    assert meter.of_scene(0, 5)[0] == meter.of_scene(5, 10)[0] == 0
    assert meter.of_scene(0, 10)[0] > 0


def clip(**changes: object) -> Clip:
    values = {"file": "a.mp4", "start": 0, "end": 50, "fps": 25, "width": 640, "height": 360}
    return Clip.model_validate(values | {"motion": 10, "sharpness": 100} | changes)


@pytest.mark.parametrize(
    ("limit", "bad", "reason"),
    [
        ({"min_seconds": 2.0}, {"end": 49}, "too short"),
        ({"max_seconds": 2.0}, {"end": 51}, "too long"),
        ({"min_side": 360}, {"height": 359}, "too small"),
        ({"min_side": 360}, {"height": 2000, "width": 359}, "too small"),
        ({"max_side": 360}, {"height": 361}, "too large"),
        ({"min_motion": 10}, {"motion": 9.99}, "too little motion"),
        ({"max_motion": 10}, {"motion": 10.01}, "too much motion"),
        ({"min_sharpness": 100}, {"sharpness": 99}, "too blurred"),
    ],
)
def test_thresholds(limit: dict[str, float], bad: dict[str, object], reason: str) -> None:
    thresholds = Thresholds.model_validate(limit)
    assert thresholds.reasons(clip()) == ()  # what is exactly at the limit is kept
    assert thresholds.reasons(clip(**bad)) == (reason,)


def test_all_reasons_are_given() -> None:
    thresholds = Thresholds(min_seconds=3, max_motion=1, min_sharpness=500)
    assert thresholds.reasons(clip()) == ("too short", "too much motion", "too blurred")
    assert Thresholds().reasons(clip(motion=0, sharpness=0)) == ()


@pytest.mark.parametrize(("mark", "reason"), [("interlaced", "interlaced"), ("hdr", "HDR")])
def test_marked_clips_are_kept_only_if_that_is_said(mark: str, reason: str) -> None:
    assert Thresholds().reasons(clip(**{mark: True})) == (reason,)
    assert Thresholds(min_seconds=3).reasons(clip(**{mark: True})) == (reason, "too short")
    assert Thresholds.model_validate({f"keep_{mark}": True}).reasons(clip(**{mark: True})) == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_seconds": 3, "max_seconds": 2}, "min_seconds 3.0 is greater than max_seconds 2.0"),
        ({"min_side": 300, "max_side": 200}, "min_side 300 is greater"),
        ({"min_motion": 3, "max_motion": 2}, "min_motion 3.0 is greater"),
        ({"min_motion": -1}, "min_motion"),
        ({"min_sharpness": float("nan")}, "min_sharpness"),
        ({"min_blur": 1}, "min_blur"),
    ],
)
def test_bad_thresholds(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(Thresholds, values, "thresholds")
