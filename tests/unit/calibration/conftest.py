"""A checkpoint small enough to calibrate in a moment, with random values in every parameter."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from stiv_deploy.calibration.collect import CalibrationSettings, Material, Statistics, collect
from stiv_deploy.calibration.known_data import default_images, default_prompts
from stiv_deploy.calibration.layers import Format
from stiv_deploy.calibration.ranges import ranges_of
from stiv_deploy.calibration.scales import Provenance, Scales
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, CheckpointConfig, SamplingDefaults, save_checkpoint
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.data.moving_digits import WORDS
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, word_tokenizer
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig

MICRO = StivConfig(
    name="micro", blocks=2, width=32, heads=2, text_width=24, base_frames=4, base_grid=(4, 4), frequency_width=16
)
SETTINGS = CalibrationSettings(samples=4, steps=12, batch=1, calibrator="percentile")
"""Twelve steps have one in every timestep band; four batches are every kind of unit."""


def random_checkpoint(config: StivConfig) -> Checkpoint:
    """An untrained checkpoint; matrices keep the scale of what they map, vectors lie around their default."""
    tokenizer = word_tokenizer(WORDS, 8)
    text = TextConfig(vocabulary=tokenizer.get_vocab_size(), width=config.text_width, heads=2, layers=1, max_tokens=8)
    modules = Stiv(config), TextEncoder(text), Vae(VaeConfig(channels=(8, 8)))
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        _randomize(module.eval().requires_grad_(False), generator)
    sampling = SamplingDefaults(frames=4 if config.temporal else 1, steps=4)
    return Checkpoint(
        config=CheckpointConfig(model=config, text=text, vae=modules[2].config, sampling=sampling),
        model=modules[0],
        text_encoder=modules[1],
        vae=modules[2],
        tokenizer=tokenizer,
    )


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    for name, tensor in module.state_dict().items():
        spread = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1
        center = 1.0 if name.endswith("norm.weight") or name == "scale" else 0.0
        tensor.copy_(center + spread * torch.randn(tensor.shape, generator=generator))


class Calibrated(NamedTuple):
    """The small checkpoint, what it was calibrated on, and what was found."""

    checkpoint: Checkpoint
    material: Material
    statistics: Statistics

    def __repr__(self) -> str:  # hypothesis prints it
        return "Calibrated()"

    def scales(self, quantization: Format, *, per_channel: bool = False, smooth: float | None = None) -> Scales:
        """Its scales, by largest magnitudes."""
        settings = SETTINGS.model_copy(update={"calibrator": "max"})
        provenance = Provenance(
            quantization=quantization, checkpoint="0" * 64, model=MICRO, recipe={}, prompts="", tools={}
        )
        model = self.checkpoint.model
        ranges = ranges_of(model, self.statistics, settings, per_channel=per_channel, smooth=smooth)
        return Scales(provenance=provenance, amax=ranges)


@pytest.fixture(scope="session")
def micro() -> Checkpoint:
    """The small checkpoint in memory; do not change it."""
    return random_checkpoint(MICRO)


@pytest.fixture(scope="session")
def micro_path(micro: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint on disk; do not write into it."""
    path = tmp_path_factory.mktemp("micro") / "checkpoint"
    save_checkpoint(path, micro)
    return path


@pytest.fixture(scope="session")
def image_checkpoint() -> Checkpoint:
    """A checkpoint of an image model."""
    return random_checkpoint(MICRO.model_copy(update={"temporal": False}))


@pytest.fixture(scope="session")
def material(micro: Checkpoint) -> Material:
    """Default prompts and first frames of the small checkpoint."""
    return Material(prompts=default_prompts(micro, 0), images=default_images(micro, 0))


@pytest.fixture(scope="session")
def settings() -> CalibrationSettings:
    """Settings of a run of a moment."""
    return SETTINGS


@pytest.fixture(scope="session")
def calibrated(micro: Checkpoint, material: Material, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """The small checkpoint after a calibration run."""
    state = tmp_path_factory.mktemp("calibrated") / "state"
    return Calibrated(micro, material, collect(micro, material, SETTINGS, state, "fixture"))


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[[], Checkpoint]:
    """Makes small checkpoints that a test may change."""
    return lambda: random_checkpoint(MICRO)
