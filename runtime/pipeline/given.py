"""What a request is given besides text: pictures of frames, and latents; as values that JSON can hold."""

import base64
import binascii
import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
from PIL import Image
from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from stiv_deploy.runtime.errors import RequestError, briefly, few
from stiv_deploy.runtime.pipeline.limits import text
from stiv_deploy.runtime.pipeline.pictures import (
    array_pixels,
    decode_picture,
    image_pixels,
    on_background,
    read_content,
)

ImageLike: TypeAlias = Image.Image | np.ndarray | bytes | str | PathLike[str]
"""A PIL image, an array [H, W, 3], [H, W, 4] or [H, W] of uint8, uint16 or floats from 0 to 1, the contents of an image
file, or the path of one."""


@dataclass(frozen=True)
class PictureFile:
    """A picture by its path, as it was given. ``sha256`` (hex) of its contents, if known, is checked when it is read.

    JSON: ``{"path": "first.png", "sha256": "..."}``, or the path alone.
    """

    path: str
    sha256: str | None = None

    def __str__(self) -> str:
        return self.path

    def load(self, background: str = "black") -> tuple["PictureFile", np.ndarray]:
        """This with its ``sha256`` known, and its pixels uint8 [H, W, 3], laid on the colour ``background``.

        Raises :class:`RequestError` if it cannot be read, or is another picture than ``sha256`` says.
        """
        content = read_content(Path(self.path))
        found = hashlib.sha256(content).hexdigest()
        if self.sha256 not in (None, found):
            raise RequestError(
                f"{self.path}: not the picture that the request was made with (its SHA-256 is {found[:12]}..., wanted "
                f"{str(self.sha256)[:12]}...); give that picture, or its path alone to take this one"
            )
        return PictureFile(self.path, found), on_background(decode_picture(content, self.path), background)

    def as_json(self) -> dict[str, str]:
        """The path, and the SHA-256 if known."""
        return {"path": self.path} | ({} if self.sha256 is None else {"sha256": self.sha256})


@dataclass(frozen=True, eq=False)
class _Array:
    """An array that nobody can write; equal to one of the same type, shape and values."""

    array: np.ndarray

    def __post_init__(self) -> None:
        array = np.array(self.array, order="C")
        array.flags.writeable = False
        object.__setattr__(self, "array", array)

    @cached_property
    def _key(self) -> tuple[type, tuple[int, ...], bytes]:
        return type(self), self.array.shape, hashlib.sha256(self.array.data).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Array) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class PictureData(_Array):
    """A picture by its pixels ``array``, uint8 [H, W, 3], or [H, W, 4] with alpha. JSON: ``{"png": "<base64>"}``."""

    def __str__(self) -> str:
        return "the image"

    def load(self, background: str = "black") -> tuple["PictureData", np.ndarray]:
        """This, and its pixels uint8 [H, W, 3], laid on the colour ``background``."""
        return self, on_background(self.array, background)

    def as_json(self) -> dict[str, str]:
        """The pixels as PNG."""
        buffer = io.BytesIO()
        Image.fromarray(self.array).save(buffer, "PNG")
        return {"png": base64.b64encode(buffer.getvalue()).decode()}


class LatentData(_Array):
    """Latents: ``array`` fp32, finite, [C, h, w] of one latent frame, or [T, C, h, w] of a video's initial noise.

    JSON: ``{"dtype": "float32", "shape": [C, h, w], "data": "<base64>"}``, little-endian, C order.
    """

    def as_json(self) -> dict[str, Any]:
        """Shape and values."""
        data = base64.b64encode(self.array.astype("<f4").tobytes()).decode()
        return {"dtype": "float32", "shape": list(self.array.shape), "data": data}


def as_picture(value: Any) -> PictureFile | PictureData:
    """The picture that ``value`` (:data:`ImageLike`, or its JSON) gives; files are read later, by ``load``.

    Raises :class:`RequestError` for anything else.
    """
    if isinstance(value, PictureFile | PictureData):
        return value
    if isinstance(value, str | PathLike):
        return PictureFile(text("path", os.fspath(value)))
    if isinstance(value, bytes):
        return PictureData(decode_picture(value, "the image"))
    if isinstance(value, Image.Image):
        return PictureData(image_pixels(value, "the image"))
    if isinstance(value, Mapping):
        return _picture_from_json(value)
    if not isinstance(value, np.ndarray):
        raise RequestError(
            f"cannot use a {type(value).__name__} as an image; give a file, a PIL image or a uint8 array"
        )
    return PictureData(array_pixels(value, "the image"))


def _picture_from_json(values: Mapping[str, Any]) -> PictureFile | PictureData:
    match dict(values):
        case {"png": str(data), **rest} if not rest:
            return PictureData(decode_picture(_bytes(data, "the image"), "the image"))
        case {"path": str(path), **rest} if set(rest) <= {"sha256"}:
            return PictureFile(text("path", path), _digest(rest.get("sha256")))
    raise RequestError(
        'a picture in JSON is its path, {"path": ..., "sha256": ...} or {"png": BASE64}, '
        f"got the keys {few([str(key) for key in values]) or 'none'}"
    )


def _digest(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")):
        return value
    raise RequestError(f"the sha256 of a picture is 64 hex digits, got {briefly(value)}")


def _bytes(data: str, name: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise RequestError(f"{name} is not base64 ({error})") from None


def as_latents(value: Any) -> LatentData:
    """The latents that ``value`` (an array fp32 [C, h, w], or its JSON) gives; :class:`RequestError` otherwise."""
    return _as_data(value, "the latents of a frame", "[C, h, w]")


def as_noise(value: Any) -> LatentData | None:
    """The same of a video's initial noise, fp32 [T, C, h, w]; ``None`` gives none."""
    return None if value is None else _as_data(value, "latents of noise", "[T, C, h, w]")


def _as_data(value: Any, name: str, axes: str) -> LatentData:
    array = value.array if isinstance(value, LatentData) else value
    array = as_array(_latents_from_json(array) if isinstance(array, Mapping) else array)
    if array is None:
        raise RequestError(f"cannot use a {type(value).__name__} as latents; give an fp32 array {axes}")
    if array.dtype != np.float32 or array.ndim != axes.count(",") + 1 or 0 in array.shape:
        raise RequestError(f"{name} are {array.dtype} {list(array.shape)}; give float32 {axes}")
    if not np.isfinite(array).all():
        raise RequestError(f"{name} are not finite")
    return value if isinstance(value, LatentData) else LatentData(array)


def as_array(value: Any) -> np.ndarray | None:
    """``value``, if it is an array or a tensor of torch on any device, as an array; else ``None``."""
    tensor = getattr(value, "detach", None)
    array = tensor().cpu().numpy() if callable(tensor) else value
    return array if isinstance(array, np.ndarray) else None


def _latents_from_json(values: Mapping[str, Any]) -> np.ndarray:
    match dict(values):
        case {"dtype": "float32", "shape": [int(), *_] as shape, "data": str(data), **rest} if not rest:
            content = _bytes(data, "the data of latents")
            sizes = len(shape) <= 8 and all(isinstance(size, int) and size > 0 for size in shape)
            if sizes and 4 * math.prod(shape) == len(content):
                return np.frombuffer(content, dtype="<f4").astype(np.float32).reshape(shape)
            raise RequestError(
                f"the data of latents are {len(content)} bytes, which do not fill the shape {briefly(shape)}"
            )
    raise RequestError('latents in JSON are {"dtype": "float32", "shape": [C, h, w], "data": BASE64}')


def _schema(*forms: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(forms)} if len(forms) > 1 else forms[0])


def _object(**kinds: str) -> dict[str, Any]:
    properties = {name: {"type": kind} for name, kind in kinds.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


_as_json: Callable[[Any], dict[str, Any]] = lambda value: value.as_json()  # noqa: E731
Picture = Annotated[
    PictureFile | PictureData,
    PlainValidator(as_picture),
    PlainSerializer(_as_json),
    _schema({"type": "string"}, _object(path="string", sha256="string"), _object(png="string")),
]
"""A picture of a request, made of any :data:`ImageLike`."""
Latents = Annotated[
    LatentData,
    PlainValidator(as_latents),
    PlainSerializer(_as_json),
    _schema(_object(dtype="string", shape="array", data="string")),
]
"""Latents of one latent frame of a request."""
Noise = Annotated[
    LatentData | None,
    PlainValidator(as_noise),
    PlainSerializer(lambda value: value and value.as_json()),
    _schema(_object(dtype="string", shape="array", data="string"), {"type": "null"}),
]
"""Initial noise of a request's video."""
