"""Several clips as one: side by side in rows, each above its label."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.pipeline.media import enlarge
from stiv_deploy.runtime.pipeline.visible import visible_factor

GAP, LABEL = 12, 26
"""Pixels between clips, and of the line under each."""
BACKGROUND, INK = (24, 24, 27), (228, 228, 231)
LABEL_LIMIT = 200
"""Most characters of a label that are looked at."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def columns_of(count: int) -> int:
    """Clips in a row of a grid of ``count``: about as many as there are rows."""
    return math.ceil(math.sqrt(count))


def grid_upscale(count: int, height: int, width: int, asked: int | None = None) -> int:
    """How many times each pixel of ``count`` clips of that size is repeated: ``asked``, or so that they are visible."""
    columns = columns_of(count)
    longest = max(columns * width, -(-count // columns) * height)
    return visible_factor(min(height, width), longest) if asked is None else asked


def grid_sides(count: int, height: int, width: int, columns: int | None = None) -> tuple[int, int]:
    """Height and width in pixels of a grid of ``count`` clips of that size."""
    columns = columns or columns_of(count)
    return -(-count // columns) * (height + LABEL + GAP) + GAP, columns * (width + GAP) + GAP


def grid(
    clips: Sequence[np.ndarray], labels: Sequence[str], upscale: int = 1, columns: int | None = None
) -> np.ndarray:
    """One clip, uint8 [F, height, width, 3] of :func:`grid_sides`, of enlarged ``clips``, uint8 [F, H, W, 3].

    Raises :class:`OutputError` for clips of more than one shape.
    """
    if len({clip.shape for clip in clips}) != 1 or len(labels) != len(clips):
        raise OutputError(f"a grid wants clips of one shape and a label each, got {[clip.shape for clip in clips]}")
    frames, height, width, _ = clips[0].shape
    height, width = height * upscale, width * upscale
    columns = columns or columns_of(len(clips))
    sides = grid_sides(len(clips), height, width, columns)
    places = [
        (GAP + at % columns * (width + GAP), GAP + at // columns * (height + LABEL + GAP)) for at in range(len(clips))
    ]
    sheet = Image.new("RGB", sides[::-1], BACKGROUND)
    for (left, top), label in zip(places, labels, strict=True):
        _write(sheet, label, (left + width / 2, top + height + LABEL / 2), width)
    made = np.repeat(np.asarray(sheet)[None], frames, axis=0)
    for (left, top), clip in zip(places, clips, strict=True):
        made[:, top : top + height, left : left + width] = enlarge(clip, upscale)
    return made


def _write(sheet: Image.Image, label: str, middle: tuple[float, float], width: int) -> None:
    """``label`` in one line around ``middle``, no wider than its clip."""
    font = ImageFont.load_default(LABEL - 12)
    ImageDraw.Draw(sheet).text(
        middle, fitted(" ".join(label[:LABEL_LIMIT].split()), font, width), INK, font, anchor="mm"
    )


def fitted(label: str, font: Font, width: int) -> str:
    """``label``, or as much of its start as fits into ``width`` pixels, with dots for the rest."""
    if font.getlength(label) <= width:
        return label
    kept = next((end for end in range(len(label) - 1, 0, -1) if font.getlength(label[:end] + "...") <= width), 0)
    return label[:kept] + "..." if kept else ""
