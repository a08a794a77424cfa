"""Clips of the toy model for tests of the step engine: requests, engines, and what the reference makes of them."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import SAMPLE_ROWS, dimensions
from stiv_deploy.runtime.sampling import rope
from stiv_deploy.runtime.sampling.conditioning import frame_mask
from stiv_deploy.runtime.sampling.engine import StepEngine
from stiv_deploy.runtime.sampling.guidance import GuidanceMode
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.settings import SamplingSettings
from stiv_deploy.runtime.sampling.text_stage import TextStage, Tokens
from stiv_deploy.stiv_ref import sampler as reference
from stiv_deploy.stiv_ref.guidance import GuidanceMode as ReferenceMode
from stiv_deploy.stiv_ref.guidance import Unseen as ReferenceUnseen
from stiv_deploy.stiv_ref.text import TextStates

EPS = float(np.finfo(np.float32).eps)
FRAMES, SIZE = 3, 4
LATENTS = (FRAMES, 4, SIZE, SIZE)
IDS = np.array([3, 4, 2, 0, 0])
OTHER_IDS = np.array([5, 2, 0, 0, 0])
NULL_IDS = np.array([2, 0, 0, 0, 0])
MICRO = np.array([8, 8, 0, 0, 1, 3], dtype=np.float32)
MODES = {"none": 1, "jit": 2, "sit": 3}


def drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(LATENTS, dtype=np.float32)


def tokens(ids: np.ndarray) -> Tokens:
    return Tokens(ids, (ids > 0).astype(np.int64))


def make_engine(bundle: Bundle, slots: int = 1, rungs: tuple[int, ...] = (), **options: Any) -> StepEngine:
    manifest, backend = bundle.manifest, options.pop("backend", None) or OnnxRuntimeBackend(bundle, threads=1)
    rows = rungs[-1] if rungs else SAMPLE_ROWS * slots
    dims = dimensions(
        manifest.model,
        batch=slots,
        model_batch=rows,
        video_frames=FRAMES,
        height=2 * SIZE,
        width=2 * SIZE,
        text_tokens=5,
    )
    return StepEngine(backend, manifest, dims, TextStage(backend, manifest), rungs=rungs, **options)


def settings_of(mode: str = "jit", **changes: Any) -> SamplingSettings:
    base = SamplingSettings(steps=5, guidance_mode=GuidanceMode(mode), guidance_scale=3.0, image_scale=1.5)
    return dataclasses.replace(base, **changes)


def sample_of(chosen: SamplingSettings, frames: list[int] | None = None, seed: int = 0, **changes: Any) -> Sample:
    plain = Sample(
        noise=drawn(seed),
        clean=drawn(seed + 1),
        frame_mask=frame_mask(FRAMES, frames or []),
        micro=MICRO,
        text=tokens(IDS),
        negative=tokens(NULL_IDS),
        settings=chosen,
    )
    return dataclasses.replace(plain, **changes)


def finish(engine: StepEngine) -> dict[int, np.ndarray]:
    """Run what is in the engine to its end: latents by slot; raises what failed."""
    finished: dict[int, np.ndarray] = {}
    while engine.running:
        tick = engine.tick()
        finished |= tick.finished
        for error in tick.failed.values():
            raise error
    return finished


def run(engine: StepEngine, sample: Sample) -> np.ndarray:
    slot = engine.admit(sample)
    return finish(engine)[slot]


class ToyModel:
    """The toy velocity behind the call of ``stiv_ref.model.Stiv``, for the reference sampler."""

    def __init__(self, toy_bundle: Bundle, toy: Any) -> None:
        self.toy = toy
        self.config = SimpleNamespace(student=toy.student)
        dims = {"latent_height": SIZE, "latent_width": SIZE, "token_frames": FRAMES}
        tables = rope.rope_tables(toy_bundle.manifest.model, dims)
        space = tables["spatial_cos"].sum(1) + tables["spatial_sin"].sum(1)
        self.place = (tables["temporal_cos"].sum(1) + tables["temporal_sin"].sum(1))[:, None] + space

    def text(self, ids: np.ndarray) -> TextStates:
        mask = (ids > 0).astype(np.int64)
        states, pooled = self.toy.text(ids, mask)
        return TextStates(torch.from_numpy(states), torch.from_numpy(mask), torch.from_numpy(pooled))

    def text_kv(self, _states: torch.Tensor) -> None:
        return None

    def __call__(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        micro: torch.Tensor,
        *text: Any,
        text_kv: None,
        skipping: Any = None,
        **late: torch.Tensor,
    ) -> Any:
        assert text_kv is None
        states, mask, pooled = (part.numpy() for part in text)
        time = sum(late.values(), start=timestep)
        parts = (model_input.numpy(), time.numpy(), micro.numpy(), states, mask, pooled, self.place)
        velocity = self.toy.velocity(*parts, skipping)
        return torch.from_numpy(velocity)


def reference_latents(toy_bundle: Bundle, toy: Any, sample: Sample) -> np.ndarray:
    model = ToyModel(toy_bundle, toy)
    inputs = reference.SamplingInputs(
        noise=torch.from_numpy(sample.noise[None]),
        clean=torch.from_numpy(sample.clean[None]),
        frame_mask=torch.from_numpy(sample.frame_mask[None]),
        text=model.text(sample.text.ids[None]),
        null_text=model.text(sample.negative.ids[None]),
        micro=torch.from_numpy(sample.micro[None]),
    )
    values = dataclasses.asdict(sample.settings)
    values |= {"guidance_mode": ReferenceMode(values["guidance_mode"]), "solver": reference.Solver(values["solver"])}
    values |= {"unseen": ReferenceUnseen(values["unseen"])}
    return reference.sample(model, inputs, reference.SamplingSettings(**values)).numpy()[0]  # type: ignore[arg-type]


def tolerance(steps: int) -> float:
    """Every evaluation does about 60 fp32 operations on values below ~30 (velocities times guidance weights of at most
    3); errors are carried on by a slope below 1, so that they add up over at most two evaluations a step. AB2 takes
    them by weights that sum to 1 + r, times a step that is r times the last one: over a run less than 1 + r <= 4.5.
    """
    return 2 * steps * 60 * 30 * EPS
