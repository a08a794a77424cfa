"""A small random model, and a small recipe, for the tests of the reference."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from stiv_deploy.stiv_ref.config import CONFIGS, StivConfig
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.recipe import Recipe, load_recipe

# No deadline: the first call of a torch function can take a second on a busy machine.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

ModelFactory = Callable[..., Stiv]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_config() -> StivConfig:
    return StivConfig(
        name="small", blocks=2, width=16, heads=2, text_width=12, base_frames=4, base_grid=(3, 4), frequency_width=8
    )


@pytest.fixture
def random_model(small_config: StivConfig) -> ModelFactory:
    """Build a model whose every parameter is random, so that no branch is switched off by its initialization."""

    def build(seed: int = 0, **changes: object) -> Stiv:
        generator = torch.Generator().manual_seed(seed)
        model = Stiv(small_config.model_copy(update=changes)).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        return model.eval().requires_grad_(False)

    return build


RECIPE = """
name = "short"
model = "small"
threads = 1
save_every = 2
[vae]
channels = [4, 4]
steps = 2
batch = 4
learning_rate = 1e-3
[sampling]
frames = 3
steps = 2
[[stages]]
task = "t2i"
steps = 5
batch = 4
learning_rate = 1e-3
warmup = 2
[[stages]]
task = "ti2v"
frames = 3
steps = 5
batch = 2
learning_rate = 1e-3
warmup = 2
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small = StivConfig(
        name="small", blocks=2, width=32, heads=2, text_width=24, base_frames=4, base_grid=(4, 4), frequency_width=32
    )
    monkeypatch.setitem(CONFIGS, "small", small)
    path = tmp_path / "short.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)
