"""Which motion the places of an object are, and how fast it is: read from a :class:`Reading`, no learnt classifier."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.data.world.motions import DIRECTIONS
from stiv_deploy.stiv_ref.data.world.reading import Reading
from stiv_deploy.stiv_ref.world_settings import SIDE, Motion

LEAST_SHARE = 0.75
"""Share of the frames in which the object must be found for its motion to be read."""
STILL, STRAY = 1.2, 1.6
"""Pixels of a picture of :data:`SIDE`: how far a still object may be from its middle, and one in a line from that."""
LEAST_GROWTH = 0.08
"""Change of the radius, relative to its mean, from which on an object grows or shrinks."""
OCTANT = math.cos(math.radians(20))
"""Cosine of how far from its direction a motion in a line may be."""
FLAT, ROUND = 0.2, 0.25
"""Spread across the main axis, relative to that along it: at most of what goes to and fro, at least of an orbit."""
EVEN = (0.4, 1.6)
"""Turns of an orbit between its frames, relative to the usual one."""


@dataclass(frozen=True, kw_only=True)
class Movement:
    """What moves how: ``motion``, ``None`` for none of the world's; its ``speed`` in pixels a frame (of the radius, if
    it grows or shrinks); the longest ``jump`` from one frame to the next beyond the usual step, in pixels.
    """

    motion: Motion | None
    speed: float
    jump: float


def movement(reading: Reading, side: int) -> Movement:
    """The movement of what was read from frames of ``side`` pixels."""
    there = np.flatnonzero(reading.found)
    if len(there) < max(2, LEAST_SHARE * len(reading.found)):
        return Movement(motion=None, speed=0.0, jump=math.inf)
    scale = side / SIDE
    places = np.stack([reading.x, reading.y], 1)[there] / scale
    radii = reading.radius[there] / scale
    times = there.astype(np.float64)
    motion = _motion(times, places, radii)
    speed = _radius_speed(times, radii) if motion in ("grow", "shrink") else _speed(times, places, motion)
    return Movement(motion=motion, speed=scale * speed, jump=scale * _jump(times, places, radii))


def _motion(times: NDArray[np.float64], places: NDArray[np.float64], radii: NDArray[np.float64]) -> Motion | None:
    extent = float(np.hypot(*(places - (places.max(0) + places.min(0)) / 2).T).max())
    growth = _slope(times, radii) * np.ptp(times) / radii.mean()
    if extent <= STILL:
        if abs(growth) < LEAST_GROWTH:
            return "stay"
        return "grow" if growth > 0 else "shrink"
    if abs(growth) > 2 * LEAST_GROWTH:
        return None
    return _line(times, places) or _return(places)


def _slope(times: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """Of the line through ``values`` [F], per frame."""
    centred = times - times.mean()
    return float(centred @ values / (centred @ centred))


def _line(times: NDArray[np.float64], places: NDArray[np.float64]) -> Motion | None:
    slopes = np.array([_slope(times, axis) for axis in places.T])
    centred = times - times.mean()
    stray = np.hypot(*(places - places.mean(0) - centred[:, None] * slopes).T).max()
    length = float(np.hypot(*slopes))
    if stray > STRAY or length * np.ptp(times) < STILL:
        return None
    cosines = {name: float(slopes @ sign) / (math.hypot(*sign) * length) for name, sign in DIRECTIONS.items()}
    best = max(cosines, key=lambda name: cosines[name])
    return best if cosines[best] >= OCTANT else None


def _return(places: NDArray[np.float64]) -> Motion | None:
    """To and fro along an axis, or round."""
    centred = places - places.mean(0)
    minor, major = np.sqrt(np.maximum(np.linalg.eigvalsh(centred.T @ centred / len(centred)), 0))
    along = np.ptp(centred, axis=0)
    if minor <= FLAT * major and along.min() <= 2 * STILL:
        return "bounce" if _turns_at_ends(places[:, along.argmax()]) else None
    return "orbit" if minor >= ROUND * major and _round(places) else None


def _turns_at_ends(line: NDArray[np.float64]) -> bool:
    """Whether ``line`` [F] turns about, and only within a step or so of its ends."""
    steps = np.diff(line)
    turns = 1 + np.flatnonzero((steps[:-1] > 0) != (steps[1:] > 0))
    to_end = np.minimum(line - line.min(), line.max() - line)[turns]
    return bool(len(turns)) and float(to_end.max()) <= max(STRAY, float(np.abs(steps).max()))


def _round(places: NDArray[np.float64]) -> bool:
    """Whether ``places`` [F, 2] lie on a circle, in turn."""
    ones = np.column_stack([2 * places, np.ones(len(places))])
    (x, y, rest), *_ = np.linalg.lstsq(ones, (places**2).sum(1), rcond=None)
    radius = math.sqrt(max(rest + x * x + y * y, 0))
    apart = np.hypot(places[:, 0] - x, places[:, 1] - y)
    turns = np.diff(np.unwrap(np.arctan2(places[:, 1] - y, places[:, 0] - x)))
    even = turns / (np.median(turns) or math.inf)
    steady = EVEN[0] <= even.min() and even.max() <= EVEN[1]
    return bool(np.abs(apart - radius).max() <= STRAY and steady and abs(turns.sum()) > math.pi / 2)


def _radius_speed(times: NDArray[np.float64], radii: NDArray[np.float64]) -> float:
    return abs(_slope(times, radii))


def _speed(times: NDArray[np.float64], places: NDArray[np.float64], motion: Motion | None) -> float:
    """Pixels a frame: of the fitted line, or the usual step where it turns."""
    if motion in DIRECTIONS:
        return math.hypot(*(_slope(times, axis) for axis in places.T))
    return float(np.median(_steps(times, places)))


def _steps(times: NDArray[np.float64], places: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.hypot(*np.diff(places, axis=0).T) / np.diff(times)


def _jump(times: NDArray[np.float64], places: NDArray[np.float64], radii: NDArray[np.float64]) -> float:
    steps, growth = _steps(times, places), np.abs(np.diff(radii)) / np.diff(times)
    return float(max((steps - np.median(steps)).max(), (growth - np.median(growth)).max(), 0.0))
