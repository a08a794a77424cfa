"""Recipes: the shipped one is valid, everything impossible is one clear line before any training."""

from pathlib import Path

import pytest

from stiv_deploy.stiv_ref.config import StivConfig, read_config
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.recipe import load_recipe

SHIPPED = Path(load_recipe.__code__.co_filename).parent / "configs" / "tiny.toml"


def test_the_shipped_recipe_is_the_papers_order() -> None:
    recipe = load_recipe(SHIPPED)
    assert recipe.model == "tiny"
    assert list(dict.fromkeys(stage.task for stage in recipe.stages)) == ["t2i", "t2v", "ti2v"]
    assert recipe.sampling.frames >= 8


FAULTS = {
    "unknown key": ('name = "short"', 'name = "short"\ncolour = 1', "colour: Extra inputs"),
    "unknown stage key": ("warmup = 2", "warmups = 2", "stages.0.warmups: Extra inputs"),
    "unknown model": ('model = "small"', 'model = "huge"', "no model config named 'huge'; there are: tiny"),
    "bad name": ('name = "short"', 'name = "a/b"', "name: String should match"),
    "wrong type": ("threads = 1", 'threads = "many"', "threads: Input should be a valid integer"),
    "no steps": ("steps = 5", "steps = 0", "steps: Input should be greater than 0 (got 0)"),
    "unknown task": ('task = "t2i"', 'task = "v2v"', "stages.0.task: Input should be 't2i', 't2v' or 'ti2v'"),
    "image with frames": ('task = "t2i"', 'task = "t2i"\nframes = 2', "task t2i trains on one frame, not 2"),
    "video of one frame": ('task = "t2i"', 'task = "t2v"', "task t2v needs at least 2 frames, got 1"),
    "too many frames": ('task = "ti2v"\nframes = 3', 'task = "ti2v"\nframes = 10', "there can be 1 to 9"),
    "dropout": ('task = "ti2v"', 'task = "ti2v"\nimage_dropout = 0.5', "must not exceed text_dropout"),
    "ema": ("threads = 1", "threads = 1\nema = 1.0", "ema: Input should be less than 1"),
    "latent channels": (
        "channels = [4, 4]",
        "latent_channels = 3\nchannels = [4, 4]",
        "vae.latent_channels is 3, model small takes 4",
    ),
    "text heads": ("[vae]", "[text]\nheads = 5\n[vae]", "text.heads 5 does not divide the text width 24"),
    "vae too deep": ("channels = [4, 4]", "channels = [4, 4, 4, 4, 4]", "data size 32 is not a multiple of 64"),
    "sampling size": ("[sampling]", "[sampling]\nheight = 36", "sampling.height size 36 is not a multiple of 8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_impossible_recipes_are_one_clear_line(recipe_file: Path, fault: str) -> None:
    old, new, message = FAULTS[fault]
    text = recipe_file.read_text()
    assert old in text
    recipe_file.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{recipe_file}: ")
    assert "\n" not in str(caught.value)
    assert "{" not in str(caught.value)  # no dump of the whole recipe
    assert caught.value.exit_code == 2


def test_stage_order(recipe_file: Path) -> None:
    head, first, second = recipe_file.read_text().split("[[stages]]")
    recipe_file.write_text("[[stages]]".join((head, second, first)))
    with pytest.raises(ConfigError, match="stages must go t2i, t2v, ti2v, got ti2v, t2i"):
        load_recipe(recipe_file)


@pytest.mark.parametrize("content", [None, b"name = ", b"\xff\xfe\x00"])
def test_unreadable_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as TOML") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_unreadable_json_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_config(StivConfig, tmp_path / "missing.json")
