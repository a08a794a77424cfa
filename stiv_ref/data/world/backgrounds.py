"""Still backgrounds, never brighter than :data:`BRIGHTEST`, so that the object can be told from them."""

import math

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.data.world.draws import Draws
from stiv_deploy.stiv_ref.world_settings import Background

Picture = NDArray[np.float32]
"""[H, W, 3] in [0, 1]."""
BRIGHTEST = 0.42
DARKEST, LIGHTEST = 0.04, 0.36
KNOTS = 5
"""Knots of the texture along each axis."""


def draw_background(kind: Background, side: int, draws: Draws) -> Picture:
    """A background fp32 [side, side, 3] of that kind."""
    first = _colour(draws)
    if kind == "plain":
        return np.broadcast_to(first, (side, side, 3)).copy()
    return _gradient(first, side, draws) if kind == "gradient" else _texture(first, side, draws)


def _colour(draws: Draws) -> NDArray[np.float32]:
    return np.array([draws.between(DARKEST, LIGHTEST) for _ in range(3)], np.float32)


def _gradient(first: NDArray[np.float32], side: int, draws: Draws) -> Picture:
    """From ``first`` to another colour along any direction."""
    last, angle = _colour(draws), draws.between(0, 2 * math.pi)
    across, down = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    places = np.linspace(-1, 1, side, dtype=np.float32)
    along = (across * places[None, :] + down * places[:, None]) / (abs(across) + abs(down))
    share = (np.float32(0.5) + np.float32(0.5) * along)[..., None]
    return first + share * (last - first)


def _texture(colour: NDArray[np.float32], side: int, draws: Draws) -> Picture:
    """``colour``, between half as bright and a little brighter, changing softly from knot to knot."""
    knots = np.array([draws.between(0.5, 1.15) for _ in range(KNOTS * KNOTS)], np.float32).reshape(KNOTS, KNOTS)
    places = np.linspace(0, KNOTS - 1, side, dtype=np.float32)
    below = np.minimum(places.astype(np.int64), KNOTS - 2)
    share = places - below.astype(np.float32)
    rows = knots[below] + share[:, None] * (knots[below + 1] - knots[below])
    light = rows[:, below] + share * (rows[:, below + 1] - rows[:, below])
    return light[..., None] * colour
