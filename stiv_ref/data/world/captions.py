"""Captions of the world: a small grammar with several wordings, some of which leave size or motion out.

Each is at most ten words, all of them in :func:`words`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from stiv_deploy.stiv_ref.data.world.draws import Draws
from stiv_deploy.stiv_ref.world_settings import MOTIONS, SHAPES, Motion, Shape

Size = Literal["small", "big"]
Colour = Literal["red", "green", "blue", "yellow", "cyan", "magenta", "orange", "white"]
COLOURS: dict[Colour, tuple[float, float, float]] = {
    "red": (0.95, 0.12, 0.10),
    "green": (0.15, 0.90, 0.20),
    "blue": (0.15, 0.30, 1.00),
    "yellow": (1.00, 0.92, 0.10),
    "cyan": (0.10, 0.92, 0.95),
    "magenta": (0.95, 0.15, 0.90),
    "orange": (1.00, 0.52, 0.05),
    "white": (0.96, 0.96, 0.96),
}
"""Red, green and blue in [0, 1]; each is far brighter than any background."""
WITHOUT_MOTION = 0.1
"""Share of captions of moving clips that do not tell the motion."""
WITHOUT_SIZE = 0.5

_WAYS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up",),
    "down": ("down",),
    "up-left": ("up left", "up and left"),
    "up-right": ("up right", "up and right"),
    "down-left": ("down left", "down and left"),
    "down-right": ("down right", "down and right"),
}
_VERBS: dict[Motion, tuple[tuple[str, str], ...]] = {
    "bounce": (("bounces", "bouncing"), ("goes back and forth", "going back and forth")),
    "orbit": (("orbits", "orbiting"), ("goes around", "going around")),
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller")),
    "stay": (("stays", "staying"), ("stands still", "standing still")),
}
"""Wordings of each motion: what it does, and what it is doing."""
_STILLS = ("{a} {noun}", "the {noun}", "{noun}")
_FORMS = ("{a} {noun} {does}", "the {noun} {does}", "the {noun} is {doing}", "{a} {noun} {doing}", "{noun} {doing}")


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a caption tells; ``None`` for what it leaves out."""

    colour: Colour
    shape: Shape
    size: Size | None = None
    motion: Motion | None = None


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption, and what it tells."""

    text: str
    told: Told


def verbs(motion: Motion) -> tuple[tuple[str, str], ...]:
    """All wordings of ``motion``: what the object does, and what it is doing."""
    if motion in _VERBS:
        return _VERBS[motion]
    pairs = (("moves", "moving"), ("goes", "going"))
    return tuple((f"{does} {way}", f"{doing} {way}") for does, doing in pairs for way in _WAYS[motion])


def noun(told: Told) -> str:
    """The object in words."""
    return " ".join(filter(None, (told.size, told.colour, told.shape)))


def draw_caption(truth: Told, draws: Draws) -> Caption:
    """A caption that tells of ``truth``, what is ``None`` in it never, and size and motion not always."""
    without_size, without_motion = draws.unit() < WITHOUT_SIZE, draws.unit() < WITHOUT_MOTION
    told = Told(
        colour=truth.colour,
        shape=truth.shape,
        size=None if without_size else truth.size,
        motion=None if without_motion else truth.motion,
    )
    return word(told, draws)


def word(told: Told, draws: Draws) -> Caption:
    """A caption that tells all of ``told``."""
    thing = noun(told)
    article = "an" if thing[0] in "aeiou" else "a"
    if told.motion is None:
        return Caption(text=draws.choice(_STILLS).format(noun=thing, a=article), told=told)
    does, doing = draws.choice(verbs(told.motion))
    return Caption(text=draws.choice(_FORMS).format(noun=thing, a=article, does=does, doing=doing), told=told)


@cache
def words() -> tuple[str, ...]:
    """The vocabulary, sorted: the same whatever a recipe leaves out of the world."""
    parts = ["a an the is", "small big", *COLOURS, *SHAPES]
    parts += [part for motion in MOTIONS for pair in verbs(motion) for part in pair]
    return tuple(sorted({each for part in parts for each in part.split()}))
