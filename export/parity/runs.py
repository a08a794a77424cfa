"""What the parity ladder runs: every graph's inputs, and the bundle's denoiser along the reference's trajectory."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from stiv_deploy.export.parity.oracle import Oracle, Tensors
from stiv_deploy.export.parity.requests import Request
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import block_names, half_names
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.sampling.denoiser import Denoiser
from stiv_deploy.runtime.sampling.engine import StepEngine
from stiv_deploy.runtime.sampling.text_stage import TextStage, Tokens


def probe(oracle: Oracle, request: Request, manifest: Manifest) -> Iterator[tuple[str, Tensors]]:
    """Every graph of ``manifest`` with its inputs as they are half-way through ``request``, computed by ``oracle``."""
    blocks, halves = manifest.model.blocks, manifest.halves
    inputs = oracle.sampling_inputs(request)
    clean, noise, mask = inputs.clean, inputs.noise, inputs.frame_mask
    count, half = request.branches, 0.5
    tokens: Tensors = {"token_ids": request.token_ids, "token_mask": request.token_mask}
    yield "text_encoder", tokens
    text = oracle.run("text_encoder", tokens)
    yield "text_kv", text
    kv = oracle.run("text_kv", text)
    yield "image_encoder", {"video": request.video}
    latents = half * oracle.run("image_encoder", {"video": request.video})["latents"] + half * noise
    model_input = latents.repeat(count, 1, 1, 1, 1)
    embed = {
        "model_input": model_input,
        **request.timed(half, 0.75),
        "micro": inputs.micro.repeat(count, 1),
        "pooled": text["pooled"],
        **oracle.rope(latents),
    }
    yield "embed", embed
    state = oracle.run("embed", embed)
    fixed = {"modulation": state["modulation"], "text_mask": request.text_mask(), **oracle.rope(latents)}
    x = state["x"]
    for index, name in enumerate(block_names(blocks)):
        given = {"x": x, **fixed, "text_k": kv["text_k"][index], "text_v": kv["text_v"][index]}
        yield name, given
        if halves:
            spatial, mixed = half_names(blocks)[index]
            yield spatial, given
            yield mixed, {**given, "x": oracle.run(spatial, given)["x_out"]}
        x = oracle.run(name, given)["x_out"]
    if manifest.skips:
        both = {"x": state["x"], "last": x}
        yield "residual", both
        residual = oracle.run("residual", both)["residual"]
        yield "extrapolate", {**both, **skipping_inputs(residual)}
    head = {"x": x, "condition": state["condition"], "model_input": model_input}
    yield "head", head
    velocity = oracle.run("head", head)["velocity"]
    yield (
        "step",
        {
            "velocity": velocity,
            "latents": latents,
            "clean": clean,
            "noise": noise,
            "frame_mask": mask,
            **request.guidance_inputs(),
            **request.weight_inputs(half),
            "previous_velocity": clean - noise,
            "solver_weights": torch.tensor([[1.5, -0.5]]),
            "dt": torch.tensor([0.1]),
            "next_timestep": torch.tensor([0.6]),
            "hold": torch.tensor([False]),
        },
    )
    yield "decoder", {"latents": latents}


def skipping_inputs(residual: Tensor) -> Tensors:
    """What ``extrapolate`` takes besides tokens: ``residual`` [G, T', S, D] and another one; every second row skips."""
    rows = len(residual)
    return {
        "residual_0": residual,
        "residual_1": 0.9 * residual,
        "residual_weights": torch.tensor([[-0.6, 1.6]]).repeat(rows, 1),
        "skipped": torch.arange(rows) % 2 == 0,
    }


def free_run(backend: Backend, bundle: Bundle, dims: dict[str, int], request: Request) -> np.ndarray:
    """Latents fp32 [1, T, C, h, w] of the whole loop, by the runtime's engine."""
    engine = StepEngine(backend, bundle.manifest, dims, TextStage(backend, bundle.manifest))
    slot = engine.admit(request.sample())
    while engine.running:
        tick = engine.tick()
        for error in tick.failed.values():
            raise error
    return tick.finished[slot][None]


class TeacherForced:
    """Guided velocity of the bundle at latents that someone else gives: one model call and one ``step``."""

    def __init__(self, backend: Backend, bundle: Bundle, dims: dict[str, int], request: Request) -> None:
        self.backend = backend
        self.request, self.times = request, request.times()
        self.denoiser = _prepared_denoiser(backend, bundle, dims, request)
        spec = self.denoiser.specs["step"]
        tensors = (*spec.inputs, *spec.outputs)
        self.buffers = {tensor.name: backend.empty(tensor.sized(dims), tensor.dtype) for tensor in tensors}
        self.buffers["velocity"] = self.denoiser.velocity
        self.buffers["next_model_input"] = self.denoiser.model_input
        self.model = self.denoiser.calls(dims["model_batch"])
        self.step = self.denoiser.bind("step", **self.buffers)
        self._write(
            clean=request.inputs.clean,
            noise=request.inputs.noise,
            frame_mask=request.inputs.frame_mask,
            **request.guidance_inputs(),
            previous_velocity=torch.zeros(self.buffers["latents"].shape),
            solver_weights=torch.tensor([[1.0, 0.0]]),
            dt=torch.zeros(1),
            hold=torch.tensor([False]),
        )

    def _write(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.backend.write(self.buffers[name], tensor.contiguous().numpy())

    def velocity(self, latents: Tensor, step: int) -> Tensor:
        """Guided velocity [1, T, C, h, w] at ``latents`` and time ``step`` of the schedule."""
        time = torch.tensor([self.times[step]], dtype=torch.float32)
        zeros = torch.zeros(self.buffers["velocity"].shape)
        weights = self.request.weight_inputs(self.times[step])
        self._write(latents=latents, next_timestep=time, velocity=zeros, **weights)
        self.step()  # dt = 0: makes the model input
        for name, value in self.request.timed(self.times[step], self.times[step + 1]).items():
            self.backend.write(self.denoiser.timed[name], value.float().numpy())
        for call in (*self.model.values(), self.step):
            call()
        return torch.from_numpy(self.backend.read(self.buffers["guided_velocity"]))


def _prepared_denoiser(backend: Backend, bundle: Bundle, dims: dict[str, int], request: Request) -> Denoiser:
    """A denoiser whose rows hold the text and micro-conditions of ``request``."""
    denoiser, text = Denoiser(backend, bundle.manifest, dims), TextStage(backend, bundle.manifest)
    for row, tokens in enumerate(zip(request.token_ids.numpy(), request.token_mask.numpy(), strict=True)):
        denoiser.set_row(row, text(Tokens(*tokens)), request.inputs.micro[0].numpy())
    return denoiser
