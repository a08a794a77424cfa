from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import ModelFacts
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.images import (
    check_given_frames,
    clip_from_images,
    fitted_image,
    frames_from_video,
    given_images,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def test_array_picture_and_file_are_the_same_image(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    for image in (PIXELS, Image.fromarray(PIXELS), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(fitted_image(image, 8, 12), PIXELS)


def test_grey_and_transparent_pictures_become_rgb() -> None:
    for mode in ("L", "RGBA", "P", "1"):
        assert fitted_image(Image.new(mode, (12, 8)), 8, 12).shape == (8, 12, 3)


def test_wrong_size_names_both_and_is_not_resized(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    with pytest.raises(RequestError, match=r"a.png is 12x8 \(width x height\), the video is 8x8; .*allow resizing"):
        fitted_image(path, 8, 8)
    assert fitted_image(path, 4, 6, resize=True).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(np.float32), r"float32 \[8, 12, 3\]; give uint8"),
        (PIXELS[..., 0], r"uint8 \[8, 12\]; give uint8 \[height, width, 3\]"),
        (3.5, "cannot use a float as an image"),
    ],
)
def test_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fitted_image(image, 8, 12)


def test_unreadable_files(tmp_path: Path) -> None:
    text, cut = tmp_path / "a.txt", tmp_path / "cut.png"
    text.write_text("no image")
    Image.fromarray(PIXELS).save(cut)
    cut.write_bytes(cut.read_bytes()[:60])
    for path in (text, cut, tmp_path / "missing.png", tmp_path):
        with pytest.raises(RequestError, match=path.name) as caught:
            fitted_image(path, 8, 12)
        assert "\n" not in str(caught.value)


def test_one_image_is_the_first_frame() -> None:
    assert given_images(None, 4, 8, 12) == {}
    assert list(given_images(PIXELS, 4, 8, 12)) == [0]
    assert list(given_images({0: PIXELS, -1: PIXELS}, 4, 8, 12)) == [0, 3]


@pytest.mark.parametrize("index", [4, -5])
def test_frame_outside_the_video(index: int) -> None:
    with pytest.raises(RequestError, match=f"image for frame {index}, but the video has frames 0 to 3"):
        given_images({index: PIXELS}, 4, 8, 12)


def test_frame_that_is_no_number() -> None:
    with pytest.raises(RequestError, match="images are given by frame number, got 'first'"):
        given_images({"first": PIXELS}, 4, 8, 12)  # type: ignore[dict-item]


@pytest.fixture
def facts(toy_bundle: Bundle) -> ModelFacts:
    """Facts of a model whose VAE codes every frame on its own."""
    return toy_bundle.manifest.model


@pytest.fixture
def causal(facts: ModelFacts) -> ModelFacts:
    """Facts of a model with a causal VAE of 4 frames a latent frame."""
    return facts.model_copy(update={"temporal_factor": 4, "causal_vae": True})


def numbered(*frames: int) -> dict[int, np.ndarray]:
    return {index: np.full((2, 2, 3), index, dtype=np.uint8) for index in frames}


def test_clip_of_a_per_frame_vae_holds_the_images_only(facts: ModelFacts) -> None:
    groups, clip = clip_from_images(numbered(5, 0), facts)
    assert groups == [0, 5]
    assert clip.shape == (2, 3, 2, 2)
    np.testing.assert_allclose(clip[:, 0, 0, 0], [-1, 5 / 127.5 - 1], rtol=1e-6)


def test_clip_of_a_temporal_vae_fills_groups_with_the_nearest_image(facts: ModelFacts) -> None:
    groups, clip = clip_from_images(numbered(0, 9, 11), facts.model_copy(update={"temporal_factor": 4}))
    assert groups == [0, 2]
    np.testing.assert_allclose((clip[:, 0, 0, 0] + 1) * 127.5, [0, 0, 0, 0, 9, 9, 9, 11], atol=1e-4)


@pytest.mark.parametrize(("count", "latent_frames"), [(1, [0]), (5, [0, 1]), (9, [0, 1, 2])])
def test_clip_of_a_causal_vae_is_the_first_frames(causal: ModelFacts, count: int, latent_frames: list[int]) -> None:
    images = numbered(*reversed(range(count)))
    check_given_frames(images, causal)
    groups, clip = clip_from_images(images, causal)
    assert groups == latent_frames
    np.testing.assert_allclose((clip[:, 0, 0, 0] + 1) * 127.5, range(count), atol=1e-4)


@pytest.mark.parametrize("frames", [(1,), (0, 7), (0, 1), (0, 1, 2, 3), (1, 2, 3, 4, 5), (4, 8)])
def test_a_causal_vae_cannot_code_a_frame_without_those_before_it(causal: ModelFacts, frames: tuple[int, ...]) -> None:
    wanted = r"given for frames {}; .*give frame 0 alone, or the first 5, 9, \.\.\. frames"
    with pytest.raises(RequestError, match=wanted.format(", ".join(map(str, frames)))):
        check_given_frames(numbered(*frames), causal)


def test_a_per_frame_vae_codes_any_frame(facts: ModelFacts) -> None:
    check_given_frames(numbered(1, 3), facts)
    check_given_frames({}, facts.model_copy(update={"temporal_factor": 4, "causal_vae": True}))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.integers(0, 255), min_size=1, max_size=6))
def test_pixels_survive_the_way_to_the_model_and_back(facts: ModelFacts, values: list[int]) -> None:
    images = {index: np.full((1, 2, 3), value, dtype=np.uint8) for index, value in enumerate(values)}
    _, clip = clip_from_images(images, facts)
    np.testing.assert_array_equal(frames_from_video(clip[None])[0], np.stack(list(images.values())))


def test_video_out_of_range_is_clipped() -> None:
    video = np.array([-3.0, -1.0, 0.0, 1.0, 7.0], dtype=np.float32).reshape(1, 5, 1, 1, 1).repeat(3, axis=2)
    assert frames_from_video(video)[0, :, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
