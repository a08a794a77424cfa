"""Stage 0: the small VAE, trained on single frames, then frozen.

It is small enough for every process to hold it whole; the batch is dealt out and gradients are averaged.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stiv_deploy.stiv_ref.data.source import Batch, Source
from stiv_deploy.stiv_ref.errors import ConfigError, DivergedError
from stiv_deploy.stiv_ref.objective import sample_generator
from stiv_deploy.stiv_ref.recipe import WHOLE_SHARE, TrainedVae
from stiv_deploy.stiv_ref.training.optimizer import allocate, set_rate
from stiv_deploy.stiv_ref.training.run import VAE_STAGE, Run
from stiv_deploy.stiv_ref.vae import Vae, vae_loss

MEASURED = 256
"""Single frames that standardize the latents."""
TRIES = 4
"""Crops of a frame, of which the VAE sees the busiest."""


def begin_vae(run: Run) -> None:
    """Make the optimizer of the VAE's training."""
    assert isinstance(run.recipe.vae, TrainedVae)
    run.vae.train().requires_grad_(True)
    run.optimizer = torch.optim.AdamW(run.vae.parameters(), lr=run.recipe.vae.learning_rate, weight_decay=0.0)
    allocate(run.optimizer, run.parameters)


def frames_of(batch: Batch) -> Tensor:
    """Images [B, 3, H, W] of ``batch``; :class:`ConfigError` if it holds latents instead."""
    if batch.video is None:
        raise ConfigError("the data has pre-computed latents: name the frozen VAE that they are from in [vae]")
    return batch.video[:, 0]


def busiest_crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Of :data:`TRIES` random crops of ``image`` [3, H, W] the one [3, size, size] with the largest variance."""
    tops, lefts = (torch.randint(room - size + 1, (TRIES,), generator=generator).tolist() for room in image.shape[1:])
    crops = [image[:, top : top + size, left : left + size] for top, left in zip(tops, lefts, strict=True)]
    return max(crops, key=lambda crop: crop.var().item())


def seen(images: Tensor, settings: TrainedVae, step: int, generators: Sequence[torch.Generator]) -> Tensor:
    """What the VAE sees of ``images`` [B, 3, H, W] at ``step``: crops, if asked for, and all of them at the end."""
    if settings.crop is None or step >= (1 - WHOLE_SHARE) * settings.steps:
        return images
    pairs = zip(images, generators, strict=True)
    return torch.stack([busiest_crop(image, settings.crop, generator) for image, generator in pairs])


def vae_step(run: Run, batches: Sequence[Batch], parts: Sequence[range]) -> dict[str, float]:
    """Train the VAE on ``batches``, this process's part of the step; all processes together.

    Raises :class:`DivergedError` before a loss that is not finite changes a weight.
    """
    settings, team = run.recipe.vae, run.team
    assert isinstance(settings, TrainedVae)
    assert isinstance(run.vae, Vae)
    assert run.optimizer is not None
    numbers = [index for part in parts for index in part]
    generators = [sample_generator(run.recipe.seed, VAE_STAGE, run.step, index) for index in numbers]
    images = torch.cat([frames_of(batch) for batch in batches])
    images = seen(images, settings, run.step, generators).to(team.device)
    with torch.no_grad():
        shape = run.vae.posterior(images[:1])[0].shape[1:]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(team.device)
    loss = vae_loss(run.vae, images, settings.kl_weight, noise)
    mean = team.gather(loss.detach().reshape(1)).mean().item()
    if not math.isfinite(mean):
        raise DivergedError(
            f"the VAE's loss is {mean} at step {run.step}; the last saved state is kept. Lower vae.learning_rate in "
            "the recipe and train into another --out"
        )
    run.optimizer.zero_grad()
    loss.backward()
    team.average_gradients(run.vae.parameters())
    rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * run.step / settings.steps))
    set_rate(run.optimizer, rate)
    run.optimizer.step()
    run.step += 1
    return {"loss": mean, "learning_rate": rate}


def finish_vae(run: Run, source: Source) -> None:
    """Measure the standardization of the latents of the trained VAE on ``source``, and freeze it."""
    assert isinstance(run.vae, Vae)
    run.vae.standardize(source.stills(MEASURED).to(run.team.device))
    run.vae.eval().requires_grad_(False)
