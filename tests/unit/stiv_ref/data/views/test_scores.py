"""The view error, on true views and on ones with planted faults."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from stiv_deploy.stiv_ref.data.views.scores import ViewScores, aggregate_views, score_views
from stiv_deploy.stiv_ref.data.views.sets import Views, ViewSet
from stiv_deploy.stiv_ref.data.views.solids import Look, View
from stiv_deploy.stiv_ref.data.world.captions import COLOURS
from stiv_deploy.stiv_ref.decibels import MOST
from stiv_deploy.stiv_ref.world_settings import SOLIDS

VIEWS = Views(split="test", side=32)


@pytest.fixture(scope="module")
def sets() -> list[ViewSet]:
    return [VIEWS.set(index) for index in range(20)]


def changed(views: ViewSet, change: Callable[[Look], Look]) -> np.ndarray:
    other = replace(views, look=change(views.look))
    return np.stack([views.frames[0], *(other.seen_from(view) for view in views.views[1:])])


def another_colour(look: Look) -> Look:
    return look._replace(body=next(rgb for rgb in COLOURS.values() if rgb not in (look.body, look.marked)))


def another_solid(look: Look) -> Look:
    return look._replace(solid=SOLIDS[(SOLIDS.index(look.solid) + 1) % len(SOLIDS)])


FAULTS: dict[str, Callable[[ViewSet], np.ndarray]] = {
    "the given view again and again": lambda views: np.repeat(views.frames[:1], 7, 0),
    "views of other places": lambda views: np.concatenate([views.frames[:1], np.roll(views.frames[1:], 2, 0)]),
    "the other way round": lambda views: np.concatenate([views.frames[:1], views.frames[:0:-1]]),
    "another colour": lambda views: changed(views, another_colour),
    "another solid": lambda views: changed(views, another_solid),
    "no mark": lambda views: changed(views, lambda look: look._replace(marked=look.body)),
    "noise": lambda views: views.frames / 255 + np.random.default_rng(0).normal(0, 0.09, views.frames.shape),
}


@pytest.fixture(scope="module")
def scores_of(sets: list[ViewSet]) -> dict[str, list[ViewScores]]:
    """Set by set: all of one are compared with the same pictures."""
    all_of = {"true": lambda views: views.frames, **FAULTS}
    rows = [{name: score_views(make(views), views) for name, make in all_of.items()} for views in sets]
    return {name: [row[name] for row in rows] for name in all_of}


def test_true_views_are_placed(scores_of: dict[str, list[ViewScores]]) -> None:
    for scores in scores_of["true"]:
        assert scores.errors == (0.0,) * 6
        assert all(scores.placed)
        assert scores.psnr == MOST


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(scores_of: dict[str, list[ViewScores]], fault: str) -> None:
    assert np.mean([all(each.placed) for each in scores_of[fault]]) <= 0.05


def test_the_error_is_in_degrees(sets: list[ViewSet]) -> None:
    views = next(each for each in sets if each.look.solid == "pyramid")
    off = [views.frames[0], *(views.seen_from(View(v.azimuth + 20, v.elevation)) for v in views.views[1:])]
    assert score_views(np.stack(off), views).errors == (20,) * 6


def test_another_number_of_views_is_an_error() -> None:
    views = VIEWS.set(0)
    with pytest.raises(ValueError, match=r"views are \[7, 32, 32, 3\], and at least 2, got \[3, 32, 32, 3\]"):
        score_views(views.frames[:3], views)


def test_table() -> None:
    scores = [
        ViewScores(errors=(0, 40), differences=(0.01, 0.02), psnr=20),
        ViewScores(errors=(10, 0), differences=(0.0, 0.9), psnr=30),
    ]
    assert aggregate_views(scores) == {
        "sets": 2, "fits": 75, "placed": 50, "all_placed": 0, "mean_error": 12.5, "mean_psnr": 25
    }  # fmt: skip
