"""Clips in: video files, animations and folders of pictures, frame by frame, as 8-bit sRGB pixels.

A file is read once to count its frames, and again for the frames, so that no clip is in memory whole.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stiv_deploy.runtime.bundle.bounds import SIZE_LIMIT
from stiv_deploy.runtime.errors import RequestError, one_line
from stiv_deploy.runtime.files import parse_json, sha256
from stiv_deploy.runtime.pipeline.images import Fit, fitted_image
from stiv_deploy.runtime.pipeline.media import read_comment
from stiv_deploy.runtime.pipeline.pictures import image_pixels, on_background, read_picture, rgb_of, unwarned

ANIMATIONS = (".gif", ".webp")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".avif")
"""What a folder of frames may hold; such a file alone is no clip."""


@dataclass(frozen=True)
class Film:
    """A clip that can be read: ``frames`` of it, and the SHA-256 (hex) of its file, or of all files of a folder.

    If it is one of ours, ``made`` is the height and width that it was made at (what it was enlarged by is undone), and
    ``prompt`` that of its record; the empty one else.
    """

    path: Path
    frames: int
    sha256: str
    made: tuple[int, int] | None = None
    prompt: str = ""

    def windows(
        self, most: int, height: int, width: int, fit: Fit = Fit.EXACT, background: str = "black"
    ) -> Iterator[np.ndarray]:
        """All frames uint8 [N, height, width, 3], at most ``most`` at a time, made to fit as pictures are.

        Raises :class:`RequestError`, possibly after some frames.
        """
        held: list[np.ndarray] = []
        for number, pixels in enumerate(_frames(self.path, background)):
            name = f"{self.path}: frame {number}"
            behind = rgb_of(background)
            held.append(fitted_image(_as_made(pixels, self.made), height, width, fit, name, behind, tell=number == 0))
            if len(held) == most:
                yield np.stack(held)
                held = []
        if held:
            yield np.stack(held)


def open_film(path: str | Path) -> Film:
    """The clip at ``path``, all of it decoded once; :class:`RequestError` if it is none, or cannot be read."""
    path = Path(path)
    frames = 0
    for frames, _ in enumerate(_frames(path, "black"), 1):
        if frames > SIZE_LIMIT:
            raise RequestError(f"{path}: has more than {SIZE_LIMIT} frames; cut it")
    if not frames:
        raise RequestError(f"{path}: has no frames; give a clip")
    record = _record(path)
    return Film(path, frames, _digest(path), _made(record), _prompt(record))


def _record(path: Path) -> Mapping[str, Any]:
    """The request, or that of all its clips, in the record that a clip of ours carries; else nothing."""
    try:
        record = parse_json(read_comment(path))
        request = record.get("request") or record["template"]
    except (RequestError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return request if isinstance(request, dict) else {}


def _made(record: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = record.get("height"), record.get("width")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    return None


def _prompt(record: Mapping[str, Any]) -> str:
    prompt = record.get("prompt")
    return prompt if isinstance(prompt, str) else ""


def _as_made(pixels: np.ndarray, made: tuple[int, int] | None) -> np.ndarray:
    """``pixels`` with each square of equal ones as one again, and without what makes an mp4's sides even."""
    height, width = made or pixels.shape[:2]
    factor = pixels.shape[0] // height
    if factor < 1 or pixels.shape[1] // width != factor or made is None:
        return pixels
    squares = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.rint(squares.mean(axis=(1, 3))).astype(np.uint8)


def _digest(path: Path) -> str:
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    for each in _pictures(path):
        digest.update(f"{sha256(each)} {each.name}\n".encode())
    return digest.hexdigest()


def _pictures(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.suffix.lower() in PICTURES)


def _frames(path: Path, background: str) -> Iterator[np.ndarray]:
    """Frames uint8 [H, W, 3] of ``path``."""
    if path.is_dir():
        yield from (read_picture(each, background) for each in _pictures(path))
    elif not path.is_file():
        raise RequestError(f"{path}: no such clip; give a video file, a GIF, a WebP or a folder of pictures")
    elif path.suffix.lower() in ANIMATIONS:
        yield from _animation(path, background)
    elif path.suffix.lower() in PICTURES:
        raise RequestError(f"{path}: is a picture and a clip is wanted; give a video file, or a folder of pictures")
    else:
        yield from _video(path)


def _animation(path: Path, background: str) -> Iterator[np.ndarray]:
    with _told(path):
        image = Image.open(path, formats=("GIF", "WEBP"))
    with image:
        with _told(path):
            count = getattr(image, "n_frames", 1)
        for number in range(count):
            with _told(path):
                image.seek(number)
                copy = image.copy()
            yield on_background(image_pixels(copy, str(path)), background)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """An error of Pillow as :class:`RequestError`. One thread at a time is inside, so nothing is yielded from there."""
    try:
        with unwarned():
            yield
    except Exception as error:  # on damage Pillow raises any of a dozen kinds
        raise RequestError(f"{path}: cannot be read as a clip ({one_line(str(error), 200)})") from None


def _video(path: Path) -> Iterator[np.ndarray]:
    import av

    try:
        # only this file: what calls itself .mp4 may be a playlist that points anywhere
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=options, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise RequestError(f"{path}: has no video in it; give a clip")
            for frame in container.decode(container.streams.video[0]):
                pixels = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
                yield np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
    except (av.FFmpegError, OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{path}: cannot be read as a video ({one_line(str(reason), 200)})") from None
