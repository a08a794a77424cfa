"""A generation request with everything checked and every default filled in, before the first expensive step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.manifest import SamplingDefaults
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.guidance import GuidanceMode
from stiv_deploy.runtime.sampling.sampler import SamplingSettings, Solver

Name = TypeVar("Name", bound=StrEnum)
SEED_LIMIT = 2**63


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """Size of a video in frames and pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One video to make: prompt, negative prompt and the seed of its noise."""

    prompt: str
    negative: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """All samples of a call, in batches that the bundle can run, with what they share.

    ``images`` are uint8 [H, W, 3] by video frame; ``decode_tile`` is for :func:`runtime.tiling.plan_tiles`.
    """

    batches: tuple[tuple[Sample, ...], ...]
    size: VideoSize
    images: dict[int, np.ndarray]
    settings: SamplingSettings
    decode_tile: int | None = None

    @property
    def count(self) -> int:
        """Number of videos."""
        return sum(len(batch) for batch in self.batches)


def whole_number(name: str, value: Any) -> int:
    """``value`` as int; :class:`RequestError` if it is not a whole number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise RequestError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def number(name: str, value: Any) -> float:
    """``value`` as float; :class:`RequestError` if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def named(kind: type[Name], what: str, value: Any) -> Name:
    """The member of ``kind`` called ``value``; :class:`RequestError` listing the names if there is none."""
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"unknown {what} {value!r}; there are: {', '.join(kind)}") from None


def sampling_settings(
    defaults: SamplingDefaults,
    *,
    steps: Any,
    guidance_scale: Any,
    image_scale: Any,
    guidance_mode: Any,
    renorm: bool | None,
    solver: Any,
    time_shift: Any,
) -> SamplingSettings:
    """Settings from a caller's values, ``None`` meaning the bundle's default; :class:`RequestError` for a bad one."""

    def chosen(value: Any, default: Any) -> Any:
        return default if value is None else value

    return SamplingSettings(
        steps=whole_number("num_inference_steps", chosen(steps, defaults.steps)),
        guidance_scale=number("guidance_scale", chosen(guidance_scale, defaults.guidance_scale)),
        image_scale=number("image_guidance_scale", chosen(image_scale, defaults.image_scale)),
        guidance_mode=named(GuidanceMode, "guidance_mode", chosen(guidance_mode, defaults.guidance_mode)),
        renorm=bool(chosen(renorm, defaults.renorm)),
        solver=named(Solver, "solver", chosen(solver, defaults.solver)),
        time_shift=number("time_shift", chosen(time_shift, defaults.time_shift)),
    )


def video_size(defaults: SamplingDefaults, frames: Any, height: Any, width: Any) -> VideoSize:
    """Size from a caller's values, ``None`` meaning the bundle's default."""
    return VideoSize(
        frames=defaults.frames if frames is None else whole_number("num_frames", frames),
        height=defaults.height if height is None else whole_number("height", height),
        width=defaults.width if width is None else whole_number("width", width),
    )


def prompt_list(prompt: str | Sequence[str]) -> list[str]:
    """Prompts as a list; :class:`RequestError` if there is none, or one is not text."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise RequestError("no prompt given; give a string or a list of at least one (an empty string is allowed)")
    for each in prompts:
        if not isinstance(each, str):
            raise RequestError(f"a prompt must be a string, got {each!r}")
    return prompts


def negative_list(negative: str | Sequence[str], count: int) -> list[str]:
    """One negative prompt for each of ``count`` prompts."""
    negatives = [negative] * count if isinstance(negative, str) else prompt_list(negative)
    if len(negatives) != count:
        raise RequestError(f"{len(negatives)} negative prompts for {count} prompts; give one for all, or one each")
    return negatives


def first_seed(seed: Any, generator: np.random.Generator | None, count: int) -> int:
    """The seed of the first of ``count`` samples: given, drawn from ``generator``, or new."""
    if seed is None:
        source = np.random.default_rng() if generator is None else generator
        return int(source.integers(2**32))
    if generator is not None:
        raise RequestError("give either seed or generator, not both")
    seed = whole_number("seed", seed)
    if not 0 <= seed <= SEED_LIMIT - count:
        raise RequestError(f"seed must be from 0 to 2^63 - {count}, got {seed}")
    return seed


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Noise fp32 [len(seeds), *shape], each sample from its own seed, so that batching does not change it."""
    draws = (np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32) for seed in seeds)
    return np.stack(list(draws))


def make_samples(
    prompt: str | Sequence[str],
    negative: str | Sequence[str],
    videos_per_prompt: Any,
    seed: Any,
    generator: np.random.Generator | None,
) -> list[Sample]:
    """Samples of a call, the videos of one prompt next to each other, seeds counting up; :class:`RequestError`."""
    prompts = prompt_list(prompt)
    negatives = negative_list(negative, len(prompts))
    repeats = whole_number("num_videos_per_prompt", videos_per_prompt)
    if repeats < 1:
        raise RequestError(f"num_videos_per_prompt must be at least 1, got {repeats}")
    pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(repeats)]
    first = first_seed(seed, generator, len(pairs))
    return [Sample(prompt=p, negative=n, seed=first + index) for index, (p, n) in enumerate(pairs)]


def in_batches(bundle: Bundle, samples: Sequence[Sample], size: VideoSize) -> tuple[tuple[Sample, ...], ...]:
    """``samples`` in as few batches as the bundle allows for ``size``, each as large as the others or one smaller.

    Raises :class:`RequestError` if no bucket holds such videos.
    """
    largest = bundle.max_batch(size.frames, size.height, size.width)
    parts = np.array_split(np.arange(len(samples)), math.ceil(len(samples) / largest))
    batches = tuple(tuple(samples[index] for index in part) for part in parts)
    for batch in batches:
        bundle.bucket_for(len(batch), size.frames, size.height, size.width)
    return batches
