"""Pictures: the same 8-bit sRGB pixels by path, bytes, PIL image and array; limits before decoding; one-line faults."""

import functools
import io
import logging
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image, ImageCms, ImageOps

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline import pictures
from stiv_deploy.runtime.pipeline.given import as_picture
from stiv_deploy.runtime.pipeline.pictures import decode_picture, on_background, read_content, read_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
"""All levels of 8 bits, in 16."""


def content(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def every_way(data: bytes, folder: Path) -> list[np.ndarray]:
    """The pixels of ``data`` by path, bytes and PIL image."""
    (folder / "picture").write_bytes(data)
    forms = (folder / "picture", data, Image.open(io.BytesIO(data)))
    return [as_picture(form).load()[1] for form in forms]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled(tmp_path: Path, kind: str) -> None:
    for found in every_way(content(Image.fromarray(RAMP), kind), tmp_path):
        np.testing.assert_array_equal(found, np.dstack([RAMP // 257] * 3))
    np.testing.assert_array_equal(as_picture(RAMP).load()[1][..., 0], RAMP // 257)


def test_floats_from_0_to_1_are_scaled_and_others_refused(tmp_path: Path) -> None:
    ramp = (RAMP / 65535).astype(np.float32)
    for found in every_way(content(Image.fromarray(ramp), "TIFF"), tmp_path):
        np.testing.assert_array_equal(found[..., 0], RAMP // 257)
    np.testing.assert_array_equal(as_picture(PIXELS / 255.0).load()[1], PIXELS)
    for wrong in (ramp * 255, ramp - 1, np.full((2, 2), np.nan, np.float32)):
        with pytest.raises(RequestError, match=r"is of floats from .*; give 8 or 16 bits .*, or floats from 0 to 1$"):
            every_way(content(Image.fromarray(wrong), "TIFF"), tmp_path)
        with pytest.raises(RequestError, match="is of floats from"):
            as_picture(wrong)


def test_whole_numbers_of_32_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is of int32, and nobody knows its range; give 8 or 16 bits"):
        every_way(content(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), tmp_path)
    with pytest.raises(RequestError, match="is of int64, and nobody knows its range"):
        as_picture(PIXELS.astype(np.int64))


@given(arrays.arrays(np.uint16, (3, 4)))
def test_16_bits_become_the_nearest_level(array: np.ndarray) -> None:
    assert np.abs(as_picture(array).load()[1][..., 0] - array / 257).max() <= 0.5


def half_clear() -> np.ndarray:
    """RGBA [4, 6]: hidden red at the left, half of a white in the middle, opaque blue at the right."""
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, :2], pixels[:, 2:4], pixels[:, 4:] = (255, 0, 0, 0), (255, 255, 255, 128), (0, 0, 255, 255)
    return pixels


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_on_a_background(tmp_path: Path, kind: str) -> None:
    data = content(Image.fromarray(half_clear()), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    for found in (*every_way(data, tmp_path), as_picture(half_clear()).load()[1]):
        assert found[0].tolist() == [[0, 0, 0]] * 2 + [[128, 128, 128]] * 2 + [[0, 0, 255]] * 2
    assert as_picture(data).load("white")[1][0, :3].tolist() == [[255, 255, 255]] * 3
    assert read_picture(tmp_path / "picture", "#ff8000")[0, [0, 2]].tolist() == [[255, 128, 0], [255, 192, 128]]


def palette() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    return image


@pytest.mark.parametrize(
    ("image", "options", "wanted"),
    [
        (palette(), {"transparency": 0}, [[0, 0, 0], [0, 0, 255]]),
        (palette(), {"transparency": b"\x80\xff"}, [[128, 0, 0], [0, 0, 255]]),
        (Image.fromarray(np.array([[7, 9]], np.uint8)), {"transparency": 7}, [[0, 0, 0], [9, 9, 9]]),
        (Image.fromarray(np.array([[257, 9 * 257]], np.uint16)), {"transparency": 257}, [[0, 0, 0], [9, 9, 9]]),
        (Image.fromarray(np.array([[[200, 64], [90, 255]]], np.uint8), "LA"), {}, [[50, 50, 50], [90, 90, 90]]),
        (Image.fromarray(np.array([[[1, 2, 3]]], np.uint8)), {"transparency": (1, 2, 3)}, [[0, 0, 0]]),
    ],
)
def test_transparency_of_every_kind(
    tmp_path: Path, image: Image.Image, options: dict[str, object], wanted: list[list[int]]
) -> None:
    for found in every_way(content(image, **options), tmp_path):
        assert found[0].tolist() == wanted


def test_premultiplied_colours_are_divided() -> None:
    image = Image.fromarray(half_clear()).convert("RGBa")
    np.testing.assert_array_equal(as_picture(image).load()[1], as_picture(half_clear()).load()[1])


def test_cmyk_is_converted(tmp_path: Path) -> None:
    for found in every_way(content(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), tmp_path):
        assert found[0].tolist() == [[255, 0, 0]] * 2


@functools.cache  # it has the time in it, and so another length in a compressed file every second
def wide_gamut() -> bytes:
    """The profile of a display with Adobe RGB's primaries and sRGB's curve: sRGB's, with other columns."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    columns = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    for at in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12):
        if xyz := columns.get(bytes(profile[at : at + 4])):
            offset = struct.unpack(">I", profile[at + 4 : at + 8])[0] + 8
            profile[offset : offset + 12] = struct.pack(">3i", *(round(value * 65536) for value in xyz))
    return bytes(profile)


def srgb_of_adobe(pixels: np.ndarray) -> np.ndarray:
    """By the matrices of both, at D50 (ICC), and sRGB's curve (IEC 61966-2-1)."""
    adobe = np.array([(0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457)])
    srgb = np.array([(0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410)])
    values = pixels / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ (np.linalg.inv(srgb) @ adobe).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_profile_is_applied(tmp_path: Path, kind: str) -> None:
    muted = (96 + PIXELS // 4).astype(np.uint8)  # inside both gamuts
    options = {"lossless": True} if kind == "WEBP" else {}
    data = content(Image.fromarray(muted), kind, icc_profile=wide_gamut(), **options)
    for found in every_way(data, tmp_path):
        assert np.abs(found - srgb_of_adobe(muted)).max() < 1  # half a level of rounding, and 16 bits of the profile
        assert np.abs(found.astype(int) - muted).max() > 4


def test_a_profile_goes_with_alpha_grey_and_its_own_space(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clear = np.dstack((np.full((2, 2, 3), (150, 120, 120), np.uint8), np.full((2, 2), 255, np.uint8)))
    clear[0, 0, 3] = 0
    (found, *_) = every_way(content(Image.fromarray(clear), icc_profile=wide_gamut()), tmp_path)
    assert found[0, 0].tolist() == [0, 0, 0]
    assert np.abs(found[1, 1] - srgb_of_adobe(clear[1, 1, :3])).max() < 1
    grey = content(Image.fromarray(PIXELS[..., 0]), icc_profile=wide_gamut())  # of an RGB profile: as telephones write
    assert np.abs(every_way(grey, tmp_path)[0].astype(int) - PIXELS[..., :1]).max() <= 1
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(every_way(content(Image.fromarray(PIXELS), icc_profile=srgb), tmp_path)[0], PIXELS)
    assert not caplog.records


@pytest.mark.parametrize("profile", [b"no profile", b"\0" * 200, wide_gamut()[:300]])
def test_a_broken_profile_is_ignored_with_one_warning(caplog: pytest.LogCaptureFixture, profile: bytes) -> None:
    data = content(Image.fromarray(PIXELS), icc_profile=profile)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(decode_picture(data, "a.png"), PIXELS)
    (record,) = caplog.records
    assert record.getMessage().startswith("a.png: its colour profile is damaged")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_however_the_picture_comes(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = content(Image.fromarray(PIXELS), kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert upright.shape[:2] == ((6, 9) if orientation < 5 else (9, 6))
    for found in every_way(data, tmp_path):
        np.testing.assert_array_equal(found, upright)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_malformed_exif_is_ignored(tmp_path: Path) -> None:
    """A tag of a signed fraction without its denominator: Pillow reads it, and cannot write it again."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.XResolution] = (1, 1)
    block = exif.tobytes()
    for wrong in (
        block.replace(struct.pack("<HHI", 282, 5, 1), struct.pack("<HHI", 282, 10, 1)),
        block[:20],
        b"Exif\0\0x",
    ):
        data = content(Image.fromarray(PIXELS), "JPEG", exif=wrong)
        assert {found.size for found in every_way(data, tmp_path)} == {PIXELS.size}


def test_the_first_of_several_pictures_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = content(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert every_way(data, tmp_path)[0][0, 0].tolist() == [255, 0, 0], kind


def bomb(width: int, height: int) -> bytes:
    """A PNG of ``width`` x ``height`` black pixels of one bit, in a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(64))  # the rest would only be read by who decodes
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8_000, 7_000), (13_000, 13_000), (60_000, 60_000)])
def test_a_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda _image: pytest.fail("decoded"))
    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for use in (read_picture, lambda path: as_picture(path.read_bytes())):
            with pytest.raises(RequestError, match="a picture has at most 50 million, save a smaller one") as caught:
                use(tmp_path / "bomb.png")
            assert "\n" not in str(caught.value)


def test_limits_are_said_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RequestError, match=r"a\.png: has 8000x7000 = 56\.0 million pixels; a picture has at most 50 mil"
    ):
        decode_picture(bomb(8_000, 7_000), "a.png")
    with pytest.raises(RequestError, match=r"has 13000x13000 = 169\.0 million pixels"):
        as_picture(np.broadcast_to(np.uint8(0), (13_000, 13_000, 3)))
    monkeypatch.setattr(pictures, "BYTE_LIMIT", 2**20)
    (tmp_path / "long.png").write_bytes(bytes(2**20 + 1))
    for use in (lambda: read_content(tmp_path / "long.png"), lambda: as_picture(bytes(2**20 + 1))):
        with pytest.raises(RequestError, match="the image has more than 1 MiB; save a smaller one"):
            use()


def test_other_formats_are_not_opened() -> None:
    for kind in ("PPM", "ICO", "PDF", "EPS"):
        data = content(Image.fromarray(PIXELS), kind)
        with pytest.raises(RequestError, match="not an image that can be read; give a PNG, JPEG, WebP, TIFF, BMP, GIF"):
            decode_picture(data, "a.png")


def test_what_is_wrong_with_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "half.png").write_bytes(content(Image.fromarray(PIXELS))[:90])
    cases = {"none.png": "no such image file", "text.png": "not an image", "half.png": "the image cannot be read"}
    for name, fault in cases.items():
        with pytest.raises(RequestError, match=f"{name}: {fault}"):
            read_picture(tmp_path / name)
    with pytest.raises(RequestError, match="no such image file"):
        read_picture(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]), data=st.data())
def test_any_damage_is_one_line(kind: str, data: st.DataObject) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    whole = bytearray(content(Image.fromarray(PIXELS), kind, icc_profile=wide_gamut(), exif=exif))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=9)):
        whole[at] = value
    try:
        found = decode_picture(bytes(whole[: data.draw(st.integers(0, 2 * len(whole)))]), "a.png")
    except RequestError as error:
        message = str(error)
    else:
        assert found.dtype == np.uint8
        return
    assert len(message) < 500
    assert "\n" not in message


@pytest.mark.parametrize(("colour", "rgb"), [("white", (255, 255, 255)), ("#336699", (51, 102, 153))])
def test_colours(colour: str, rgb: tuple[int, int, int]) -> None:
    assert pictures.rgb_of(colour) == rgb


@pytest.mark.parametrize("colour", ["", "mauvish", "#12345678", "rgba(1,2,3,4)", "x" * 5000, None, 3, ("a", "b")])
def test_what_is_no_colour(colour: str) -> None:
    with pytest.raises(RequestError, match="background must be a colour without alpha") as caught:
        pictures.rgb_of(colour)
    assert len(str(caught.value)) < 500


@given(
    pixels=arrays.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 3), st.just(4))),
    colour=st.tuples(*[st.integers(0, 255)] * 3),
)
def test_compositing_is_the_formula(pixels: np.ndarray, colour: tuple[int, int, int]) -> None:
    exact = pixels[..., :3] * (pixels[..., 3:] / 255) + np.array(colour) * (1 - pixels[..., 3:] / 255)
    found = on_background(pixels, "#{:02x}{:02x}{:02x}".format(*colour))
    assert np.abs(found - exact).max() <= 0.5 + 1e-9


def test_alpha_survives_json() -> None:
    picture = as_picture(half_clear())
    again = as_picture(picture.as_json())
    assert again == picture
    assert as_picture(np.dstack((PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)))) == as_picture(PIXELS)
    np.testing.assert_array_equal(as_picture(PIXELS[..., 0]).load()[1], np.dstack([PIXELS[..., 0]] * 3))
