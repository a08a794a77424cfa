"""Clips as GIF and WebP: every frame kept, equal ones too, and times that add up.

Pillow, and libwebp for it, merge a frame with an equal one before it, so that a still clip would have one frame. Here
Pillow encodes the frames, each but the rectangle that has changed, and this file puts them into the container.
"""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from PIL.GifImagePlugin import getdata, getheader

GIF_TICK = 10
"""Milliseconds: what GIF counts times in."""
GIF_RATE = 50
"""Frames a second of GIF: players show a frame of one tick for ten."""
ANIMATION, EXIF, NO_BLENDING = 0x02, 0x08, 0x02
"""Flags of WebP's chunks VP8X (the first two) and ANMF."""

Rectangle = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels, the last two exclusive."""


def write_gif(path: Path, frames: np.ndarray, fps: float, comment: str | None) -> None:
    """Write uint8 [frames, height, width, 3] as a GIF that repeats; of more than ``GIF_RATE`` a second, that many."""
    count = len(frames)
    kept = min(count, max(1, int(count * GIF_RATE / fps)))
    frames = frames[np.arange(kept) * count // kept]
    times = durations(kept, kept * fps / count, GIF_TICK)
    pictures = [Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames]
    header, _ = getheader(pictures[0], info={"loop": 0, "comment": (comment or "").encode()})
    with path.open("wb") as file:
        file.writelines(header)
        for picture, box, time in zip(pictures, changes(frames), times, strict=True):
            file.writelines(getdata(picture.crop(box), box[:2], duration=time, include_color_table=True))
        file.write(b";")


def write_webp(path: Path, frames: np.ndarray, fps: float, comment: str | None) -> None:
    """Write uint8 [frames, height, width, 3] as a lossless WebP that repeats."""
    path.write_bytes(webp(frames, fps, comment))


def webp(frames: np.ndarray, fps: float, comment: str | None) -> bytes:
    """The file of :func:`write_webp`."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = comment or ""
    header = struct.pack("<I", ANIMATION | EXIF) + _three(frames.shape[2] - 1, frames.shape[1] - 1)
    chunks = [_chunk(b"VP8X", header), _chunk(b"ANIM", bytes(6))]  # on black, for ever
    boxes = ((left & ~1, top & ~1, right, bottom) for left, top, right, bottom in changes(frames))  # stored halved
    for frame, box, time in zip(frames, boxes, durations(len(frames), fps, 1), strict=True):
        chunks.append(_chunk(b"ANMF", _webp_frame(Image.fromarray(frame).crop(box), box, time)))
    chunks.append(_chunk(b"EXIF", exif.tobytes().removeprefix(b"Exif\0\0")))
    return _chunk(b"RIFF", b"WEBP" + b"".join(chunks))


def durations(count: int, fps: float, tick: int) -> list[int]:
    """Milliseconds of each of ``count`` frames, whole ticks; every frame begins within half a tick of its time."""
    begins = np.rint(np.arange(count + 1) * (1000 / fps / tick)).astype(int)
    return [int(time) * tick for time in np.diff(begins)]


def changes(frames: np.ndarray) -> Iterator[Rectangle]:
    """What of each frame differs from the one before: all of the first, one pixel of an equal one."""
    yield 0, 0, frames.shape[2], frames.shape[1]
    for before, frame in zip(frames[:-1], frames[1:], strict=True):
        changed = (before != frame).any(axis=2)
        rows, columns = (np.flatnonzero(changed.any(axis=axis)).tolist() for axis in (1, 0))
        yield (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows else (0, 0, 1, 1)


def _webp_frame(picture: Image.Image, box: Rectangle, time: int) -> bytes:
    """The data of an ANMF chunk: place and size of ``picture``, its time in milliseconds, its pixels."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, method=0)
    place = _three(box[0] // 2, box[1] // 2, picture.width - 1, picture.height - 1, time)
    return place + bytes([NO_BLENDING]) + buffer.getvalue()[12:]  # after RIFF, its length, and WEBP


def _three(*numbers: int) -> bytes:
    return b"".join(int(number).to_bytes(3, "little") for number in numbers)


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
