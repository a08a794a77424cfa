"""The world as training data, from a recipe."""

from typing import Any

import pytest
import torch

from stiv_deploy.stiv_ref.config import parse_config
from stiv_deploy.stiv_ref.data.drawn import DrawnSource
from stiv_deploy.stiv_ref.data.open_source import open_source
from stiv_deploy.stiv_ref.data.world.captions import words
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.recipe import Recipe


def recipe_of(data: dict[str, Any] | None = None, **stage: Any) -> Recipe:
    values = {"name": "x", "model": "tiny", "vae": {"steps": 1, "batch": 1, "learning_rate": 1.0}, "seed": 3}
    base = {"task": "t2v", "steps": 4, "batch": 4, "frames": 4, "learning_rate": 1.0}
    world = {"kind": "world", **(data or {})}
    return parse_config(Recipe, values | {"data": {"world": world}, "stages": [base | stage]}, "recipe")


def source_of(recipe: Recipe) -> DrawnSource:
    source = open_source(recipe, recipe.stages[0], 1)
    assert isinstance(source, DrawnSource)
    return source


def test_batches_are_the_same_in_any_parts() -> None:
    recipe = recipe_of({"strides": [2, 3]})
    (whole,), (again,) = source_of(recipe).batches(range(2), [range(4)])
    parts = next(source_of(recipe).batches(range(1), [range(1), range(1, 4)]))
    assert whole.video is not None
    assert again.video is not None
    assert whole.video.shape == (4, 4, 3, 64, 64)
    assert whole.video.dtype == torch.float32
    assert whole.video.is_contiguous()
    assert -1 <= whole.video.min() < whole.video.max() <= 1
    assert torch.equal(whole.video, torch.cat([part.video for part in parts if part.video is not None]))
    assert whole.captions == [caption for part in parts for caption in part.captions]
    assert not torch.equal(whole.video, again.video)
    assert set(whole.micro[:, 4].tolist()) <= {2.0, 3.0}
    assert whole.micro[0].tolist() == [64, 64, 0, 0, whole.micro[0, 4], 4]


def test_stills_and_words() -> None:
    source = source_of(recipe_of(task="t2i", frames=1))
    ((batch,),) = source.batches(range(1), [range(3)])
    assert batch.video is not None
    assert batch.video.shape == (3, 1, 3, 64, 64)
    assert batch.micro.tolist() == [[64, 64, 0, 0, 1, 1]] * 3
    assert source.stills(5).shape == (5, 3, 64, 64)
    assert source.words() == words()
    assert source.broken() == []


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "shape": ({"shapes": ["cube"]}, {}, "data.world.world.shapes.0: Input should be 'circle'"),
    "no shapes": ({"shapes": []}, {}, "at least 1 item"),
    "twice": ({"motions": ["left", "left"]}, {}, "motions has one twice: left, left"),
    "radius": ({"least_radius": 9}, {}, "less than or equal to 8.5"),
    "stride": ({"strides": [0]}, {}, "greater than 0"),
    "scene": ({"strides": [4], "scene_frames": 12}, {}, "4 frames at stride 4 are longer than scene_frames 12"),
    "small": ({}, {"resolution": [16, 16]}, "multiples of 16 pixels from 32 on, got 16"),
    "odd": ({}, {"resolution": [40, 40]}, "multiples of 16 pixels from 32 on, got 40"),
    "oblong": ({}, {"resolution": [32, 64]}, "the world is square, resolution is 32x64"),
    "buckets": ({}, {"buckets": [[32, 32], [64, 64]]}, "the world is drawn in one size; give resolution, not buckets"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_impossible_worlds_are_one_clear_line(fault: str) -> None:
    data, stage, message = FAULTS[fault]
    with pytest.raises(ConfigError) as caught:
        recipe_of(data, **stage)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
