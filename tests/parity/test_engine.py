"""The engine on a real model: clips of every kind in one call are, bit by bit, what each is alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import dimensions
from stiv_deploy.runtime.pipeline.tokenization import PromptTokenizer
from stiv_deploy.runtime.sampling.conditioning import frame_mask, micro_conditions
from stiv_deploy.runtime.sampling.engine import StepEngine
from stiv_deploy.runtime.sampling.guidance import GuidanceMode
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.text_stage import TextStage, Tokens

SLOTS, ROWS = 4, 9
JIT, SIT, NONE = GuidanceMode.JIT, GuidanceMode.SIT, GuidanceMode.NONE
KINDS = (
    ("digit three moving left", (), SamplingSettings(steps=4, guidance_mode=JIT)),
    ("digit four moving up", (0,), SamplingSettings(steps=3, guidance_mode=SIT, time_shift=2.0)),
    ("digit five moving down", (0, -1), SamplingSettings(steps=3, guidance_mode=NONE, solver=Solver.HEUN)),
    ("digit one moving right", (0,), SamplingSettings(steps=2, guidance_mode=JIT, solver=Solver.HEUN)),
    ("digit nine moving right", (), SamplingSettings(steps=4, guidance_mode=SIT, renorm=False)),
    ("digit two moving up", (0,), SamplingSettings(steps=4, guidance_mode=JIT, solver=Solver.AB2, time_shift=3.0)),
)
PARITY = 1e-5
"""Gate of a float32 graph; other rungs sum in another order, and sampling contracts differences (slope below 1)."""


class Engines:
    """Engines of any rungs over one backend, and the clips of ``KINDS``."""

    def __init__(self, bundle: Bundle) -> None:
        self.manifest, self.backend = bundle.manifest, OnnxRuntimeBackend(bundle, threads=1)
        model, size = self.manifest.model, self.manifest.sampling
        self.dims = dimensions(
            model,
            batch=SLOTS,
            model_batch=ROWS,
            video_frames=size.frames,
            height=size.height,
            width=size.width,
            text_tokens=model.max_text_tokens,
        )
        self.text = TextStage(self.backend, self.manifest)
        tokenizer = PromptTokenizer(bundle)
        self.samples = [self._sample(tokenizer, seed, *kind) for seed, kind in enumerate(KINDS)]

    def _sample(
        self, tokenizer: PromptTokenizer, seed: int, prompt: str, frames: tuple[int, ...], settings: SamplingSettings
    ) -> Sample:
        dims, size, rng = self.dims, self.manifest.sampling, np.random.default_rng(seed)
        shape = (dims["frames"], self.manifest.model.latent_channels, dims["latent_height"], dims["latent_width"])
        text, negative = (Tokens(*pair) for pair in zip(*tokenizer([prompt, ""]), strict=True))
        return Sample(
            noise=rng.standard_normal(shape, dtype=np.float32),
            clean=rng.standard_normal(shape, dtype=np.float32),
            frame_mask=frame_mask(shape[0], frames),
            micro=micro_conditions(size.height, size.width, 1, size.frames),
            text=text,
            negative=negative,
            settings=settings,
        )

    def engine(self, *rungs: int) -> StepEngine:
        return StepEngine(self.backend, self.manifest, self.dims, self.text, rungs=rungs)


def one_by_one(engine: StepEngine, samples: list[Sample]) -> list[np.ndarray]:
    made = []
    for sample in samples:
        slot = engine.admit(sample)
        while engine.running:
            tick = engine.tick()
        made.append(tick.finished[slot])
    return made


def joining(engine: StepEngine, samples: list[Sample], gap: int) -> Iterator[tuple[int, np.ndarray]]:
    """A new clip every ``gap`` ticks, where it fits; numbers and latents as they finish."""
    waiting, places, ticks = list(enumerate(samples)), {}, 0
    while waiting or engine.running:
        while waiting and waiting[0][0] * gap <= ticks and engine.fits(waiting[0][1]):
            number, sample = waiting.pop(0)
            places[engine.admit(sample)] = number
        yield from ((places[slot], latents) for slot, latents in engine.tick().finished.items())
        ticks += 1


@pytest.mark.slow
def test_mixed_clips_are_what_each_is_alone(bundle: Path) -> None:
    engines = Engines(Bundle.open(bundle))
    alone = one_by_one(engines.engine(ROWS), engines.samples)
    for gap in (0, 1):
        together = dict(joining(engines.engine(ROWS), engines.samples, gap))
        for number, latents in enumerate(alone):
            np.testing.assert_array_equal(together[number], latents)
    for number, latents in joining(engines.engine(1, 2, 4, ROWS), engines.samples, 1):
        assert np.linalg.norm(latents - alone[number]) <= PARITY * np.linalg.norm(alone[number])
