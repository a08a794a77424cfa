"""What a worker has on its device: the coder, the text stage, and a step engine for each size that is being made."""

import time
from collections.abc import Iterator
from functools import partial

import numpy as np

from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import SAMPLE_ROWS, dimensions
from stiv_deploy.runtime.pipeline.coding import Coder
from stiv_deploy.runtime.pipeline.plan import plan_generation
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.samples import SampleMaker
from stiv_deploy.runtime.sampling.engine import StepEngine
from stiv_deploy.runtime.sampling.hooks import GraphClock
from stiv_deploy.runtime.sampling.parallel.devices import ParallelDenoiser
from stiv_deploy.runtime.sampling.parallel.team import Team
from stiv_deploy.runtime.sampling.text_stage import TextStage
from stiv_deploy.serving.store.jobs import Job, Size
from stiv_deploy.serving.workers.clips import Clip

FEWEST = 2
"""Rows of the smallest call: those of one clip with guidance."""


def rungs(most: int) -> tuple[int, ...]:
    """Numbers of rows that calls have: each twice the one before, from ``FEWEST`` up, and ``most``."""
    found, rows = [], FEWEST
    while rows < most:
        found.append(rows)
        rows *= 2
    return (*found, most)


def default_size(bundle: Bundle) -> Size:
    """Size of a request that says nothing of it."""
    defaults = bundle.manifest.sampling
    return Size(defaults.frames, defaults.height, defaults.width)


class Workshop:
    """A ``bundle`` open on ``backend``."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self._samples = SampleMaker(bundle)
        self._clock = GraphClock(None)
        self._coder = Coder(backend, bundle, self._clock)
        least = min(bucket.batch.min for bucket in bundle.manifest.buckets)
        self._text = TextStage(backend, bundle.manifest, least)

    @property
    def default_size(self) -> Size:
        """That of the bundle, see :func:`default_size`."""
        return default_size(self.bundle)

    @property
    def prompt_hits(self) -> int:
        """How often a prompt had been encoded before."""
        return self._text.hits

    def clip(self, job: Job, request: str) -> Clip:
        """The clip of a job's ``request``, with its given pictures encoded; raises what planning does."""
        plan = plan_generation(self.bundle, GenerationRequest.from_json(request))
        given = self._coder.clean_latents(plan)
        (video,) = plan.videos
        sample = self._samples(video, given[video.given], plan.size)
        return Clip(job=job, plan=plan, sample=sample, lost=self._samples.lost(plan.videos))

    def engine(self, size: Size, slots: int, team: Team | None = None) -> StepEngine:
        """A new engine for up to ``slots`` clips of ``size``, of the devices of a ``team`` that the backend leads."""
        model = self.bundle.manifest.model
        rows = SAMPLE_ROWS * slots
        dims = dimensions(
            model,
            batch=slots,
            model_batch=rows,
            video_frames=size.frames,
            height=size.height,
            width=size.width,
            text_tokens=model.max_text_tokens,
        )
        manifest, hook = self.bundle.manifest, self._clock
        shared = None if team is None else partial(ParallelDenoiser, team, manifest)
        return StepEngine(self.backend, manifest, dims, self._text, rungs=rungs(rows), hook=hook, model=shared)

    def decoding(self, clip: Clip, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Frames uint8 [F, H, W, 3] of latents fp32 [T, C, h, w], again and again after each part, at last all made."""
        return (frames[0] for frames in self._coder.parts(clip.plan, 1)(latents[None]))

    def timed(self, engine: StepEngine) -> dict[int, float]:
        """Seconds of a call of ``engine``, which must be empty, at each of its rungs."""
        return {rows: min(self._once(engine, rows) for _ in range(2)) for rows in engine.rungs}

    def _once(self, engine: StepEngine, rows: int) -> float:
        start = time.perf_counter()
        engine.idle(rows)
        self.backend.synchronize()
        return time.perf_counter() - start

    def close(self) -> None:
        """Free the device."""
        self.free()
        self.backend.close()

    def free(self) -> None:
        """Free what is kept on it; the backend stays open."""
        self._coder.free()
