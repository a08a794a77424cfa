"""Samples of golden answers: for each run noise, clean latents, texts and a teacher's latents, drawn from its name."""

from collections.abc import Mapping

import numpy as np

from stiv_deploy.runtime.bundle.contract import ModelFacts
from stiv_deploy.runtime.bundle.golden import RunSettings, Sizes
from stiv_deploy.runtime.bundle.sketch import integers, normal, seed_of
from stiv_deploy.runtime.sampling.conditioning import frame_mask
from stiv_deploy.runtime.sampling.guidance import GuidanceMode, Unseen
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.text_stage import Tokens

SIZE_NUMBERS = 512
"""Micro-conditions are whole numbers below this."""


def latent_shape(model: ModelFacts, dims: Mapping[str, int]) -> tuple[int, int, int, int]:
    """[T, C, h, w] of a clip."""
    return dims["frames"], model.latent_channels, dims["latent_height"], dims["latent_width"]


def golden_sample(name: str, settings: RunSettings, sizes: Sizes, model: ModelFacts, vocabulary: int) -> Sample:
    """The sample of the run ``name`` at ``sizes``."""
    dims = sizes.dims(model)
    shape = latent_shape(model, dims)
    length = dims["text_tokens"]
    return Sample(
        noise=_normal(shape, "noise", name),
        clean=_normal(shape, "clean", name),
        frame_mask=frame_mask(shape[0], settings.given),
        micro=integers(SIZE_NUMBERS, (6,), seed_of("micro", name)).astype(np.float32),
        text=_tokens(length, (length + 1) // 2, vocabulary, seed_of("text", name)),
        negative=_tokens(length, (length + 2) // 3, vocabulary, seed_of("negative", name)),
        settings=settings_of(settings),
    )


def settings_of(settings: RunSettings) -> SamplingSettings:
    """The runtime's own form of ``settings``."""
    return SamplingSettings(
        steps=settings.steps,
        guidance_mode=GuidanceMode(settings.guidance_mode),
        guidance_scale=settings.guidance_scale,
        image_scale=settings.image_scale,
        renorm=settings.renorm,
        solver=Solver(settings.solver),
        time_shift=settings.time_shift,
        unseen=Unseen(settings.unseen),
        guidance_from=settings.guidance_from,
        guidance_until=settings.guidance_until,
    )


def teacher(name: str, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """The latents fp32 ``shape`` that a forced run ``name`` goes on from after ``step``."""
    return _normal(shape, "teacher", name, step)


def _normal(shape: tuple[int, ...], *words: object) -> np.ndarray:
    return normal(shape, seed_of(*words)).astype(np.float32)


def _tokens(length: int, used: int, vocabulary: int, seed: int) -> Tokens:
    """``used`` random token ids of ``length``; those behind, which the mask hides, are random too."""
    return Tokens(integers(vocabulary, (length,), seed), (np.arange(length) < used).astype(np.int64))
