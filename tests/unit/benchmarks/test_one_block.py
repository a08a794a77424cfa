"""The stand-in for a large model: one block, nothing in it dead, the same every time."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.config import CONFIGS
from stiv_deploy.stiv_ref.errors import ConfigError


@pytest.fixture
def make(benchmark_module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Checkpoint]:
    narrow = CONFIGS["XL"].model_copy(update={"width": 64, "heads": 4, "text_width": 32})
    monkeypatch.setitem(CONFIGS, "narrow", narrow)
    return benchmark_module("one_block").one_block_checkpoint


def test_one_block_of_the_named_model(make: Callable[..., Checkpoint]) -> None:
    checkpoint = make("narrow", frames=4, size=32)
    wanted = CONFIGS["narrow"].model_copy(update={"blocks": 1})
    assert checkpoint.config.model == checkpoint.model.config == wanted
    assert (checkpoint.config.sampling.frames, checkpoint.config.sampling.height) == (4, 32)
    assert checkpoint.config.vae.spatial_factor == 8


def test_every_parameter_has_a_range(make: Callable[..., Checkpoint]) -> None:
    checkpoint = make("narrow", frames=4, size=32)
    for module in (checkpoint.model, checkpoint.text_encoder, checkpoint.vae):
        assert not module.training
        for name, parameter in module.named_parameters():
            assert parameter.abs().max() > 0, name


def test_nothing_is_left_as_it_was_in_memory(make: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch fills what is allocated empty with NaN where algorithms are deterministic."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        checkpoint = make("narrow", frames=4, size=32)
    finally:
        torch.use_deterministic_algorithms(False)
    for module in (checkpoint.model, checkpoint.text_encoder, checkpoint.vae):
        assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_seeded(make: Callable[..., Checkpoint]) -> None:
    torch.manual_seed(7)
    first = make("narrow", frames=4, size=32).model.state_dict()
    drawn = torch.rand(3)
    again, other = (make("narrow", frames=4, size=32, seed=seed).model.state_dict() for seed in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)  # the caller's random numbers are not touched


def test_unknown_model(benchmark_module: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ConfigError, match="no model config named 'XS'"):
        benchmark_module("one_block").one_block_checkpoint("XS", frames=4, size=32)
