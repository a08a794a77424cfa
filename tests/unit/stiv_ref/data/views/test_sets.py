"""Sets of views: STIV's layout, functions of their number; as training data and as a sheet."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from stiv_deploy.stiv_ref.commands.data import data as cli
from stiv_deploy.stiv_ref.config import parse_config
from stiv_deploy.stiv_ref.data.open_source import open_source
from stiv_deploy.stiv_ref.data.views.sets import Views, layout
from stiv_deploy.stiv_ref.errors import ConfigError, StivRefError
from stiv_deploy.stiv_ref.recipe import Recipe
from stiv_deploy.stiv_ref.world_settings import SOLIDS


def test_the_layout_is_the_papers() -> None:
    assert [tuple(view) for view in layout(7)] == [
        (30, 30), (90, -20), (150, 30), (210, -20), (270, 30), (330, -20)
    ]  # fmt: skip


def test_sets_are_the_same_in_any_order_and_on_any_machine() -> None:
    frames = [Views().set(index).frames for index in range(3)]
    assert frames[0].shape == (7, 64, 64, 3)
    assert np.array_equal(Views().set(1).frames, frames[1])
    assert not np.array_equal(Views(split="test").set(0).frames, frames[0])
    assert hashlib.sha256(np.stack(frames).tobytes()).hexdigest()[:16] == "96ed7e0282dcfa46"


def test_all_solids_come_and_the_given_view_shows_the_mark() -> None:
    views = Views(frames=2, split="test", side=32)
    sets = [views.set(index) for index in range(40)]
    assert {each.look.solid for each in sets} == set(SOLIDS)
    for each in sets:
        assert each.views[0].azimuth == 0
        assert abs(each.look.mark - each.turned) <= 50
        assert np.array_equal(each.frames[1], each.seen_from(each.views[1]))


def recipe_of(data: dict[str, Any], **stage: Any) -> Recipe:
    values = {"name": "x", "model": "tiny", "vae": {"steps": 1, "batch": 1, "learning_rate": 1.0}, "seed": 3}
    base = {"task": "views", "steps": 4, "batch": 2, "frames": 7, "learning_rate": 1.0}
    return parse_config(Recipe, values | {"data": {"v": {"kind": "views", **data}}, "stages": [base | stage]}, "recipe")


def test_views_are_training_data() -> None:
    recipe = recipe_of({"solids": ["torus"]})
    source = open_source(recipe, recipe.stages[0], 1)
    ((batch,),) = source.batches(range(1), [range(2)])
    assert batch.video is not None
    assert batch.video.shape == (2, 7, 3, 64, 64)
    assert batch.captions == ["", ""]
    assert batch.micro.tolist() == [[64, 64, 0, 0, 1, 7]] * 2
    assert source.stills(3).shape == (3, 3, 64, 64)
    assert not torch.equal(*source.stills(2))
    assert list(source.words()) == []


@pytest.mark.parametrize(
    ("data", "stage", "message"),
    [
        ({"solids": ["ball"]}, {}, "Input should be 'cube'"),
        ({"solids": ["cube", "cube"]}, {}, "solids has one twice: cube, cube"),
        ({}, {"resolution": [16, 16]}, "views are drawn at multiples of 16 pixels from 32 on, got 16"),
        ({}, {"frames": 400}, "there are at most 361 views of a solid, got 400"),
    ],
)
def test_impossible_views_are_one_clear_line(data: dict[str, Any], stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(data, **stage)


def test_a_sheet(tmp_path: Path) -> None:
    def run(*arguments: object) -> None:
        words = ["views", *map(str, arguments)]
        CliRunner().invoke(cli, words, catch_exceptions=False, standalone_mode=False)

    run(tmp_path / "views.png", "--count", 2)
    with Image.open(tmp_path / "views.png") as image:
        captions = json.loads(image.info["stiv"])["captions"]
    first = Views(split="test").set(0)
    assert captions[0] == f"{first.colours[0]} {first.look.solid}, {first.colours[1]} mark"
    with pytest.raises(StivRefError, match="multiples of 16"):
        run(tmp_path / "other.png", "--size", 40)
