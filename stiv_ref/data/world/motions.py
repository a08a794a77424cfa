"""Motions: where the object is, and how large, at every time of a scene. Times are frames, places are pixels.

Speeds do not depend on the frame stride, so that a larger one shows larger steps, but are lowered where the object
would leave the picture in the span of the scene, or turn too often to be followed in some sixteen frames of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from stiv_deploy.stiv_ref.data.world.draws import Draws
from stiv_deploy.stiv_ref.data.world.shapes import REACH
from stiv_deploy.stiv_ref.world_settings import SIDE, Motion

Place = tuple[float, float, float]
"""x (right) and y (down) of the centre, and the radius."""
Route = Callable[[float], Place]
"""Place by time."""

DIRECTIONS: dict[Motion, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
}
"""Motion in a line -> sign along (x, y)."""
SPEED = (0.8, 1.6)
"""Of motions in a line, in pixels a frame of a picture of :data:`SIDE`; along each axis less if in a diagonal."""
DIAGONAL = 0.75
BOUNCE_SPEED, BOUNCE_WAY = (1.6, 2.4), (10.0, 16.0)
ORBIT_RADIUS, ORBIT_PERIOD = (7.0, 11.0), (14.0, 20.0)
GROWTH = (0.25, 0.45)
LARGEST = 13.0
"""Radius in pixels of a picture of :data:`SIDE`."""
STILL_SPAN = 15.0
"""Frames that the scene of a still picture lasts."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """The way of an object: ``speed`` in pixels a frame (of the radius, if it grows or shrinks), ``at`` each time."""

    motion: Motion
    speed: float
    at: Route


@dataclass(frozen=True)
class Stage:
    """What a motion is drawn for: a picture of ``side`` pixels, a ``span`` in frames, a ``radius``; ``least`` one."""

    side: int
    span: float
    radius: float
    least: float

    @property
    def scale(self) -> float:
        """Pixels for each of a picture of :data:`SIDE`."""
        return self.side / SIDE

    def lowest(self, radius: float) -> float:
        """Smallest place along an axis of an object that must not touch the edge."""
        return REACH * radius + 1.5 * self.scale

    def room(self, radius: float) -> float:
        """Pixels along an axis that the centre has."""
        return self.side - 2 * self.lowest(radius)

    def anywhere(self, draws: Draws, radius: float, less: float = 0.0) -> float:
        """A place along an axis with ``less`` pixels free on both sides."""
        return draws.between(self.lowest(radius) + less, self.side - self.lowest(radius) - less)


def draw_track(motion: Motion, stage: Stage, draws: Draws) -> Track:
    """A way of that motion."""
    if motion in DIRECTIONS:
        return _line(motion, stage, draws)
    return {"bounce": _bounce, "orbit": _orbit, "grow": _growth, "shrink": _growth, "stay": _stay}[motion](
        motion, stage, draws
    )


def _line(motion: Motion, stage: Stage, draws: Draws) -> Track:
    signs = DIRECTIONS[motion]
    room = stage.room(stage.radius)
    wanted = stage.scale * draws.between(*SPEED) * (DIAGONAL if all(signs) else 1.0)
    travel = min(wanted * stage.span, room * draws.between(0.75, 1.0))
    speed = travel / stage.span
    starts = [_start(sign, travel, room, draws) + stage.lowest(stage.radius) for sign in signs]

    def at(time: float) -> Place:
        return starts[0] + signs[0] * speed * time, starts[1] + signs[1] * speed * time, stage.radius

    return Track(motion=motion, speed=math.hypot(*signs) * speed, at=at)


def _start(sign: int, travel: float, room: float, draws: Draws) -> float:
    free = draws.between(0.0, room - abs(sign) * travel)
    return free + travel if sign < 0 else free


def _bounce(motion: Motion, stage: Stage, draws: Draws) -> Track:
    """To and fro along an axis at one speed; it turns well within the span."""
    axis, room = draws.below(2), stage.room(stage.radius)
    way = min(stage.scale * draws.between(*BOUNCE_WAY), room)
    half = way / (stage.scale * draws.between(*BOUNCE_SPEED))
    half = min(max(half, stage.span / 6), 0.6 * stage.span)
    way = min(way, half * stage.scale * BOUNCE_SPEED[1])
    phase = draws.between(0.0, 2.0)
    middle = stage.anywhere(draws, stage.radius, way / 2)
    other = stage.anywhere(draws, stage.radius)

    def at(time: float) -> Place:
        place = middle + way * (abs((phase + time / half) % 2.0 - 1.0) - 0.5)
        return (place, other, stage.radius) if axis == 0 else (other, place, stage.radius)

    return Track(motion=motion, speed=way / half, at=at)


def _orbit(motion: Motion, stage: Stage, draws: Draws) -> Track:
    circle = min(stage.scale * draws.between(*ORBIT_RADIUS), stage.room(stage.radius) / 2)
    period = min(max(draws.between(*ORBIT_PERIOD), stage.span / 4), 1.4 * stage.span)
    turn = 2 * math.pi / period * (1 if draws.unit() < 0.5 else -1)
    phase = draws.between(0.0, 2 * math.pi)
    x, y = stage.anywhere(draws, stage.radius, circle), stage.anywhere(draws, stage.radius, circle)

    def at(time: float) -> Place:
        angle = phase + turn * time
        return x + circle * math.cos(angle), y + circle * math.sin(angle), stage.radius

    return Track(motion=motion, speed=circle * abs(turn), at=at)


def _growth(motion: Motion, stage: Stage, draws: Draws) -> Track:
    largest = LARGEST * stage.scale
    change = min(stage.scale * draws.between(*GROWTH) * stage.span, (largest - stage.least) * draws.between(0.75, 1.0))
    low = draws.between(stage.least, largest - change)
    first, slope = (low, change / stage.span) if motion == "grow" else (low + change, -change / stage.span)
    x, y = stage.anywhere(draws, low + change), stage.anywhere(draws, low + change)
    return Track(motion=motion, speed=abs(slope), at=lambda time: (x, y, first + slope * time))


def _stay(motion: Motion, stage: Stage, draws: Draws) -> Track:
    x, y = stage.anywhere(draws, stage.radius), stage.anywhere(draws, stage.radius)
    return Track(motion=motion, speed=0.0, at=lambda _: (x, y, stage.radius))
