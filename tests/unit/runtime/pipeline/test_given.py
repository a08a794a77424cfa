"""Pictures and latents of a request: every form is the same value, JSON and back, and what is none is one line."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.given import LatentData, PictureData, PictureFile, as_latents, as_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def png(pixels: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_array_picture_contents_and_file_are_the_same_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    for image in (PIXELS, Image.fromarray(PIXELS), png(), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(as_picture(image).load()[1], PIXELS)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_grey_and_transparent_pictures_become_rgb(mode: str) -> None:
    assert as_picture(Image.new(mode, (12, 8))).load()[1].shape == (8, 12, 3)


def test_a_file_is_not_read_before_it_is_needed() -> None:
    assert as_picture(Path("nowhere.png")) == PictureFile("nowhere.png")


def test_a_read_file_knows_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    read, _ = PictureFile(str(path)).load()
    assert read == PictureFile(str(path), hashlib.sha256(png()).hexdigest())
    assert read.load()[0] == read
    path.write_bytes(png(PIXELS[::-1].copy()))
    with pytest.raises(
        RequestError, match=r"a.png: not the picture that the request was made with .*SHA-256"
    ) as caught:
        read.load()
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no image")
    (tmp_path / "cut.png").write_bytes(png()[:60])
    for path in (tmp_path / "a.txt", tmp_path / "cut.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(RequestError, match=path.name) as caught:
            PictureFile(str(path)).load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(np.float32), "the image is of floats from 0 to 255; give 8 or 16 bits .* or floats from 0 to 1"),
        (PIXELS[..., :2], r"uint8 \[8, 12, 2\]; give uint8 \[height, width, 3\]"),
        (PIXELS[None], r"uint8 \[1, 8, 12, 3\]; give uint8 \[height, width, 3\]"),
        (PIXELS[:0], r"uint8 \[0, 12, 3\]; give uint8"),
        (3.5, "cannot use a float as an image"),
        (None, "cannot use a NoneType as an image"),
        (b"GIF", "the image: not an image"),
        ("a\udcff.png", "a path must be Unicode text"),
        ({}, "a picture in JSON is its path, .* got the keys none"),
        ({"path": "a.png", "png": ""}, "got the keys path, png"),
        ({"path": 3}, "got the keys path"),
        ({"path": "a.png", "sha256": "abc"}, "the sha256 of a picture is 64 hex digits, got 'abc'"),
        ({"png": "?"}, "the image is not base64"),
        ({"png": "AAAA"}, "the image: not an image"),
    ],
)
def test_what_is_no_picture(image: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        as_picture(image)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_pixels_survive_json(pixels: np.ndarray) -> None:
    picture = PictureData(pixels)
    again = as_picture(json.loads(json.dumps(picture.as_json())))
    assert again == picture
    assert hash(again) == hash(picture)
    np.testing.assert_array_equal(again.load()[1], pixels)


def test_a_path_survives_json() -> None:
    for picture in (PictureFile("a/b.png"), PictureFile("b.png", "0" * 64)):
        assert as_picture(json.loads(json.dumps(picture.as_json()))) == picture
    assert as_picture("a/b.png") == PictureFile("a/b.png")


FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(arrays.arrays(np.float32, st.tuples(*[st.integers(1, 4)] * 3), elements=FLOATS))
def test_latents_survive_json_bit_by_bit(array: np.ndarray) -> None:
    again = as_latents(json.loads(json.dumps(as_latents(array).as_json())))
    assert again.array.tobytes() == array.tobytes()
    assert again.array.shape == array.shape
    assert again == LatentData(array)


LATENTS = LatentData(np.ones((2, 1, 3), dtype=np.float32)).as_json()


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.ones((2, 1, 3)), r"are float64 \[2, 1, 3\]; give float32 \[C, h, w\]"),
        (np.ones((2, 3), dtype=np.float32), r"are float32 \[2, 3\]; give"),
        (np.full((2, 1, 3), np.nan, dtype=np.float32), "the latents of a frame are not finite"),
        ([1.0], "cannot use a list as latents; give an fp32 array"),
        (LATENTS | {"dtype": "float16"}, "latents in JSON are"),
        (LATENTS | {"more": 1}, "latents in JSON are"),
        (LATENTS | {"shape": [2, 2, 3]}, r"24 bytes, which do not fill the shape \[2, 2, 3\]"),
        (LATENTS | {"shape": [-2, -1, 3]}, "do not fill the shape"),
        (LATENTS | {"shape": [6]}, r"are float32 \[6\]; give"),
        (LATENTS | {"data": "?"}, "the data of latents is not base64"),
    ],
)
def test_what_is_no_latents(latents: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        as_latents(latents)
    assert "\n" not in str(caught.value)


def test_values_do_not_change_with_the_array_that_they_were_made_of() -> None:
    pixels = PIXELS.copy()
    picture = as_picture(pixels)
    pixels[:] = 0
    np.testing.assert_array_equal(picture.load()[1], PIXELS)
    with pytest.raises(ValueError, match="read-only"):
        picture.load()[1][:] = 0


def test_equal_means_kind_shape_and_values() -> None:
    assert as_picture(PIXELS) == as_picture(Image.fromarray(PIXELS))
    assert as_picture(PIXELS) != as_picture(PIXELS.reshape(12, 8, 3))
    assert as_picture(PIXELS) != as_picture(PIXELS[::-1].copy())
    assert as_picture(PIXELS) != PIXELS.tobytes()
