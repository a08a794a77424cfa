import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import ModelFacts
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.images import (
    Fit,
    check_given_frames,
    clip_from_images,
    fitted_image,
    frames_from_video,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def test_wrong_size_names_both_and_is_refused_by_default() -> None:
    with pytest.raises(RequestError, match=r"a.png is 12x8 \(width x height\), the video is 10x8; .* choose a fit: "):
        fitted_image(PIXELS, 8, 10, name="a.png")


@pytest.mark.parametrize("fit", list(Fit))
def test_equal_size_stays_as_it_is(fit: Fit) -> None:
    np.testing.assert_array_equal(fitted_image(PIXELS, 8, 12, fit), PIXELS)


def bars(height: int, width: int) -> np.ndarray:
    """Red in the left quarter, blue in the right one, white between."""
    image = np.full((height, width, 3), 255, dtype=np.uint8)
    image[:, : width // 4], image[:, -width // 4 :] = (255, 0, 0), (0, 0, 255)
    return image


def test_stretch_keeps_all_and_changes_the_shape() -> None:
    fitted = fitted_image(bars(40, 80), 40, 40, Fit.STRETCH)
    assert fitted.shape == (40, 40, 3)
    assert fitted[20, [0, 20, 39]].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_crop_cuts_both_sides_alike() -> None:
    fitted = fitted_image(bars(40, 80), 20, 20, Fit.CROP)  # half the size, of which the middle half is white
    assert fitted.shape == (20, 20, 3)
    assert (fitted[:, 2:-2] == 255).all()  # next to the edges the filter sees the colours outside
    turned = fitted_image(bars(40, 80).transpose(1, 0, 2), 20, 20, Fit.CROP)
    np.testing.assert_array_equal(turned, fitted.transpose(1, 0, 2))


@pytest.mark.parametrize(("height", "width", "black"), [(20, 40, np.s_[:5]), (40, 20, np.s_[:, :5])])
def test_pad_keeps_all_in_the_middle_of_black(height: int, width: int, black: tuple[slice, ...]) -> None:
    white = np.full((height, width, 3), 255, dtype=np.uint8)
    fitted = fitted_image(white, 20, 20, Fit.PAD)
    assert fitted.shape == (20, 20, 3)
    assert (fitted[black] == 0).all()
    np.testing.assert_array_equal(fitted, fitted[::-1, ::-1])
    share = min(height, width) / max(height, width)
    assert (fitted == 255).all(axis=-1).mean() == pytest.approx(share)


def test_pad_takes_the_background() -> None:
    fitted = fitted_image(np.zeros((20, 40, 3), np.uint8), 20, 20, Fit.PAD, background=(10, 20, 30))
    assert fitted[[0, 10, 19], 10].tolist() == [[10, 20, 30], [0, 0, 0], [10, 20, 30]]


def test_what_crop_cuts_off_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for height, width, cut in ((48, 96, "48 columns left and right"), (40, 20, "20 rows above and below"), (7, 7, "")):
        caplog.clear()
        fitted_image(np.zeros((height, width, 3), np.uint8), 20, 20, Fit.CROP, "a.png")
        assert [record.getMessage() for record in caplog.records] == (
            [f"a.png is {width}x{height}, the video 20x20: {cut} are cut off; the fit pad keeps them"] if cut else []
        )


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)), fit=st.sampled_from([Fit.STRETCH, Fit.CROP, Fit.PAD]))
def test_any_shape_can_be_fitted(size: tuple[int, int], fit: Fit) -> None:
    image = np.full((*size, 3), 90, dtype=np.uint8)
    fitted = fitted_image(image, 6, 16, fit)
    assert fitted.shape == (6, 16, 3)
    assert fitted.max() == 90  # a constant stays one under every filter


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
    check_given_frames(images, 9, causal)
    groups, clip = clip_from_images(images, causal)
    assert groups == latent_frames
    np.testing.assert_allclose((clip[:, 0, 0, 0] + 1) * 127.5, range(count), atol=1e-4)


@pytest.mark.parametrize("frames", [(1,), (0, 7), (0, 1), (0, 1, 2, 3), (1, 2, 3, 4, 5), (4, 8)])
def test_a_causal_vae_cannot_code_a_frame_without_those_before_it(causal: ModelFacts, frames: tuple[int, ...]) -> None:
    wanted = r"given for frames {}; .*give frame 0 alone, or the first 5, 9, \.\.\. frames"
    with pytest.raises(RequestError, match=wanted.format(", ".join(map(str, frames)))):
        check_given_frames(numbered(*frames), 9, causal)


def test_a_per_frame_vae_codes_any_frame(facts: ModelFacts) -> None:
    check_given_frames(numbered(1, 3), 9, facts)
    check_given_frames({}, 9, facts.model_copy(update={"temporal_factor": 4, "causal_vae": True}))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.integers(0, 255), min_size=1, max_size=6))
def test_pixels_survive_the_way_to_the_model_and_back(facts: ModelFacts, values: list[int]) -> None:
    images = {index: np.full((1, 2, 3), value, dtype=np.uint8) for index, value in enumerate(values)}
    _, clip = clip_from_images(images, facts)
    np.testing.assert_array_equal(frames_from_video(clip[None])[0], np.stack(list(images.values())))


def test_video_out_of_range_is_clipped() -> None:
    video = np.array([-3.0, -1.0, 0.0, 1.0, 7.0], dtype=np.float32).reshape(1, 5, 1, 1, 1).repeat(3, axis=2)
    assert frames_from_video(video)[0, :, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
