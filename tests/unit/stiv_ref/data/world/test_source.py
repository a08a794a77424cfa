"""The world as training data, from a recipe."""

from typing import Any

import pytest
import torch

from stiv_deploy.stiv_ref.config import parse_config
from stiv_deploy.stiv_ref.data.drawn import DrawnSource
from stiv_deploy.stiv_ref.data.open_source import open_source
from stiv_deploy.stiv_ref.data.world.captions import words
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.recipe import Recipe, TrainedVae
from stiv_deploy.stiv_ref.training.trained_on import trained_on


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


MIXED: dict[str, Any] = {
    "slow": {"kind": "world", "strides": [1, 2]},
    "fast": {"kind": "world", "strides": [2, 5]},
    "solids": {"kind": "views"},
    "all": {"kind": "mixed", "shares": {"slow": 1, "fast": 1, "solids": 2}},
}


def mixed_recipe(there: dict[str, Any] = MIXED, *, vae: str = "", **stage: Any) -> Recipe:
    values: dict[str, Any] = {"name": "x", "model": "tiny", "seed": 3, "data": there}
    values["vae"] = {"steps": 1, "batch": 1, "learning_rate": 1.0, "data": vae}
    base = {"task": "t2v", "data": "all", "steps": 4, "batch": 16, "frames": 6, "learning_rate": 1.0}
    return parse_config(Recipe, values | {"stages": [base | stage]}, "recipe")


def test_drawn_data_can_be_mixed() -> None:
    recipe = mixed_recipe()
    ((batch,),) = source_of(recipe).batches(range(1), [range(16)])
    assert {name.split()[0] for name in batch.names} == {"clip", "view"}
    assert set(source_of(recipe).words()) == set(words())
    assert set(trained_on(recipe, 1).strides) == {1, 2, 5}
    assert mixed_recipe(task="keyframes").stages[0].task == "keyframes"


def test_views_among_clips_are_made_from_the_first_of_them_where_frames_are_given() -> None:
    ((batch,),) = source_of(mixed_recipe(task="all")).batches(range(1), [range(16)])
    assert batch.tasks == ["views" if name.startswith("view") else None for name in batch.names]
    trained = trained_on(mixed_recipe(task="predict"), 1)
    assert (trained.tasks, trained.givings) == (("predict", "views"), ("first 4", "first"))
    ((batch,),) = source_of(mixed_recipe()).batches(range(1), [range(16)])
    assert batch.tasks == [None] * 16
    assert trained_on(mixed_recipe(), 1).tasks == ("t2v",)


def test_the_vae_can_be_trained_on_data_of_its_own() -> None:
    recipe = mixed_recipe(vae="solids", data="slow")
    assert isinstance(recipe.vae, TrainedVae)
    stage = recipe.vae_stage(recipe.vae)
    assert (stage.data, stage.frames, stage.task, stage.batch) == ("solids", 1, "t2i", 1)
    other = mixed_recipe(data="slow")
    assert isinstance(other.vae, TrainedVae)
    assert other.vae_stage(other.vae).data == "slow"


@pytest.mark.parametrize(
    ("there", "vae", "said"),
    [
        ({"all": {"kind": "mixed", "shares": {"none": 1}}}, "", "mixes 'none'; it can mix what"),
        ({"d": {"kind": "digits"}, "all": {"kind": "mixed", "shares": {"d": 1}}}, "", "mixes 'd'; it can mix what"),
        ({"all": {"kind": "mixed", "shares": {"all": 1}}}, "", "mixes 'all'; it can mix what"),
        ({"all": {"kind": "mixed", "shares": {}}}, "", "shares"),
        (MIXED, "nothing", "stage vae: data is 'nothing'"),
    ],
)
def test_what_cannot_be_mixed_is_said(there: dict[str, Any], vae: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        mixed_recipe(there, vae=vae)


def test_mixed_data_is_checked_as_its_parts_are() -> None:
    with pytest.raises(ConfigError, match="views are square, resolution is 64x128"):
        mixed_recipe(MIXED | {"all": {"kind": "mixed", "shares": {"solids": 1}}}, resolution=[64, 128])
