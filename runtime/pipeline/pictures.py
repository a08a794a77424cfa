"""Pictures in: files, their bytes, PIL images and arrays, as 8-bit sRGB pixels, upright, within limits.

The one reader of pictures. Format, bytes and pixels are held against the limits before anything is decoded. Alpha is
kept until :func:`on_background` knows what lies behind it.
"""

import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor, UnidentifiedImageError

from stiv_deploy.runtime.errors import RequestError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
"""What is opened, as Pillow calls it."""
WANTED = "PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF file"
BYTE_LIMIT = 256 * 2**20
"""Bytes of a picture's file: 16 bits a colour of as many pixels as are allowed, nearly."""
PIXEL_LIMIT = 50_000_000
"""Pixels of a picture: 150 MB of RGB, and more than telephones take (48 million)."""
KINDS = "give 8 or 16 bits for each colour, or floats from 0 to 1"
GREY = ("1", "L", "LA")
"""Pillow's modes of one colour, after premultiplied ones have been divided."""
STRAIGHT = {"La": "LA", "RGBa": "RGBA"}
"""Modes with colours that are multiplied by alpha, and those without."""
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
"""How pixels [H, W, C] become upright, by EXIF orientation."""

log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()


def read_content(path: Path) -> bytes:
    """Contents of a picture's file; raises :class:`RequestError`, also for more than ``BYTE_LIMIT``."""
    try:
        if not path.is_file():
            raise RequestError(f"{path}: no such image file")
        with path.open("rb") as file:
            content = file.read(BYTE_LIMIT + 1)
    except OSError as error:
        raise RequestError(f"{path}: the image cannot be read ({error.strerror})") from None
    return _within_bytes(content, str(path))


def _within_bytes(content: bytes, name: str) -> bytes:
    if len(content) > BYTE_LIMIT:
        raise RequestError(f"{name}: the image has more than {BYTE_LIMIT // 2**20} MiB; save a smaller one")
    return content


def read_picture(path: str | Path, background: str = "black") -> np.ndarray:
    """A picture's file as uint8 [height, width, 3] sRGB, upright, on ``background``; raises :class:`RequestError`."""
    return on_background(decode_picture(read_content(Path(path)), str(path)), background)


def decode_picture(
    content: bytes, name: str, formats: tuple[str, ...] = FORMATS, pixels: int = PIXEL_LIMIT
) -> np.ndarray:
    """As :func:`image_pixels`, of a picture file's ``content``, which has one of ``formats``."""
    with _told(name):
        image = Image.open(io.BytesIO(_within_bytes(content, name)), formats=formats)
    return image_pixels(image, name, pixels)


def image_pixels(image: Image.Image, name: str, limit: int = PIXEL_LIMIT) -> np.ndarray:
    """``image`` as uint8 [height, width, 3] sRGB, or [height, width, 4] if it is not opaque; of several its first.

    16 bits and floats from 0 to 1 are scaled, an embedded profile is applied, the EXIF orientation too; a profile or
    EXIF that is damaged is not. Raises :class:`RequestError`, which calls the picture ``name``, if it cannot be read,
    has more pixels than ``limit``, or has numbers whose range nobody knows.
    """
    _check_size(image.width, image.height, name, limit)
    with _told(name):
        image.load()
        colours, alpha = _parts(_eight_bit_image(image, name))
        colours = _as(_in_srgb(colours, image.info.get("icc_profile"), name), "RGB")
        pixels = np.asarray(colours)
        pixels = pixels if alpha is None else np.dstack((pixels, np.asarray(alpha)))
        return _without_idle_alpha(UPRIGHT.get(_orientation(image), lambda same: same)(pixels))


def array_pixels(array: np.ndarray, name: str) -> np.ndarray:
    """As :func:`image_pixels`, of an ``array`` [height, width], or with 1, 3 (RGB) or 4 (RGBA) values a pixel."""
    pixels = array[..., None] if array.ndim == 2 else array
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise RequestError(
            f"{name} array is {array.dtype} {list(array.shape)}; give uint8 [height, width, 3] (RGB), with 4 (RGBA), "
            "or [height, width] (grey)"
        )
    _check_size(pixels.shape[1], pixels.shape[0], name)
    pixels = _eight_bits(pixels, name)
    return _without_idle_alpha(pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels)


def on_background(pixels: np.ndarray, background: str) -> np.ndarray:
    """``pixels`` uint8 [H, W, 3 or 4] as uint8 [H, W, 3], laid on the colour ``background``."""
    if pixels.shape[2] == 3:
        return pixels
    colour, laid = np.array(rgb_of(background), np.uint16), np.empty((*pixels.shape[:2], 3), np.uint8)
    for row in range(len(pixels)):  # at once it would take four times the memory
        alpha = pixels[row, :, 3:].astype(np.uint16)
        laid[row] = (pixels[row, :, :3] * alpha + colour * (255 - alpha) + 127) // 255
    return laid


def rgb_of(colour: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a name or ``#rrggbb``; raises :class:`RequestError`."""
    try:
        red, green, blue, *alpha = ImageColor.getrgb(colour)
    except (ValueError, AttributeError, TypeError):
        red, green, blue, *alpha = 0, 0, 0, 0
    if alpha:
        raise RequestError(
            f"background must be a colour without alpha, as in white or #336699, got {str(colour)[:80]!r}"
        )
    return red, green, blue


@contextmanager
def unwarned() -> Iterator[None]:
    """Warnings of Pillow are not shown. Silencing is global in Python, so one thread at a time is inside."""
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever Pillow raises inside becomes a :class:`RequestError`."""
    try:
        with unwarned():
            yield
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError(f"{name}: not an image that can be read; give a {WANTED}") from None
    except Image.DecompressionBombError:
        raise RequestError(_too_large(name, "too many pixels")) from None
    except Exception as error:  # on damage Pillow raises any of a dozen kinds, struct.error and KeyError among them
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise RequestError(f"{name}: the image cannot be read ({reason}); give a whole {WANTED}") from None


def _check_size(width: int, height: int, name: str, limit: int = PIXEL_LIMIT) -> None:
    if width * height > limit:
        raise RequestError(_too_large(name, f"{width}x{height} = {width * height / 1e6:.1f} million pixels", limit))


def _too_large(name: str, found: str, limit: int = PIXEL_LIMIT) -> str:
    return f"{name}: has {found}; a picture has at most {limit // 10**6} million, save a smaller one"


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """uint16 and floats from 0 to 1 as uint8, rounded; :class:`RequestError` for others."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if values.dtype.kind != "f":
        raise RequestError(f"{name} is of {values.dtype}, and nobody knows its range; {KINDS}")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise RequestError(f"{name} is of floats from {low:g} to {high:g}; {KINDS}")
    return np.rint(values * 255).astype(np.uint8)


def _eight_bit_image(image: Image.Image, name: str) -> Image.Image:
    """``image`` with 8 bits for each of its colours; those of 16 bits keep the one that is transparent."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray(_eight_bits(values, name))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def _parts(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours, in mode L, RGB or CMYK, and alpha if there is any; not multiplied."""
    image = image.convert(STRAIGHT[image.mode]) if image.mode in STRAIGHT else image
    mode = "CMYK" if image.mode == "CMYK" else "L" if image.mode in GREY else "RGB"
    if not image.has_transparency_data:
        return _as(image, mode), None
    whole = _as(image, "RGBA")
    return whole.convert(mode), whole.getchannel("A")


def _as(image: Image.Image, mode: str) -> Image.Image:
    """``image`` in ``mode``, itself if it has it: Pillow would copy it."""
    return image if image.mode == mode else image.convert(mode)


def _in_srgb(colours: Image.Image, profile: Any, name: str) -> Image.Image:
    """``colours`` by their embedded ICC ``profile``; as they are, with a warning, by one that does not fit them."""
    if not profile:
        return colours
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = found.profile.xcolor_space.strip()
        ready = colours.convert("RGB") if (space, colours.mode) == ("RGB", "L") else colours
        converted = ImageCms.profileToProfile(ready, found, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        converted = None
    if converted is None:
        log.warning("%s: its colour profile is damaged or for other colours; the picture is taken as sRGB", name)
        return colours
    return converted


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if there is none, or it cannot be read. Only right after the pixels are loaded.

    TIFF pictures are upright by then, and have lost it.
    """
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as in _told
        return 1
    return found if isinstance(found, int) else 1


def _without_idle_alpha(pixels: np.ndarray) -> np.ndarray:
    """Pixels [H, W, 3] if all of [H, W, 4] are opaque; in memory of their own order."""
    opaque = pixels.shape[2] == 4 and (pixels[..., 3] == 255).all()
    return np.ascontiguousarray(pixels[..., :3] if opaque else pixels)
