"""From prompts to pixels with the reference sampler: text encoder, sampling loop and VAE in one call."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stiv_deploy.stiv_ref.checkpoint import Checkpoint, SamplingDefaults
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, sample
from stiv_deploy.stiv_ref.text import TextStates, tokenize


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise fp32 [len(seeds), *shape], each sample from its own Philox stream.

    A sample's noise depends on its seed alone, so that a batch equals single runs; the runtime draws the same.
    """
    draws = [np.random.Generator(np.random.Philox(seed)).standard_normal(shape, np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(draws))


def settings_of(defaults: SamplingDefaults) -> SamplingSettings:
    """The sampling settings that a checkpoint recommends."""
    return SamplingSettings(
        steps=defaults.steps,
        guidance_scale=defaults.guidance_scale,
        image_scale=defaults.image_scale,
        solver=defaults.solver,
        time_shift=defaults.time_shift,
        late_stretch=defaults.late_stretch,
    )


@torch.no_grad()
def sampling_inputs(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    seeds: Sequence[int],
    first_frames: Tensor | None,
    *,
    frames: int | None = None,
) -> SamplingInputs:
    """Inputs of :func:`~stiv_deploy.stiv_ref.sampler.sample`, one for each prompt and seed, at the checkpoint's size.

    They are on the device of the model, where text encoder and VAE have to be, and text states are of its type.
    ``first_frames`` [B, 3, H, W] in [-1, 1] are given; ``frames`` of video default to the checkpoint's own number.
    Raises :class:`~stiv_deploy.stiv_ref.errors.ConfigError` for a number of frames that the VAE cannot code.
    """
    defaults, vae, weight = checkpoint.config.sampling, checkpoint.vae, next(checkpoint.model.parameters())
    if frames is None:
        frames = defaults.frames if checkpoint.config.model.temporal else 1
    size = (defaults.height // vae.config.spatial_factor, defaults.width // vae.config.spatial_factor)
    noise = seeded_noise(seeds, (vae.latent_frames(frames), vae.config.latent_channels, *size)).to(weight.device)
    clean = torch.zeros_like(noise)
    frame_mask = torch.zeros(noise.shape[:2], dtype=torch.bool, device=weight.device)
    if first_frames is not None:
        clean[:, :1], frame_mask[:, 0] = vae.encode(first_frames.unsqueeze(1).to(weight.device)), True
    micro = noise.new_tensor([[defaults.height, defaults.width, 0, 0, defaults.stride or 1, frames]])

    def encoded(texts: Sequence[str]) -> TextStates:
        tokens = (tensor.to(weight.device) for tensor in tokenize(checkpoint.tokenizer, texts))
        states, token_mask, pooled = checkpoint.text_encoder(*tokens)
        return TextStates(states.to(weight.dtype), token_mask, pooled.to(weight.dtype))

    text, null = encoded(prompts), encoded([""] * len(noise))
    return SamplingInputs(noise, clean, frame_mask, text, null, micro.repeat(len(noise), 1))


@torch.no_grad()
def generate(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    *,
    frames: int,
    first_frames: Tensor | None = None,
) -> Tensor:
    """Generate video fp32 [B, frames, 3, H, W] in [-1, 1], one clip for each prompt and seed.

    ``first_frames`` [B, 3, H, W] in [-1, 1] makes it image-to-video. The size is the checkpoint's own. Its components
    have to be on one device.
    """
    inputs = sampling_inputs(checkpoint, prompts, seeds, first_frames, frames=frames)
    return checkpoint.vae.decode(sample(checkpoint.model, inputs, settings))
