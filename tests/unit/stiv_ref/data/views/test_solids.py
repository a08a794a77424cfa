"""Solids: where a ray meets them, against counting points inside; and that the camera stands where it says."""

import math

import numpy as np
import pytest

from stiv_deploy.stiv_ref.data.views.solids import EXTENT, Look, View, picture
from stiv_deploy.stiv_ref.world_settings import SOLIDS, Solid

BODY, MARK, BEHIND = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.5)


def shown(solid: Solid, view: View) -> np.ndarray:
    return picture(Look(solid, 1.0, BODY, MARK, BEHIND, 0.0), view, 32)


INSIDE = {
    "cube": lambda x, y, z: np.maximum(np.maximum(abs(x), abs(y)), abs(z)) <= 0.57,
    "sphere": lambda x, y, z: x**2 + y**2 + z**2 <= 0.64,
    "cylinder": lambda x, y, z: (np.hypot(x, y) <= 0.58) & (abs(z) <= 0.75),
    "cone": lambda x, y, z: (np.hypot(x, y) <= 0.5 * (0.9 - z)) & (z >= -0.6),
    "pyramid": lambda x, y, z: (np.maximum(abs(x), abs(y)) <= 0.4 - 0.5 * z) & (z >= -0.6),
    "octahedron": lambda x, y, z: abs(x) + abs(y) + abs(z) <= 0.95,
    "torus": lambda x, y, z: (np.hypot(x, y) - 0.6) ** 2 + z**2 <= 0.28**2,
}


@pytest.mark.parametrize("solid", SOLIDS)
@pytest.mark.parametrize("view", [View(20, 30), View(200, -20)])
def test_the_outline_is_that_of_the_points_inside(solid: Solid, view: View) -> None:
    a, e = math.radians(view.azimuth), math.radians(view.elevation)
    toward = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([-math.sin(a), math.cos(a), 0])
    up = np.cross(toward, right)
    places = ((np.arange(32) + 0.5) / 32 * 2 - 1) * EXTENT
    u, v, s = places[None, :, None], -places[:, None, None], np.linspace(-1.3, 1.3, 200)
    wanted = INSIDE[solid](*(right[i] * u + up[i] * v + toward[i] * s for i in range(3))).any(-1)
    found = shown(solid, view)[..., 2] < 0.25
    assert (wanted != found).mean() < 0.02
    assert 0.1 < found.mean() < 0.5
    assert not found[[0, -1]].any()


@pytest.mark.parametrize("solid", SOLIDS)
def test_the_mark_is_where_it_is_said_to_be(solid: Solid) -> None:
    """A camera that goes on in azimuth goes to the right, and what it looks at turns to the left."""

    def middle(view: View) -> float:
        green = np.clip(np.diff(shown(solid, view)[..., :2])[..., 0], 0, None)
        return float((green * (np.arange(32) - 15.5)).sum() / green.sum())

    assert middle(View(0, 10)) == pytest.approx(0, abs=0.6)
    assert middle(View(60, 10)) < -2
    assert middle(View(-60, 10)) > 2
    behind = shown(solid, View(180, 0))
    assert (behind[..., 1] > behind[..., 0]).mean() < 0.01


def test_bits_are_the_same_every_time() -> None:
    assert all(np.array_equal(shown(solid, View(77, 12)), shown(solid, View(77, 12))) for solid in SOLIDS)
    assert not np.array_equal(shown("cube", View(77, 12)), shown("cube", View(78, 12)))
