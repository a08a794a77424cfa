"""Plays the runs of a bundle's golden answers with the step engine, side by side, and holds them against the answers.

Graphs that are right alone say nothing of the code between them: which frames are given, which row is which branch,
what time a step is at, what a row sees when guidance begins or another clip leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.golden import Golden, RunAnswer, RunAnswers, inputs_of, latents_of
from stiv_deploy.runtime.errors import BundleError, StivError
from stiv_deploy.runtime.sampling.engine import StepEngine, Tick
from stiv_deploy.runtime.sampling.golden_run import VerifyRow, compared, failed
from stiv_deploy.runtime.sampling.golden_samples import golden_sample, teacher
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.text_stage import TextStage

SUBJECT = "sampling"
"""Of a row; the run's name comes after it."""


@dataclass
class _Clip:
    """A run, how many of its steps are done, and what it has given; ``error`` where it could not go on."""

    run: RunAnswer
    sample: Sample
    step: int = 0
    got: dict[str, np.ndarray] = field(default_factory=dict)
    error: StivError | None = None

    def rows(self, size: str) -> list[VerifyRow]:
        subject, outputs = f"{SUBJECT} {self.run.name}", self.run.outputs
        there = [each for each in outputs if each.name in self.got]
        if len(there) == len(outputs):
            return list(compared(subject, size, outputs, self.got))
        return list(failed(subject, size, outputs, self.error or StivError(f"{subject} ended before its last step")))


def run_rows(backend: Backend, bundle: Bundle, golden: Golden) -> list[VerifyRow]:
    """The rows of all runs; one that does not go on to its end fails in all of its outputs.

    Takes the memory of the whole model, as a generation does. Raises
    :class:`~stiv_deploy.runtime.errors.BundleError` for a file that is damaged.
    """
    answers = golden.sampling
    if answers is None:
        return []
    model = bundle.manifest.model
    clips = [
        _Clip(run, golden_sample(run.name, run.settings, answers.sizes, model, golden.vocabulary))
        for run in answers.runs
    ]
    try:
        _Player(_engine(backend, bundle, answers), clips).play()
    except BundleError:
        raise
    except StivError as error:
        for clip in clips:
            clip.error = clip.error or error
    return [row for clip in clips for row in clip.rows(answers.size)]


def _engine(backend: Backend, bundle: Bundle, answers: RunAnswers) -> StepEngine:
    manifest = bundle.manifest
    least = min(bucket.batch.min for bucket in manifest.buckets)
    text = TextStage(backend, manifest, least)
    return StepEngine(backend, manifest, answers.sizes.dims(manifest.model), text)


class _Player:
    """Lets ``clips`` into ``engine`` in their order, as soon as one fits, and keeps what each gives."""

    def __init__(self, engine: StepEngine, clips: Sequence[_Clip]) -> None:
        self._engine = engine
        self._waiting = list(clips)
        self._running: dict[int, _Clip] = {}

    def play(self) -> None:
        """Until all clips have ended."""
        while self._waiting or self._running:
            while self._waiting and self._engine.fits(self._waiting[0].sample):
                clip = self._waiting.pop(0)
                self._running[self._engine.admit(clip.sample)] = clip
            self._keep(self._engine.tick())

    def _keep(self, tick: Tick) -> None:
        for slot in tick.moved:
            clip = self._running[slot]
            clip.step += 1
            if slot not in tick.finished and slot not in tick.failed:
                self._look(slot, clip)
        for slot, latents in tick.finished.items():
            clip = self._running.pop(slot)
            clip.got[latents_of(clip.step)] = latents
        for slot, error in tick.failed.items():
            self._running.pop(slot).error = error

    def _look(self, slot: int, clip: _Clip) -> None:
        """Keep where the clip in ``slot`` is, and let it go on from a teacher's latents if it is forced."""
        pause = self._engine.pause(slot)
        clip.got |= {latents_of(clip.step): pause.latents, inputs_of(clip.step): pause.inputs}
        if clip.run.settings.forced:
            self._engine.change(slot, teacher(clip.run.name, clip.step, pause.latents.shape))
