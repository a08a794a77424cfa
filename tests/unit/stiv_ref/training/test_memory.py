"""What a recipe takes at least: exact where it is counted, and one line where no machine has it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stiv_deploy.stiv_ref.config import CONFIGS, StivConfig
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.recipe import load_recipe
from stiv_deploy.stiv_ref.training import memory
from stiv_deploy.stiv_ref.training.memory import check_memory, memory_told, parameter_count
from stiv_deploy.stiv_ref.training.parallel import Team
from stiv_deploy.stiv_ref.training.trainer import check

CPU = torch.device("cpu")
RECIPES = Path(load_recipe.__code__.co_filename).parents[1] / "recipes"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda config: config.name)
def test_parameters_are_counted_without_the_model(config: StivConfig) -> None:
    with torch.device("meta"):
        model = Stiv(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


HUGE = [
    ('model = "small"', '[model]\nbase = "small"\nwidth = 65536\nblocks = 1000', "stage 1-t2i: a model of "),
    ('model = "small"', '[model]\nbase = "small"\nmlp_ratio = 64\nwidth = 65536', "stage 1-t2i: a model of "),
    ("channels = [4, 4]", "channels = [65536, 65536]", "vae: a VAE of "),
    ('task = "t2i"', 'task = "t2i"\nresolution = [65536, 65536]', "vae: 256 pictures at once of 65536x65536 take"),
    ("[sampling]\n", "[sampling]\nheight = 65536\nwidth = 65536\n", "[sampling]: 3 frames of 65536x65536 take"),
]


@pytest.mark.parametrize(("old", "new", "message"), HUGE)
def test_what_no_machine_has_is_one_line_before_it_is_allocated(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    text = recipe_file.read_text()
    recipe_file.write_text(
        text.replace(f"{old}\n", "") + new if new.startswith("[model]") else text.replace(old, new, 1)
    )
    monkeypatch.setattr(memory, "_memory", lambda device: 16 * 2**30)
    with pytest.raises(ConfigError) as caught:
        check(load_recipe(recipe_file), Team(device=CPU))
    assert str(caught.value).startswith(message)
    assert "GiB, there are 16.0 on cpu" in str(caught.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_fit_a_machine_of_their_kind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, world = load_recipe(path), 64 if path.stem == "xl" else 1
    monkeypatch.setattr(memory, "_memory", lambda device: 2 * 2**30)
    check_memory(recipe, Team(world=world, device=CPU))


def test_the_machine_has_memory() -> None:
    assert memory._memory(CPU) > 2**28


def no_memory_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), no_memory_on_a_gpu])
def test_memory_that_runs_out_is_one_line(allocate: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"^there is not enough memory for this recipe; lower"), memory_told():
        allocate()


def test_other_faults_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="^ours$"), memory_told():
        raise RuntimeError("ours")
