"""What a recipe takes at least, estimated before anything is allocated: too large is one line, not a dead machine.

The estimates are lower bounds, of what cannot be done without, so that nothing is refused that would run.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.recipe import Recipe, ShardData, Stage, TrainedVae
from stiv_deploy.stiv_ref.training.parallel import Team
from stiv_deploy.stiv_ref.training.vae_stage import MEASURED
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig

FLOAT = 4
"""Bytes of a value: weights, pixels and moments are fp32."""
COPIES = 4
"""Weights, gradients, averages and one moment; AdamW has another one, Adafactor little more."""
LATENTS = 2**10
"""Shards may hold latents: one value for at most so many of pixels."""
GIB = 2**30


def parameter_count(config: StivConfig) -> int:
    """Parameters of the model, counted on the meta device; every block has as many."""

    def count(blocks: int) -> int:
        with torch.device("meta"):
            model = Stiv(config.model_copy(update={"blocks": blocks}))
        return sum(parameter.numel() for parameter in model.parameters())

    one = count(1)
    return one + (config.blocks - 1) * (count(2) - one)


def check_memory(recipe: Recipe, team: Team) -> None:
    """:class:`ConfigError` naming the first part of ``recipe`` that takes more memory than ``team``'s device has."""
    there = _memory(team.device)
    for what, needed in _needed(recipe, team):
        if needed > there:
            raise ConfigError(
                f"{what} at least {needed / GIB:,.1f} GiB, there are {there / GIB:,.1f} on {team.device.type}; lower "
                "width, blocks, channels, resolution, frames, batch or micro_batch"
            )


def _needed(recipe: Recipe, team: Team) -> Iterator[tuple[str, int]]:
    """Parts of the recipe in words, and the bytes that each takes in a process."""
    if isinstance(recipe.vae, TrainedVae):
        yield from _vae(recipe, recipe.vae, team)
    counted: dict[StivConfig, int] = {}
    for stage in recipe.stages:
        config = recipe.model_of(stage)
        if config not in counted:
            counted[config] = parameter_count(config)
        count = counted[config]
        copies = 1 if recipe.lora else COPIES + (stage.distill is not None)  # its teacher
        yield f"stage {stage.name}: a model of {count:,} parameters takes", copies * FLOAT * count // team.world
        clips = min(stage.batch // team.world, recipe.efficiency.micro_batch or stage.batch)
        frames, height, width = _largest(stage)
        values = _pixels(frames, height, width) // (LATENTS if isinstance(recipe.data[stage.data], ShardData) else 1)
        size = f"{frames} frames of {height}x{width}"
        yield f"stage {stage.name}: {clips} clips at once of {size} take", FLOAT * clips * values
    sampling = recipe.sampling
    size = f"{sampling.frames} frames of {sampling.height}x{sampling.width}"
    yield f"[sampling]: {size} take", FLOAT * _pixels(sampling.frames, sampling.height, sampling.width)


def _vae(recipe: Recipe, settings: TrainedVae, team: Team) -> Iterator[tuple[str, int]]:
    _, height, width = _largest(recipe.stages[0])
    with torch.device("meta"):
        vae = Vae(VaeConfig(latent_channels=settings.latent_channels, channels=settings.channels))
    count = sum(parameter.numel() for parameter in vae.parameters())
    yield f"vae: a VAE of {count:,} parameters takes", COPIES * FLOAT * count
    pictures = max(settings.batch // team.world, MEASURED)
    features = max(3, settings.channels[0] // 4)  # of a pixel: the first layer has a quarter as many places
    yield f"vae: {pictures} pictures at once of {height}x{width} take", FLOAT * pictures * height * width * features


def _largest(stage: Stage) -> tuple[int, int, int]:
    """Frames, height and width of the largest clips of the stage."""
    height, width = max(stage.sizes, key=lambda size: size[0] * size[1])
    return stage.frames, height, width


def _pixels(frames: int, height: int, width: int) -> int:
    return 3 * frames * height * width


def _memory(device: torch.device) -> int:
    """Bytes of memory that the device has in all, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def memory_told() -> Iterator[None]:
    """Say in one line, as a :class:`ConfigError`, that torch ran out of memory inside."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        said = str(error)
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in said:
            raise
        raise ConfigError(
            "there is not enough memory for this recipe; lower micro_batch in [efficiency], batch, resolution or "
            "frames, or set activation_checkpointing"
        ) from error
