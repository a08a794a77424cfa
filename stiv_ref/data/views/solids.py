"""Shaded solids by azimuth and elevation, cast ray by ray, in parallel projection.

A point is x, y, z with z up; a camera at ``azimuth`` and ``elevation`` (degrees) looks at the origin, at azimuth 0
along -x. Only operations that are exact to the last bit are done on arrays. The light stands by the camera, to its
upper left. A wedge of each solid, around azimuth ``mark``, has another colour: it tells how a round one is turned.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.world_settings import Solid

Plane = NDArray[np.float32]
Vector = tuple[float, float, float]
Point = tuple[Plane, Plane, Plane]
"""x, y and z of points or normals."""
WEDGE = math.cos(math.radians(40))
"""Cosine of half the angle of the mark."""
AMBIENT = 0.35
LIGHT = (-0.4, 0.5, 0.77)
"""Towards the light: right, up, and towards the camera; of length 1."""
EXTENT = 1.25
"""What a picture shows: from -EXTENT to EXTENT; solids lie within 1 of the origin."""
MARCH = 24
"""Steps of a ray to a torus."""
TOUCH = 0.02
"""A ray this near is at the torus."""


class View(NamedTuple):
    """Where a camera stands, in degrees."""

    azimuth: float
    elevation: float


class Rays(NamedTuple):
    """Parallel rays: the points ``origin`` + s ``toward``, origin x, y, z [H, W]; the largest s is seen."""

    x: Plane
    y: Plane
    z: Plane
    toward: Vector

    def at(self, s: Plane) -> Point:
        """The points at ``s``."""
        a, b, c = (np.float32(each) for each in self.toward)
        return self.x + a * s, self.y + b * s, self.z + c * s


class Surface(NamedTuple):
    """Where rays hit, bool [H, W]; the points and outward normals there, x, y, z [H, W] each."""

    hit: NDArray[np.bool_]
    point: Point
    normal: Point


class Axes(NamedTuple):
    """Right, up, and towards the camera."""

    right: Vector
    up: Vector
    toward: Vector


def axes_of(view: View) -> Axes:
    """The axes of a camera."""
    a, e = math.radians(view.azimuth), math.radians(view.elevation)
    toward = (math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e))
    up = (-math.sin(e) * math.cos(a), -math.sin(e) * math.sin(a), math.cos(e))
    return Axes((-math.sin(a), math.cos(a), 0.0), up, toward)


def rays_of(axes: Axes, side: int) -> Rays:
    """A ray through the middle of each of ``side`` x ``side`` pixels."""
    places = ((np.arange(side) + 0.5) * (2 * EXTENT / side) - EXTENT).astype(np.float32)
    u, v = places[None, :], -places[:, None]
    x, y, z = (np.float32(right) * u + np.float32(up) * v for right, up in zip(axes.right, axes.up, strict=True))
    return Rays(x, y, z, axes.toward)


NEVER, ALWAYS = np.float32(-9), np.float32(9)


class Span(NamedTuple):
    """Where rays are inside of something convex, from s ``low`` to ``high``, each [H, W] or one value for all.

    ``flat`` is its normal if it is a plane; else ``curved`` gives the normals at points.
    """

    low: Plane | np.float32
    high: Plane | np.float32
    flat: Vector | None = None
    curved: Callable[[Point], Point] | None = None


def _half(rays: Rays, normal: Vector, distance: float) -> Span:
    """Inside of a plane: ``normal`` . p <= ``distance``."""
    slope = sum(a * b for a, b in zip(normal, rays.toward, strict=True))
    x, y, z = (np.float32(each) for each in normal)
    room = np.float32(distance) - (x * rays.x + y * rays.y + z * rays.z)
    if abs(slope) < 1e-6:
        return Span(np.where(room >= 0, NEVER, ALWAYS), np.where(room >= 0, ALWAYS, NEVER), normal)
    edge = room / np.float32(slope)
    return Span(NEVER, edge, normal) if slope > 0 else Span(edge, ALWAYS, normal)


def _quadric(rays: Rays, weights: Vector, top: float, constant: float) -> Span:
    """Inside of a x^2 + b y^2 + c (z - top)^2 <= ``constant``, with ``weights`` a, b, c."""
    origins = (rays.x, rays.y, rays.z - np.float32(top))
    a = np.float32(sum(weight * d * d for weight, d in zip(weights, rays.toward, strict=True)))
    pairs = list(zip((np.float32(w) for w in weights), origins, (np.float32(d) for d in rays.toward), strict=True))
    b = pairs[0][0] * pairs[0][1] * pairs[0][2] + pairs[1][0] * pairs[1][1] * pairs[1][2]
    b = b + pairs[2][0] * pairs[2][1] * pairs[2][2]
    c = pairs[0][0] * origins[0] * origins[0] + pairs[1][0] * origins[1] * origins[1]
    c = c + pairs[2][0] * origins[2] * origins[2] - np.float32(constant)
    inner = b * b - a * c
    root = np.sqrt(np.maximum(inner, np.float32(0)))
    low, high = (-b - root) / a, (-b + root) / a
    missed = inner < 0

    def normal(point: Point) -> Point:
        x, y, z = (np.float32(w) * p for w, p in zip(weights, (*point[:2], point[2] - np.float32(top)), strict=True))
        length = np.maximum(np.sqrt(x * x + y * y + z * z), np.float32(1e-6))
        return x / length, y / length, z / length

    return Span(np.where(missed, ALWAYS, low), np.where(missed, NEVER, high), curved=normal)


def _convex(rays: Rays, spans: Sequence[Span]) -> Surface:
    """What is inside of all ``spans``: seen is where the first of them ends."""
    low, high = np.full_like(rays.x, NEVER), np.full_like(rays.x, ALWAYS)
    for span in spans:
        low, high = np.maximum(low, span.low), np.minimum(high, span.high)
    hit = high > low
    point = rays.at(np.where(hit, high, np.float32(0)))
    normal: Point = (np.zeros_like(rays.x),) * 3
    for span in spans:
        if span.high is not ALWAYS:  # a plane that looks away is not seen
            here = np.asarray(span.high <= high)
            values = span.flat if span.curved is None else span.curved(point)
            assert values is not None
            normal = _chosen(here, values, normal)
    return Surface(hit, point, normal)


def _chosen(here: NDArray[np.bool_], new: Point | Vector, old: Point) -> Point:
    x, y, z = (np.where(here, np.asarray(a, np.float32), b) for a, b in zip(new, old, strict=True))
    return x, y, z


def _slab(rays: Rays, low: float, high: float) -> list[Span]:
    return [_half(rays, (0, 0, 1), high), _half(rays, (0, 0, -1), -low)]


def _cube(rays: Rays) -> Surface:
    half = 0.57
    walls = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0)]
    return _convex(rays, [_half(rays, wall, half) for wall in walls] + _slab(rays, -half, half))


def _sphere(rays: Rays) -> Surface:
    return _convex(rays, [_quadric(rays, (1, 1, 1), 0, 0.8**2)])


def _cylinder(rays: Rays) -> Surface:
    return _convex(rays, [_quadric(rays, (1, 1, 0), 0, 0.58**2), *_slab(rays, -0.75, 0.75)])


def _cone(rays: Rays) -> Surface:
    """From z = -0.6 to its tip at 0.9, half as wide as high."""
    return _convex(rays, [_quadric(rays, (1, 1, -0.25), 0.9, 0), *_slab(rays, -0.6, 0.9)])


def _pyramid(rays: Rays) -> Surface:
    slope = math.hypot(1, 0.5)
    walls: list[Vector] = [(1, 0, 0.5), (-1, 0, 0.5), (0, 1, 0.5), (0, -1, 0.5)]
    sides = [_half(rays, tuple(each / slope for each in wall), 0.4 / slope) for wall in walls]  # type: ignore[arg-type]
    return _convex(rays, [*sides, _half(rays, (0, 0, -1), 0.6)])


def _octahedron(rays: Rays) -> Surface:
    third = math.sqrt(1 / 3)
    walls = [(x * third, y * third, z * third) for x in (1, -1) for y in (1, -1) for z in (1, -1)]
    return _convex(rays, [_half(rays, wall, 0.95 * third) for wall in walls])


def _torus(rays: Rays) -> Surface:
    """Marched from the camera: each step as long as the distance to the torus."""
    ring, thick = np.float32(0.6), np.float32(0.28)
    s = np.full_like(rays.x, np.float32(1.3))

    def distance(point: Point) -> Point:
        x, y, z = point
        flat = np.sqrt(x * x + y * y)
        across = flat - ring
        return np.sqrt(across * across + z * z) - thick, across, flat

    for _ in range(MARCH):
        s = s - distance(rays.at(s))[0]
    point = rays.at(s)
    left, across, flat = distance(point)
    flat = np.maximum(flat, np.float32(1e-6))
    x, y, z = point[0] * across / flat, point[1] * across / flat, point[2]
    length = np.maximum(np.sqrt(x * x + y * y + z * z), np.float32(1e-6))
    return Surface(left < np.float32(TOUCH), point, (x / length, y / length, z / length))


_SOLIDS: dict[Solid, Callable[[Rays], Surface]] = {
    "cube": _cube,
    "sphere": _sphere,
    "cylinder": _cylinder,
    "cone": _cone,
    "pyramid": _pyramid,
    "octahedron": _octahedron,
    "torus": _torus,
}


class Look(NamedTuple):
    """A solid, its ``scale`` (at most 1), the colours of body, mark and background in [0, 1], where the mark is."""

    solid: Solid
    scale: float
    body: Vector
    marked: Vector
    behind: Vector
    mark: float


def picture(look: Look, view: View, side: int, finer: int = 2) -> NDArray[np.float32]:
    """What a camera sees, fp32 [side, side, 3] in [0, 1]; each pixel is the mean of ``finer`` x ``finer`` rays."""
    axes = axes_of(view)
    rays = _scaled(rays_of(axes, side * finer), look.scale)
    hit, point, normal = _SOLIDS[look.solid](rays)
    light = [sum(amount * axis[each] for amount, axis in zip(LIGHT, axes, strict=True)) for each in range(3)]
    shine = np.float32(light[0]) * normal[0] + np.float32(light[1]) * normal[1] + np.float32(light[2]) * normal[2]
    bright = np.float32(AMBIENT) + np.float32(1 - AMBIENT) * np.maximum(shine, np.float32(0))
    marked = _in_wedge(point, math.radians(look.mark))
    channels = [
        np.where(hit, bright * np.where(marked, np.float32(mark), np.float32(body)), np.float32(behind))
        for body, mark, behind in zip(look.body, look.marked, look.behind, strict=True)
    ]
    return np.stack([_shrunk(channel, finer) for channel in channels], -1)


def _scaled(rays: Rays, scale: float) -> Rays:
    share = np.float32(1 / scale)
    return Rays(rays.x * share, rays.y * share, rays.z * share, rays.toward)


def _in_wedge(point: Point, mark: float) -> NDArray[np.bool_]:
    x, y = point[0], point[1]
    return np.float32(math.cos(mark)) * x + np.float32(math.sin(mark)) * y >= np.float32(WEDGE) * np.sqrt(x * x + y * y)


def _shrunk(values: Plane, by: int) -> Plane:
    """Means of squares of ``by`` x ``by``, summed in one order."""
    parts = [values[row::by, column::by] for row in range(by) for column in range(by)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total * np.float32(1 / by**2)
