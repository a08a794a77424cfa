"""A new job as a client sends it, JSON or multipart, to a checked request: every field known, every picture small."""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.errors import RequestError, briefly, few
from stiv_deploy.runtime.files import parse_json
from stiv_deploy.runtime.pipeline.limits import BOUNDS, Bounds, bounded
from stiv_deploy.runtime.pipeline.pictures import PIXEL_LIMIT, decode_picture
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.serving.errors import ApiError

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats of pictures that clients may send."""
PIXELS = 16_000_000
"""Pixels of a picture that are always allowed; more where the model makes larger videos, up to ``LARGER`` times."""
LARGER = 4
TOGETHER = 64_000_000
"""Pixels of all pictures of a request."""
PRIORITY, DEADLINE = Bounds(0, 9), Bounds(0.001, 1e7)
PICTURE = re.compile(r"frames\[(-?\d{1,6})\]")
"""Name of a part of a form that is the picture of a frame."""
REFERENCE, URL = "input_reference", "image_url"
OWN = ("model", "seconds", "size", REFERENCE, "priority", "deadline_s")
"""Fields that are no request's: those of OpenAI, and how urgent it is."""
FIELDS = (*OWN, *(name for name in GenerationRequest.model_fields if name != "count"))
AS_JSON = {*BOUNDS, "priority", "deadline_s", "guidance_renorm", "skip_blocks", "skipped_steps", "solver_weights"}
"""Fields that a form has as text and that are none: numbers, switches, and lists of numbers."""
FILES = 100
"""Parts of a form that may be files, and others."""


@dataclass(frozen=True)
class Asked:
    """What a body says: ``values`` by field, pictures by frame as they came, and the digest of it all."""

    values: dict[str, Any]
    pictures: dict[int, bytes]
    digest: str


@dataclass(frozen=True)
class Wanted:
    """A new job: its ``request``, its ``priority``, seconds until it must be done, and of which job it is a remix."""

    request: GenerationRequest
    priority: int
    deadline: float | None
    source: str | None = None


async def read_body(request: Request) -> Asked:
    """The body of ``request``; raises :class:`ApiError` for a type that is not served, or fields that are unknown."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await run_in_threadpool(_of_json, await request.body())
    if kind == "multipart/form-data":
        async with request.form(max_files=FILES, max_fields=FILES, max_part_size=2**20) as form:
            return await _of_form(form)
    raise ApiError(415, "unsupported_media_type", "send application/json or multipart/form-data")


def _of_json(content: bytes) -> Asked:
    try:
        values = parse_json(content)
    except ValueError as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ApiError(400, "invalid_json", f"the body is a JSON object, got a {type(values).__name__}")
    return asked_of(values, hashlib.sha256(content).hexdigest())


def asked_of(values: dict[str, Any], digest: str = "") -> Asked:
    """What the ``values`` of a JSON object say, by field; :class:`ApiError` for fields that are unknown."""
    _check_fields(values)
    pictures = _referenced(values.pop(REFERENCE, None))
    frames = values.pop("frames", None) or {}
    if not isinstance(frames, dict):
        raise ApiError(400, "invalid_request", 'frames are {"INDEX": "data:image/..."}', "frames")
    for index, picture in frames.items():
        if not PICTURE.fullmatch(f"frames[{index}]"):
            raise ApiError(400, "invalid_request", f"frames are given by number, got {briefly(index)}", "frames")
        _add(pictures, int(index), _inline(picture, f"frames[{index}]"))
    return Asked(values, pictures, digest)


async def _of_form(form: FormData) -> Asked:
    values: dict[str, Any] = {}
    pictures: dict[int, bytes] = {}
    digest = hashlib.sha256()
    for name, part in form.multi_items():
        content = await part.read() if isinstance(part, UploadFile) else part.encode("utf-8", "surrogatepass")
        digest.update(b"%d %d " % (len(name), len(content)) + name.encode("utf-8", "surrogatepass") + content)
        found = PICTURE.fullmatch(name)
        if found or name == REFERENCE or name == f"{REFERENCE}[{URL}]":
            picture = content if isinstance(part, UploadFile) else _inline(part, name)
            _add(pictures, int(found[1]) if found else 0, picture)
        elif isinstance(part, UploadFile) or name == "frames":
            raise ApiError(400, "invalid_request", f"{briefly(name)}: the files of a form are frames[INDEX]", name[:80])
        elif name in values:
            raise ApiError(400, "invalid_request", f"{briefly(name)} is given twice", name[:80])
        else:
            values[name] = _typed(name, part)
    _check_fields(values)
    return Asked(values, pictures, digest.hexdigest())


def _check_fields(values: Mapping[str, Any]) -> None:
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        raise ApiError(
            400, "unknown_parameter", f"unknown: {few(unknown)}; there are: {', '.join(FIELDS)}", unknown[0][:80]
        )


def _typed(name: str, text: str) -> Any:
    """A form's ``text`` as JSON would have it; what is none stays text, and is refused as such later."""
    if name in AS_JSON:
        try:
            return parse_json(text)
        except ValueError:
            return text
    return text


def _add(pictures: dict[int, bytes], index: int, content: bytes) -> None:
    if index in pictures:
        raise ApiError(400, "invalid_request", f"frame {index} is given twice; {REFERENCE} is frame 0", REFERENCE)
    pictures[index] = content


def _referenced(reference: Any) -> dict[int, bytes]:
    """The first frame, by OpenAI's field."""
    return {} if reference is None else {0: _inline(reference, REFERENCE)}


def _inline(value: Any, name: str) -> bytes:
    """A picture that is in the request itself; nothing is fetched, and no file of ours is read."""
    match value:
        case {"image_url": str(url), **rest} if not rest:
            return _of_url(url, name)
        case {"png": str(data), **rest} if not rest:
            return _of_base64(data, name)
        case str(url):
            return _of_url(url, name)
    raise ApiError(400, "invalid_request", f"{name} is a file part, or a URL that begins with data:image/", name)


def _of_url(url: str, name: str) -> bytes:
    head, _, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        message = f"{name}: nothing is fetched; send the picture as a file part, or as data:image/png;base64,..."
        raise ApiError(400, "url_not_allowed", message, name)
    return _of_base64(data, name)


def _of_base64(data: str, name: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, "invalid_request", f"{name} is not base64 ({error})", name) from None


def wanted(asked: Asked, manifest: Manifest, model: str) -> Wanted:
    """The job of a body, for the ``model`` of that name; raises :class:`ApiError`, :class:`RequestError`."""
    values = {name: value for name, value in asked.values.items() if value is not None}
    if values.pop("model", model) != model:
        raise ApiError(404, "model_not_found", f"there is one model here, {model!r}", "model")
    priority = int(bounded("priority", values.pop("priority", 0), PRIORITY))
    deadline = values.pop("deadline_s", None)
    values |= _sides(values)
    values |= _frames(values, manifest)
    values["frames"] = _pictures(asked.pictures, manifest)
    request = GenerationRequest(**values)
    return Wanted(request, priority, None if deadline is None else bounded("deadline_s", deadline, DEADLINE))


def _sides(values: dict[str, Any]) -> dict[str, int]:
    size = values.pop("size", None)
    if size is None:
        return {}
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size) if isinstance(size, str) else None
    if found is None:
        raise ApiError(400, "invalid_request", f"size is WIDTHxHEIGHT, as in 1280x720, got {briefly(size)}", "size")
    if {"width", "height"} & values.keys():
        raise ApiError(400, "invalid_request", "size and width or height are given; give either", "size")
    return {"width": int(found[1]), "height": int(found[2])}


def _frames(values: dict[str, Any], manifest: Manifest) -> dict[str, int]:
    """The number of frames that the model can make which is nearest to ``seconds``."""
    seconds = values.pop("seconds", None)
    if seconds is None:
        return {}
    if "num_frames" in values:
        raise ApiError(400, "invalid_request", "seconds and num_frames are given; give either", "seconds")
    try:
        length = bounded("seconds", float(seconds), Bounds(0.01, 1e5))
    except (TypeError, ValueError):
        raise ApiError(400, "invalid_request", f"seconds is a number, got {briefly(seconds)}", "seconds") from None
    rate = bounded("fps", values.get("fps", manifest.sampling.frames_per_second))
    multiple, padding = manifest.model.frame_multiple, manifest.model.frame_padding
    return {"num_frames": max(1, round((length * rate + padding) / multiple) * multiple - padding)}


def _pictures(pictures: Mapping[int, bytes], manifest: Manifest) -> dict[int, Any]:
    """Pixels of ``pictures``, whose format and size are looked at before they are decoded."""
    largest = max(bucket.height.max * bucket.width.max for bucket in manifest.buckets)
    limit, left = min(PIXEL_LIMIT, max(PIXELS, LARGER * largest)), TOGETHER
    found = {}
    for index, content in pictures.items():
        try:
            found[index] = decode_picture(content, f"frame {index}", FORMATS, min(limit, left))
        except RequestError as error:
            words = f"frame {index}: the pictures of a request have at most {TOGETHER // 10**6} million pixels together"
            raise ApiError(400, "invalid_image", str(error) if left >= limit else words, "frames") from None
        left -= found[index].shape[0] * found[index].shape[1]
    return found
