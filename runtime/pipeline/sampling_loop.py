"""From planned videos to latents: the videos of a batch go through one engine together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from threading import Event
from typing import Any

import numpy as np

from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import dimensions
from stiv_deploy.runtime.errors import Cancelled, RequestError
from stiv_deploy.runtime.pipeline.given import as_array
from stiv_deploy.runtime.pipeline.plan import GenerationPlan, PlannedVideo, VideoSize
from stiv_deploy.runtime.pipeline.recent import Recent
from stiv_deploy.runtime.pipeline.samples import SampleMaker
from stiv_deploy.runtime.pipeline.timing import PhaseClock
from stiv_deploy.runtime.sampling.engine import MakeModel, Pause, StepEngine
from stiv_deploy.runtime.sampling.hooks import Hook
from stiv_deploy.runtime.sampling.parallel.devices import ParallelDenoiser
from stiv_deploy.runtime.sampling.parallel.team import Team
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.solvers import evaluations, most_rows
from stiv_deploy.runtime.sampling.text_stage import TextStage

KEPT_SIZES = 2
"""Sizes whose buffers are kept; two serve a plan whose last batch is smaller than the others."""


@dataclass(frozen=True)
class Step:
    """What an observer sees after a step: its index, the number of steps, the time reached, and the latents."""

    index: int
    total: int
    time: float
    read_latents: Callable[[], np.ndarray]
    """Copies the latents fp32 [B, T, C, h, w] of the batch to the host, and waits for them."""


Observer = Callable[[Step], Any]
"""Called after each step; it stops the sampling by raising, for instance :class:`Cancelled`.

Latents fp32 [B, T, C, h, w] that it returns take the place of those of the batch, but for given frames."""
Follow = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""Called after each step of all clips: its number from 1 on, latents fp32 [clips, T, C, h, w] before it and after it.

The clips go on from those that it returns, but for given frames."""


class SamplingLoop:
    """Samples batches of a plan. With ``capture`` the model's calls become a CUDA graph where the backend has such.

    With a ``team`` its devices make each clip together; ``backend`` is then that of the one that leads.
    """

    def __init__(
        self,
        backend: Backend,
        bundle: Bundle,
        hook: Hook,
        *,
        capture: bool = True,
        debug: bool = False,
        team: Team | None = None,
    ) -> None:
        self._backend = backend
        self._bundle = bundle
        self._hook = hook
        self._capture, self._debug, self._team = capture, debug, team
        self._samples = SampleMaker(bundle)
        self._engines: Recent[StepEngine] = Recent(KEPT_SIZES)

    def lost(self, plan: GenerationPlan) -> dict[str, str]:
        """What the model will not hear of the prompts of ``plan``, by prompt."""
        return self._samples.lost(plan.videos)

    def steps(self, batch: Sequence[PlannedVideo]) -> int:
        """How many steps an observer sees of ``batch``: evaluations of the model that complete a step of a video."""
        planned = [evaluations(video.settings) for video in batch]
        return len({tick for each in planned for tick, evaluation in enumerate(each) if not evaluation.hold})

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

        Raises :class:`Cancelled` between two steps once ``cancel`` is set,
        :class:`~stiv_deploy.runtime.errors.StivError` if a result is not finite.
        """
        samples = [self._samples(video, given, size) for video, given in zip(batch, clean, strict=True)]
        with phases("load"):
            engine = self._engine(batch, size)
        try:
            with phases("text"):
                for sample in samples:
                    engine.admit(sample)
            with phases("denoise"):
                return _drained(engine, self.steps(batch), observer, cancel)
        finally:
            for slot in engine.running:
                engine.evict(slot)

    def in_step(
        self,
        batches: Sequence[Sequence[PlannedVideo]],
        size: VideoSize,
        clean: Sequence[Sequence[Mapping[int, np.ndarray]]],
        follow: Follow,
    ) -> np.ndarray:
        """Latents fp32 [clips, T, C, h, w] of ``batches``, which take each step one after the other.

        All have one number of steps, with one evaluation each. Raises what a call does.
        """
        made = zip(batches, clean, strict=True)
        samples = [[self._samples(*one, size) for one in zip(*batch, strict=True)] for batch in made]
        latents = [np.stack([sample.start(sample.frame_mask) for sample in each]) for each in samples]
        paused: list[list[Pause | None]] = [[None] * len(batch) for batch in batches]
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        for step in range(1, self.steps(batches[0]) + 1):
            before = np.concatenate(latents)
            for place, batch in enumerate(batches):
                engine = self._engine(batch, size)
                latents[place], paused[place] = _one_step(engine, samples[place], paused[place], latents[place])
            latents = np.split(follow(step, before, np.concatenate(latents)), ends)
        return np.concatenate(latents)

    def check_shared(self, batch: Sequence[PlannedVideo], size: VideoSize) -> None:
        """:class:`RequestError` if the team's devices cannot share ``batch``.

        A group of them would have fewer rows than graphs take, or a clip skips blocks, whose residuals nobody has.
        """
        if self._team is not None:
            if any(video.settings.skipped_steps for video in batch):
                raise RequestError("skipped steps are for one device; leave them out, or give one device")
            least = self._least(batch, size)
            self._team.placement.check_rows(_rungs(batch, least, self._dims(batch, size)["model_batch"]), least)

    def free(self) -> None:
        """Free all buffers."""
        self._engines.clear()
        self.__dict__.pop("_text", None)

    def forget_texts(self) -> None:
        """Compute every prompt anew, the empty one of guidance too."""
        if "_text" in self.__dict__:
            self._text.forget()

    @cached_property
    def _text(self) -> TextStage:
        """Prompts are the same at every size."""
        least = min(bucket.batch.min for bucket in self._bundle.manifest.buckets)
        return TextStage(self._backend, self._bundle.manifest, least, self._hook)

    @property
    def _model(self) -> MakeModel | None:
        """What makes the model of the rows; None for that of one device."""
        team = self._team
        return None if team is None else partial(ParallelDenoiser, team, self._bundle.manifest, capture=self._capture)

    def _least(self, batch: Sequence[PlannedVideo], size: VideoSize) -> int:
        """Clips, and rows, than which graphs take no fewer."""
        return self._bundle.bucket_for(len(batch), size.frames, size.height, size.width).batch.min

    def _dims(self, batch: Sequence[PlannedVideo], size: VideoSize) -> dict[str, int]:
        """Symbol values; where graphs take no fewer than there are, some slots stay free and some rows nobody's."""
        model, least = self._bundle.manifest.model, self._least(batch, size)
        return dimensions(
            model,
            batch=max(len(batch), least),
            model_batch=max(sum(most_rows(video.settings) for video in batch), least),
            video_frames=size.frames,
            height=size.height,
            width=size.width,
            text_tokens=model.max_text_tokens,
        )

    def _engine(self, batch: Sequence[PlannedVideo], size: VideoSize) -> StepEngine:
        """The engine for ``batch``, kept from an earlier one or made now."""
        dims = self._dims(batch, size)
        rungs = _rungs(batch, self._least(batch, size), dims["model_batch"])

        def make() -> StepEngine:
            manifest = self._bundle.manifest
            return StepEngine(
                self._backend,
                manifest,
                dims,
                self._text,
                rungs=rungs,
                hook=self._hook,
                capture=self._capture,
                debug=self._debug,
                model=self._model,
            )

        return self._engines.get((*dims.values(), rungs), make)


def _one_step(
    engine: StepEngine, samples: Sequence[Sample], paused: Sequence[Pause | None], latents: np.ndarray
) -> tuple[np.ndarray, list[Pause | None]]:
    """Latents fp32 [B, T, C, h, w] of ``samples`` a step on from ``latents``, and all else that the next one needs."""
    try:
        slots = [engine.admit(sample, pause) for sample, pause in zip(samples, paused, strict=True)]
        for slot, pause, own in zip(slots, paused, latents, strict=True):
            if pause is not None:
                engine.change(slot, own)
        tick = engine.tick()
        for error in tick.failed.values():
            raise error
        pauses = [None if slot in tick.finished else engine.pause(slot) for slot in slots]
        both = zip(slots, pauses, strict=True)
        return np.stack([tick.finished[slot] if pause is None else pause.latents for slot, pause in both]), pauses
    finally:
        for slot in engine.running:
            engine.evict(slot)


def _rungs(batch: Sequence[PlannedVideo], least: int, most: int) -> tuple[int, ...]:
    """Numbers of rows to bind: one where all videos have theirs to the end.

    Where some end before others there are two more, and where guidance is off at times that of the clips.
    """
    planned = [evaluations(video.settings) for video in batch]
    shares = (1,) if len({len(each) for each in planned}) == 1 else (1, 2, 4)
    unguided = {len(batch)} if any(not one.guided for each in planned for one in each) else set()
    return tuple(sorted({max(least, rows) for rows in (*(-(-most // share) for share in shares), *unguided)}))


def _drained(engine: StepEngine, total: int, observer: Observer | None, cancel: Event | None) -> np.ndarray:
    """Latents fp32 [B, T, C, h, w] of the videos in ``engine``, by slot."""
    slots, done = engine.running, 0
    reached, made = dict.fromkeys(slots, 0.0), dict.fromkeys(slots, np.empty(0))
    while engine.running:
        if cancel is not None and cancel.is_set():
            raise Cancelled(f"cancelled after {done} of {total} steps")
        tick = engine.tick()
        for error in tick.failed.values():
            raise error
        made |= tick.finished
        reached |= tick.moved
        done += bool(tick.moved)
        if tick.moved and observer is not None:
            changed = observer(Step(done - 1, total, min(reached.values()), lambda: engine.read()[slots]))
            if changed is not None:
                _change(engine, slots, made, changed)
    return np.stack([made[slot] for slot in slots])


def _change(engine: StepEngine, slots: Sequence[int], made: dict[int, np.ndarray], changed: Any) -> None:
    """Go on from the latents ``changed``, fp32 [B, T, C, h, w]; videos that are finished keep theirs."""
    wanted = (len(slots), *engine.shape)
    latents = np.asarray(changed) if (array := as_array(changed)) is None else array
    if latents.shape != wanted or latents.dtype != np.float32:
        raise RequestError(
            f"a step callback returned latents {latents.dtype} {list(latents.shape)}; give float32 {list(wanted)}"
        )
    for slot, each in zip(slots, latents, strict=True):
        if slot in engine.running:
            engine.change(slot, each)
