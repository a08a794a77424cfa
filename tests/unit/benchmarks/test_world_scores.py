"""The measurement in the world, on a source that answers with the very clips, or with what it is given."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from stiv_deploy.stiv_ref.data.views.sets import Views
from stiv_deploy.stiv_ref.data.world.clips import World
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.world_settings import WorldData

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
WORLD, VIEWS = World(frames=6, side=32, split="test"), Views(frames=3, side=32, split="test")
SAMPLES = 4


@pytest.fixture(scope="module")
def scores() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import world_scores
    finally:
        sys.path.remove(str(BENCHMARKS))
    return world_scores


class KnownSource:
    """Answers with the true clips, or, ``stuck``, with the first given frame again and again (or black)."""

    frames, side, stride = 6, 32, 1

    def __init__(self, *, stuck: bool = False) -> None:
        self.stuck = stuck
        self.calls: list[tuple[Any, dict[int, np.ndarray]]] = []

    def describe(self) -> dict[str, str]:
        return {"sampler": "known"}

    def generate(self, prompts: Sequence[str], seeds: range, settings: Any, given: Any) -> np.ndarray:
        self.calls.append((settings, dict(given or {})))
        made = VIEWS.set if settings.frames == 3 else WORLD.clip
        true = np.stack([made(seed).frames for seed in seeds]).astype(np.float32) / 127.5 - 1
        true = np.moveaxis(true, -1, 2)
        if not self.stuck:
            return true
        first = (given or {0: np.full_like(true[:, 0], -1)})[0]
        return np.repeat(first[:, None], true.shape[1], axis=1)

    def reconstruct(self, video: np.ndarray) -> np.ndarray:
        return np.clip(video + 0.02, -1, 1)


TASKS = ["t2v", "ti2v", "predict", "interpolate", "ends", "conflicts", "views"]


def measured(scores: ModuleType, source: KnownSource) -> Any:
    experiment = scores.Experiment(source, scores.Settings(steps=1, scale=1.0), batch=3, views_scale=2.0)
    return scores.measure(experiment, TASKS, WORLD, VIEWS, SAMPLES)


def test_true_clips_are_right_in_every_task(scores: ModuleType) -> None:
    source = KnownSource()
    rows = measured(scores, source).rows
    assert list(rows) == TASKS
    for task in ("t2v", "ti2v", "predict", "interpolate", "ends"):
        assert rows[task]["right"] == rows[task]["identity"] == 100
    assert rows["views"]["all_placed"] == 100
    assert rows["conflicts"]["picture"] == 100
    assert rows["predict"]["psnr"] > 100 > rows["predict"]["psnr_vae"] == pytest.approx(40, abs=0.5)
    assert rows["interpolate"]["psnr_blended"] > rows["interpolate"]["psnr_nearest"] > 10
    given = {len(each) for _, each in source.calls}
    assert given == {0, 1, 2, 3, 4}
    asked = {(each.frames, each.scale, each.unseen, each.stride) for each, _ in source.calls}
    assert asked == {(3, 2.0, "zero", 1), (6, 1.0, "noised", 1)}


def test_a_source_that_repeats_what_it_is_given_is_found_out(scores: ModuleType) -> None:
    rows = measured(scores, KnownSource(stuck=True)).rows
    assert rows["t2v"]["shape"] == rows["t2v"]["identity"] == 0
    assert rows["ti2v"]["identity"] == 100
    assert rows["ti2v"]["motion"] < 100
    assert rows["predict"]["pace"] < 100
    assert rows["views"]["all_placed"] == 0
    assert rows["views"]["psnr"] == rows["views"]["psnr_nearest"]


def test_scorers_are_validated_beside_and_all_is_in_the_table(scores: ModuleType) -> None:
    source = KnownSource()
    checked = scores.validate(source, [WORLD.clip(index) for index in range(12)])
    assert checked["true"]["right"] == 100
    assert checked["through_vae"]["identity"] == 100
    assert min(checked["faults_caught"].values()) > 70  # of twelve clips of six frames of 32 pixels
    experiment = measured(scores, source)
    report = {
        "command": "python x",
        "date": "2024-01-01",
        "cpu": "some cpu",
        "source": source.describe(),
        "samples": SAMPLES,
        "steps": 7,
        "solver": "euler",
        "scale": 3.0,
        "views_scale": 3.5,
        "scorers": checked,
        "tasks": experiment.rows,
    }
    text = scores.table(report)
    assert "`python x`" in text
    assert all(f"\n| {task} |" in text for task in (*TASKS, "*true clips*", "*true clips through the VAE*", "noise"))
    assert [row.mark for row in experiment.sheet].count("wrong") == 4  # what follows the picture is not as asked
    assert any("(seen: " in row.caption for row in experiment.sheet)


def test_what_given_frames_are_compared_with(scores: ModuleType) -> None:
    truth = np.array([0.0, 1, 4, 9, 16])[None, :, None]
    assert scores.nearest(truth, [0, 4]).ravel().tolist() == [0, 0, 0, 16, 16]
    assert scores.blended(truth, [0, 4]).ravel().tolist() == [0, 4, 8, 12, 16]
    assert scores.blended(truth, [0, 1]).ravel().tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("tasks", "frames", "message"),
    [("t2v,v2v", 6, "no task named 'v2v'; there are: t2i, t2v,"), ("t2v", 1, "this is an image model")],
)
def test_unknown_tasks_are_one_line(scores: ModuleType, tasks: str, frames: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scores.chosen_tasks(tasks, frames)
    assert scores.chosen_tasks("", 1) == ["t2i"]


def test_the_world_is_the_last_one_of_the_recipe_beside(scores: ModuleType, tmp_path: Path, recipe_text: str) -> None:
    assert scores.world_of(tmp_path, None)[0] == WorldData(kind="world")
    (tmp_path / "recipe.toml").write_text(recipe_text)
    world, _ = scores.world_of(tmp_path, None)
    assert world.shapes == ("ring", "star")
    assert world.motions == ("left", "stay")


@pytest.fixture
def recipe_text() -> str:
    return """
name = "x"
model = "tiny"
[vae]
steps = 1
batch = 1
learning_rate = 1e-3
[data.first]
kind = "world"
[data.last]
kind = "world"
shapes = ["ring", "star"]
motions = ["left", "stay"]
[data.views]
kind = "views"
[data.both]
kind = "mixed"
shares = { views = 1, last = 1 }
[[stages]]
task = "t2i"
data = "first"
steps = 1
batch = 1
learning_rate = 1e-3
[[stages]]
task = "all"
data = "both"
frames = 6
patch_frames = 2
steps = 1
batch = 1
learning_rate = 1e-3
"""
