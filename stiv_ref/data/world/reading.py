"""What is to be seen in frames of the world, read from their pixels alone: where the object is, its colour, its shape.

Nothing is learnt. The object is what is brighter than any background; how much of each pixel it covers follows from its
colour and that of the background around it, and its shape is the one whose coverage, at the same place and of the same
area, agrees best (soft IoU: the sum of the smaller values over that of the larger).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.data.world.backgrounds import BRIGHTEST
from stiv_deploy.stiv_ref.data.world.captions import COLOURS, Colour
from stiv_deploy.stiv_ref.data.world.motions import LARGEST
from stiv_deploy.stiv_ref.data.world.shapes import REACH, coverage
from stiv_deploy.stiv_ref.world_settings import SHAPES, SIDE, Shape

Pixels = NDArray[np.float32]
"""[F, H, W, 3] in [0, 1]."""
Plane = NDArray[np.float32]
LEAST_MATCH = 0.62
"""Soft IoU from which on a frame shows a shape at all."""
DARK, BRIGHT = BRIGHTEST + 0.08, 0.88
"""Brightest channel of what is surely background, and of what is surely the object."""
AREA = (12.0, 900.0)
"""Bright pixels of a picture of :data:`SIDE` that can be an object: the largest is a square of 550."""
FARTHEST_COLOUR = 0.3
"""Distance in red, green and blue up to which a colour has a name."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What each of F frames shows, all [F].

    ``found``: whether there is an object; ``x``, ``y``, ``radius`` in pixels; ``match``: soft IoU with its ``shapes``
    (numbers in ``SHAPES``); ``colours`` are numbers in ``COLOURS``, -1 for one without a name, ``rgb`` [F, 3] the
    colour itself.
    """

    found: NDArray[np.bool_]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    radius: NDArray[np.float64]
    match: NDArray[np.float64]
    shapes: NDArray[np.int64]
    colours: NDArray[np.int64]
    rgb: NDArray[np.float64]

    @property
    def shown(self) -> NDArray[np.bool_]:
        """Frames that show a shape of a colour."""
        return self.found & (self.match >= LEAST_MATCH) & (self.colours >= 0)

    def names(self, frame: int) -> tuple[Shape, Colour] | None:
        """Shape and colour of a frame; ``None`` if it does not show them."""
        if not self.shown[frame]:
            return None
        return SHAPES[int(self.shapes[frame])], tuple(COLOURS)[int(self.colours[frame])]


def pixels_of(frames: NDArray[np.generic]) -> Pixels:
    """Frames uint8, or floats in [0, 1], [F, H, W, 3], as fp32."""
    if frames.ndim != 4 or frames.shape[1] != frames.shape[2] or frames.shape[3] != 3:
        raise ValueError(f"frames of the world are [F, H, H, 3], got {list(frames.shape)}")
    if frames.dtype == np.uint8:
        return frames.astype(np.float32) * np.float32(1 / 255)
    return np.clip(frames, 0, 1).astype(np.float32)


@cache
def _areas() -> tuple[float, ...]:
    """Areas of the shapes of radius 1."""
    places = np.linspace(-REACH, REACH, 521, dtype=np.float32)[1::2]
    inside = [coverage(shape, places[None] * 100, places[:, None] * 100, np.float32(100)).sum() for shape in SHAPES]
    return tuple(float(count) * (2 * REACH / 260) ** 2 for count in inside)


def read(frames: NDArray[np.generic]) -> Reading:
    """Read frames uint8, or floats in [0, 1], [F, H, H, 3]."""
    pixels = pixels_of(frames)
    side = pixels.shape[1]
    scale = side / SIDE
    bright = np.clip((pixels.max(-1) - np.float32(DARK)) * np.float32(1 / (BRIGHT - DARK)), 0, 1)
    mass = bright.sum((1, 2), dtype=np.float64)
    found = (mass >= AREA[0] * scale**2) & (mass <= AREA[1] * scale**2) & (bright.max((1, 2)) >= 0.5)
    window = min(side, 2 * int(np.ceil(REACH * (LARGEST + 1) * scale)) + 3)
    corners = _corners(bright, mass, window)
    inside, near = _windows(pixels, corners, window), _windows(bright, corners, window)
    rgb = _object_colour(inside, near)
    share = _coverage_of_pixels(inside, near, rgb)
    outside = mass - near.sum((1, 2), dtype=np.float64)
    area = np.maximum(share.sum((1, 2), dtype=np.float64), 1e-6)
    places = np.arange(window) + 0.5
    x = share.sum(1, dtype=np.float64) @ places / area
    y = share.sum(2, dtype=np.float64) @ places / area
    across = (places[None] - x[:, None]).astype(np.float32)[:, None, :]
    down = (places[None] - y[:, None]).astype(np.float32)[:, :, None]
    radii = np.sqrt(area[None] / np.array(_areas())[:, None])
    matches = np.stack(
        [
            _soft_iou(share, coverage(shape, across, down, radius.astype(np.float32)[:, None, None]), area, outside)
            for shape, radius in zip(SHAPES, radii, strict=True)
        ]
    )
    best = matches.argmax(0)
    frame = np.arange(len(pixels))
    return Reading(
        found=found,
        x=x + corners[:, 0],
        y=y + corners[:, 1],
        radius=radii[best, frame],
        match=np.where(found, matches[best, frame], 0.0),
        shapes=best,
        colours=_named(rgb),
        rgb=rgb,
    )


def _corners(bright: Plane, mass: NDArray[np.float64], window: int) -> NDArray[np.int64]:
    """Left and top [F, 2] of a window around the middle of what is bright."""
    side = bright.shape[1]
    places = np.arange(side) + 0.5
    total = np.maximum(mass, 1e-6)
    middles = np.stack([bright.sum(1, dtype=np.float64) @ places, bright.sum(2, dtype=np.float64) @ places], 1)
    middles = np.where(mass[:, None] > 0, middles / total[:, None], side / 2)
    return np.clip(np.floor(middles).astype(np.int64) - window // 2, 0, side - window)


def _windows(values: Plane, corners: NDArray[np.int64], window: int) -> Plane:
    return np.stack(
        [each[top : top + window, left : left + window] for each, (left, top) in zip(values, corners, strict=True)]
    )


def _object_colour(inside: Pixels, near: Plane) -> NDArray[np.float64]:
    """Mean colour [F, 3] of the brightest part of the object."""
    weight = near * near
    weight = (weight * weight).reshape(len(near), 1, -1)
    total = np.maximum(weight.sum(-1), np.float32(1e-6))
    return (weight @ inside.reshape(len(near), -1, 3))[:, 0].astype(np.float64) / total


def _coverage_of_pixels(inside: Pixels, near: Plane, rgb: NDArray[np.float64]) -> Plane:
    """Share [F, w, w] of each pixel that is the object, between the background around it and its colour."""
    behind = _background(inside, _grown(near, 2) <= 0)
    toward = rgb.astype(np.float32)[:, None, None] - behind
    share = ((inside - behind) * toward).sum(-1) / np.maximum((toward * toward).sum(-1), np.float32(1e-3))
    share = np.where(_grown(near, 2) > 0, np.clip(share, 0, 1), np.float32(0))
    return np.where(share < np.float32(0.1), np.float32(0), share)


def _grown(near: Plane, by: int) -> Plane:
    """The largest value within ``by`` pixels along the axes."""
    for axis in (1, 2):
        grown = near.copy()
        moved = np.moveaxis(grown, axis, 0)
        source = np.moveaxis(near, axis, 0)
        for step in range(1, by + 1):
            np.maximum(moved[step:], source[:-step], out=moved[step:])
            np.maximum(moved[:-step], source[step:], out=moved[:-step])
        near = grown
    return near


def _background(inside: Pixels, still: NDArray[np.bool_]) -> Pixels:
    """The background [F, w, w, 3] behind everything: the plane through the pixels that are ``still``."""
    count, window = inside.shape[:2]
    places = np.linspace(-1, 1, window, dtype=np.float32)
    ones = np.ones((window, window), np.float32)
    basis = np.stack([ones, ones * places[None], ones * places[:, None]], -1).reshape(-1, 3)
    weight = still.reshape(count, -1).astype(np.float32)
    products = (basis[:, :, None] * basis[:, None, :]).reshape(-1, 9)
    normal = (weight @ products).reshape(count, 3, 3) + np.float32(1e-2) * np.eye(3, dtype=np.float32)
    right = basis.T @ (weight[..., None] * inside.reshape(count, -1, 3))
    return (basis @ np.linalg.solve(normal, right)).reshape(inside.shape)


def _soft_iou(
    share: Plane, other: Plane, area: NDArray[np.float64], outside: NDArray[np.float64]
) -> NDArray[np.float64]:
    both = np.minimum(share, other).sum((1, 2), dtype=np.float64)
    return both / np.maximum(area + other.sum((1, 2), dtype=np.float64) - both + outside, 1e-6)


def _named(rgb: NDArray[np.float64]) -> NDArray[np.int64]:
    """Numbers [F] of the nearest of ``COLOURS``; -1 if none is near."""
    distances = np.linalg.norm(rgb[:, None] - np.array(list(COLOURS.values()))[None], axis=-1)
    return np.where(distances.min(1) <= FARTHEST_COLOUR, distances.argmin(1), -1)
