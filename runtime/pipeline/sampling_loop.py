"""From planned videos to latents: the one place that knows how videos are sampled together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event

import numpy as np

from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import dimensions
from stiv_deploy.runtime.pipeline.plan import PlannedVideo, VideoSize
from stiv_deploy.runtime.pipeline.recent import Recent
from stiv_deploy.runtime.pipeline.timing import PhaseClock
from stiv_deploy.runtime.pipeline.tokenization import PromptTokenizer
from stiv_deploy.runtime.sampling.conditioning import frame_mask, scatter_frames
from stiv_deploy.runtime.sampling.denoiser import Denoiser, GraphClock
from stiv_deploy.runtime.sampling.guidance import BRANCHES
from stiv_deploy.runtime.sampling.noise import draw_noise
from stiv_deploy.runtime.sampling.sampler import Sampler, SamplingSettings, StepRecord

KEPT_SIZES = 2
"""Sizes whose buffers are kept; two serve a plan whose last batch is smaller than the others."""


@dataclass(frozen=True)
class Step:
    """What an observer sees after a step: its index, the number of steps, the time reached, and the latents."""

    index: int
    total: int
    time: float
    read_latents: Callable[[], np.ndarray]
    """Copies latents fp32 [B, T, C, h, w] of the videos sampled together to the host, and waits for them."""


Observer = Callable[[Step], object]
"""Called after each step; it stops the sampling by raising, for instance :class:`Cancelled`."""


class SamplingLoop:
    """Samples batches of a plan: videos of equal settings at once, one such group after another."""

    def __init__(self, backend: Backend, bundle: Bundle, clock: GraphClock, *, debug: bool = False) -> None:
        self._backend = backend
        self._bundle = bundle
        self._clock = clock
        self._debug = debug
        self._tokenizer = PromptTokenizer(bundle)
        self._samplers: Recent[Sampler] = Recent(KEPT_SIZES)

    def steps(self, batch: Sequence[PlannedVideo]) -> int:
        """How many steps an observer sees of ``batch``."""
        return sum(settings.steps for settings in _groups(batch))

    def __call__(
        self,
        batch: Sequence[PlannedVideo],
        size: VideoSize,
        clean: Sequence[Mapping[int, np.ndarray]],
        phases: PhaseClock,
        observer: Observer | None = None,
        cancel: Event | None = None,
    ) -> np.ndarray:
        """Latents fp32 [B, T, C, h, w] of ``batch``, whose given latents [C, h, w] by latent frame are ``clean``.

        ``observer`` sees the steps counted over the whole batch, with the latents of those videos that are sampled
        together. Raises :class:`Cancelled` between two steps once ``cancel`` is set, :class:`StivError` if the result
        is not finite.
        """
        least = self._bundle.bucket_for(len(batch), size.frames, size.height, size.width).batch.min
        parts: dict[int, np.ndarray] = {}
        before, total = 0, self.steps(batch)
        for settings, rows in _groups(batch).items():
            counted = None if observer is None else _counted(observer, before, total)
            filled = rows + rows[-1:] * (least - len(rows))  # the bucket takes no fewer: the last one again
            videos, given = [batch[row] for row in filled], [clean[row] for row in filled]
            parts |= zip(filled, self._sample(videos, size, given, phases, counted, cancel), strict=True)
            before += settings.steps
        return np.stack([parts[row] for row in range(len(batch))])

    def free(self) -> None:
        """Free all buffers."""
        self._samplers.clear()

    def _sample(
        self,
        videos: Sequence[PlannedVideo],
        size: VideoSize,
        clean: Sequence[Mapping[int, np.ndarray]],
        phases: PhaseClock,
        observer: Callable[[StepRecord], None] | None,
        cancel: Event | None,
    ) -> np.ndarray:
        """Latents of ``videos``, all of the same settings."""
        settings = videos[0].settings
        with phases("load"):
            sampler = self._sampler(len(videos), size, settings)
        with phases("text"):
            self._condition(sampler.denoiser, videos)
        with phases("denoise"):
            shape = sampler.denoiser.specs["decoder"].inputs[0].sized(sampler.denoiser.dims)[1:]
            noise = draw_noise([video.seed for video in videos], shape)
            given = np.concatenate([scatter_frames(frames, 1, shape) for frames in clean])
            mask = np.concatenate([frame_mask(1, shape[0], frames) for frames in clean])
            return sampler.run(noise, given, mask, settings, observer, cancel)

    def _sampler(self, batch: int, size: VideoSize, settings: SamplingSettings) -> Sampler:
        model = self._bundle.manifest.model
        dims = dimensions(
            model,
            batch=batch,
            branches=len(BRANCHES[settings.guidance_mode]),
            video_frames=size.frames,
            height=size.height,
            width=size.width,
            text_tokens=model.max_text_tokens,
        )
        return self._samplers.get(
            tuple(dims.values()),
            lambda: Sampler(Denoiser(self._backend, self._bundle.manifest, dims, self._clock), debug=self._debug),
        )

    def _condition(self, denoiser: Denoiser, videos: Sequence[PlannedVideo]) -> None:
        """Text of all branches, those without text getting the negative prompts, and micro-conditions."""
        branches = BRANCHES[videos[0].settings.guidance_mode]
        texts = [video.prompt if branch.text else video.negative_prompt for branch in branches for video in videos]
        denoiser.set_text(*self._tokenizer(texts))
        denoiser.set_micro(np.tile(np.stack([video.micro for video in videos]), (len(branches), 1)))


def _groups(batch: Sequence[PlannedVideo]) -> dict[SamplingSettings, list[int]]:
    """Rows of ``batch`` by settings."""
    groups: dict[SamplingSettings, list[int]] = {}
    for row, video in enumerate(batch):
        groups.setdefault(video.settings, []).append(row)
    return groups


def _counted(observer: Observer, before: int, total: int) -> Callable[[StepRecord], None]:
    """``observer`` with ``before`` steps done already, of ``total``."""

    def observe(record: StepRecord) -> None:
        observer(Step(before + record.step, total, record.time, record.read_latents))

    return observe
