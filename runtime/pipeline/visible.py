"""How much a clip is enlarged where nobody says: what is watched gets a size that can be seen."""

from pathlib import Path

WATCHED = (".mp4", ".gif", ".webp")
"""Extensions of what is watched; PNG frames stay as the model made them, since they may be given to it again."""
SMALL = 128
"""Pixels of the shorter side from which on a clip is large enough."""
VISIBLE = 256
"""Least pixels of the shorter side of an enlarged clip, as far as the longer one has no more than ``LARGEST``."""
LARGEST = 2048


def upscale_for(path: str | Path, height: int, width: int, asked: int | None = None) -> int:
    """How many times each pixel is repeated, both ways, in the file ``path`` of frames of that size.

    ``asked``, or the smallest whole factor that makes a small clip visible.
    """
    if asked is not None:
        return asked
    return visible_factor(min(height, width), max(height, width)) if Path(path).suffix.lower() in WATCHED else 1


def visible_factor(short: int, long: int) -> int:
    """The factor for clips whose shorter side is ``short``, in pictures whose longer side is ``long``."""
    return 1 if short >= SMALL else max(1, min(-(-VISIBLE // short), LARGEST // long))
