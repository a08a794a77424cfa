"""From where a made view shows its solid: compared with pictures of it from all around, at the view's elevation.

No learnt classifier. What a view cannot show, as how a ball is turned whose mark is behind it, is not held against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.data.views.sets import ViewSet, shown
from stiv_deploy.stiv_ref.data.views.solids import Look, View
from stiv_deploy.stiv_ref.data.world.reading import Pixels, pixels_of
from stiv_deploy.stiv_ref.data.world.scores import Table
from stiv_deploy.stiv_ref.decibels import decibels

STEP = 10
"""Degrees between the pictures that a view is compared with, from where it should be on."""
AS_GOOD = 0.01
"""Of full brightness: azimuths whose pictures differ from the view no more than so beyond the best are as good."""
FITS = 0.06
"""Root mean square difference, of full brightness, up to which a view shows the solid at all."""
NEAR = 15.0
"""Degrees by which a view may be off."""


@dataclass(frozen=True, kw_only=True)
class ViewScores:
    """Of the made views, one number each: ``errors`` in degrees of azimuth, the ``differences`` from the best picture
    of the solid; and the ``psnr`` of all of them against the true views, in dB.
    """

    errors: tuple[float, ...]
    differences: tuple[float, ...]
    psnr: float

    @property
    def fits(self) -> list[bool]:
        """Which views show the wanted solid in its colours, from anywhere at their elevation."""
        return [difference <= FITS for difference in self.differences]

    @property
    def placed(self) -> list[bool]:
        """Which views show it from where they should."""
        return [fits and error <= NEAR for fits, error in zip(self.fits, self.errors, strict=True)]


def score_views(frames: NDArray[np.generic], truth: ViewSet) -> ViewScores:
    """Score the made views, all but the first of ``frames``, uint8 or floats in [0, 1], [F, H, H, 3].

    ``ValueError`` if they are not of the shape of the true ones.
    """
    if frames.shape != truth.frames.shape or len(frames) < 2:
        raise ValueError(f"views are {list(truth.frames.shape)}, and at least 2, got {list(frames.shape)}")
    pixels, wanted = pixels_of(frames)[1:], pixels_of(truth.frames)[1:]
    found = [_nearest(seen, _around(truth, view)) for seen, view in zip(pixels, truth.views[1:], strict=True)]
    return ViewScores(
        errors=tuple(each[0] for each in found),
        differences=tuple(each[1] for each in found),
        psnr=float(decibels(np.square(pixels - wanted, dtype=np.float64).mean(), 1)),
    )


def _around(truth: ViewSet, view: View) -> Pixels:
    """The solid from every :data:`STEP` degrees beyond ``view``, fp32 [A, H, W, 3]."""
    turned = [View((view.azimuth + off) % 360, view.elevation) for off in range(0, 360, STEP)]
    return np.concatenate([_picture(truth.look, truth.turned, each, truth.frames.shape[1]) for each in turned])


@lru_cache(maxsize=256)  # views at one elevation are compared with the same pictures
def _picture(look: Look, turned: float, view: View, side: int) -> Pixels:
    return pixels_of(shown(look, turned, view, side)[None])


def _nearest(seen: NDArray[np.float32], around: Pixels) -> tuple[float, float]:
    """By how many degrees the view is off, and how much it differs from the best of the pictures ``around``."""
    differences = np.sqrt(np.square(around - seen).mean((1, 2, 3), dtype=np.float64))
    good = np.flatnonzero(differences <= differences.min() + AS_GOOD) * STEP
    return float(np.minimum(good, 360 - good).min()), float(differences.min())


def aggregate_views(scores: Sequence[ViewScores]) -> Table:
    """Percent of the views that fit and are placed, and of the sets in which all are; mean error and PSNR."""
    fits, placed = ([flag for each in scores for flag in getattr(each, name)] for name in ("fits", "placed"))
    errors = [error for each in scores for error in each.errors]
    return {
        "sets": float(len(scores)),
        "fits": round(100 * sum(fits) / len(fits), 1),
        "placed": round(100 * sum(placed) / len(placed), 1),
        "all_placed": round(100 * sum(all(each.placed) for each in scores) / len(scores), 1),
        "mean_error": round(sum(errors) / len(errors), 2),
        "mean_psnr": round(sum(each.psnr for each in scores) / len(scores), 2),
    }
