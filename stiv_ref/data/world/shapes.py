"""Shapes: how much of each pixel they cover, by signed distances and one pixel of anti-aliasing.

Only operations that are exact to the last bit (sums, products, roots, comparisons): a value does not depend on what
else is in the array.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.world_settings import Shape

Plane = NDArray[np.float32]
"""Of pixels [..., h, w], or what is spread to that."""
Radius = Plane | np.float32
REACH = 1.3
"""A shape lies within so many radii of its centre, along each axis."""

_SIN, _COS = np.float32(math.sin(math.pi / 5)), np.float32(math.cos(math.pi / 5))
_SLOPE = np.float32(math.sqrt(0.75))


def _circle(x: Plane, y: Plane, r: Radius) -> Plane:
    return np.sqrt(x * x + y * y) - r


def _square(x: Plane, y: Plane, r: Radius) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.9) * r


def _triangle(x: Plane, y: Plane, r: Radius) -> Plane:
    """Point up, centre of mass in the middle: half-planes at 0.6 of a radius."""
    sides = _SLOPE * np.abs(x) - np.float32(0.5) * y
    return np.maximum(sides, y) - np.float32(0.62) * r


def _ring(x: Plane, y: Plane, r: Radius) -> Plane:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.85) * r) - np.float32(0.25) * r


def _cross(x: Plane, y: Plane, r: Radius) -> Plane:
    x, y = np.abs(x), np.abs(y)
    thick = np.float32(0.36) * r
    return np.maximum(np.minimum(x, y) - thick, np.maximum(x, y) - np.float32(1.1) * r)


def _star(x: Plane, y: Plane, r: Radius) -> Plane:
    """Five points, one up: folded onto the right half of the top one by two mirrors, then one edge is left."""
    x, y = np.abs(x), -y
    x, y = _mirrored(x, y, _COS, -_SIN)
    x, y = _mirrored(x, y, -_COS, -_SIN)
    x = np.abs(x)
    # From the tip (0, R) to the notch (0.46 R sin 36, 0.46 R cos 36), R = 1.28 r.
    across, down = 0.46 * math.sin(math.pi / 5), 0.46 * math.cos(math.pi / 5) - 1
    length = math.hypot(across, down)
    below: Plane = y - np.float32(1.28) * r
    aside: Plane = np.float32(-down / length) * x
    return aside + np.float32(across / length) * below


def _mirrored(x: Plane, y: Plane, normal_x: np.float32, normal_y: np.float32) -> tuple[Plane, Plane]:
    """What lies on the normal's side is mirrored to the other."""
    beyond = np.float32(2) * np.maximum(x * normal_x + y * normal_y, np.float32(0))
    return x - beyond * normal_x, y - beyond * normal_y


_DISTANCES: dict[Shape, Callable[[Plane, Plane, Radius], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}


def coverage(shape: Shape, x: Plane, y: Plane, radius: Radius) -> Plane:
    """Share fp32 in [0, 1] of each pixel in the shape; ``x`` (right) and ``y`` (down) from its centre, in pixels."""
    distance = _DISTANCES[shape](x, y, radius)
    return np.clip(np.float32(0.5) - distance, np.float32(0), np.float32(1))
