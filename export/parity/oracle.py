"""The oracle behind the graph contract: every graph computed by the reference, in any floating type.

The parity ladder runs it in fp64 as the truth and in the bundle's own precision as the yardstick. It calls the
reference's own functions, not the modules that export traces, so that a mistake in those shows.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from stiv_deploy.export.graphs.reference import Boundary
from stiv_deploy.runtime.bundle.contract import LATE, block_names, half_names
from stiv_deploy.stiv_ref.block import RopeTables, StivBlock
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.conditioning import noise_frames, replace_frames
from stiv_deploy.stiv_ref.guidance import cfg_renorm
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.pretrained.text import text_dtype
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, guided_velocity
from stiv_deploy.stiv_ref.text import TextStates

if TYPE_CHECKING:
    from stiv_deploy.export.parity.requests import Request

Tensors = dict[str, Tensor]
HOST_GRAPHS = ("embed", "step")
"""Graphs whose host inputs (times, micro-conditions, latents) do not bear half precision."""
GraphFunction = Callable[[Mapping[str, Tensor]], Tensors]


class Oracle:
    """The graphs and the sampling loop of one checkpoint in one dtype.

    Call :meth:`run` with the contract's input names. ``boundary`` is the model for
    :func:`~stiv_deploy.stiv_ref.sampler.sample`.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.model: Stiv = copy.deepcopy(checkpoint.model).to(dtype)
        self.boundary: Any = Boundary(self.model)
        self.text_encoder = copy.deepcopy(checkpoint.text_encoder).to(text_dtype(checkpoint.config.text, dtype))
        self.vae = copy.deepcopy(checkpoint.vae).to(dtype if dtype is torch.float64 else torch.float32)
        self.graphs: dict[str, GraphFunction] = {
            "text_encoder": self._text_encoder,
            "text_kv": self._text_kv,
            "image_encoder": lambda i: {"latents": self.vae.encode(i["video"].to(self._vae_dtype))},
            "embed": self._embed,
            **{name: self._block(index) for index, name in enumerate(block_names(len(self.model.blocks)))},
            **dict(self._halves()),
            "residual": lambda i: {"residual": i["last"] - i["x"]},
            "extrapolate": extrapolated,
            "head": self._head,
            "step": guided_step,
            "decoder": lambda i: {"video": self.vae.decode(i["latents"].to(self._vae_dtype))},
        }

    @property
    def _vae_dtype(self) -> torch.dtype:
        return self.vae.shift.dtype

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> Tensors:
        """Outputs of ``graph``; floating inputs are cast to this oracle's dtype (``HOST_GRAPHS``: at least fp32)."""
        dtype = torch.promote_types(self.dtype, torch.float32) if graph in HOST_GRAPHS else self.dtype
        return self.graphs[graph](
            {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        )

    @torch.no_grad()
    def sampling_inputs(self, request: "Request") -> SamplingInputs:
        """Inputs of :func:`~stiv_deploy.stiv_ref.sampler.sample` for ``request``, its text encoded by this oracle."""
        batch = len(request.inputs.noise)
        encoded = self._encoded(request.token_ids, request.token_mask)
        text = TextStates(*(part[:batch] for part in encoded))
        null = TextStates(*(part[-batch:] for part in encoded))
        latent_type = torch.promote_types(self.dtype, torch.float32)
        given = request.inputs
        noise, clean, micro = (value.to(latent_type) for value in (given.noise, given.clean, given.micro))
        return SamplingInputs(noise, clean, given.frame_mask, text, null, micro)

    def guided_velocity(
        self, latents: Tensor, inputs: SamplingInputs, settings: SamplingSettings, times: tuple[float, float]
    ) -> Tensor:
        """Guided velocity at ``latents`` [B, T, C, h, w] for a step from the first of ``times`` to the second."""
        return guided_velocity(self.boundary, inputs, settings)(latents, *times)

    def rope(self, latents: Tensor) -> Tensors:
        """The RoPE tables for ``latents``, by contract name."""
        return self.model.rope_tables(latents.shape)._asdict()

    def _text_encoder(self, inputs: Mapping[str, Tensor]) -> Tensors:
        states, _, pooled = self._encoded(inputs["token_ids"], inputs["token_mask"])
        return {"text_states": states, "pooled": pooled}

    def _encoded(self, token_ids: Tensor, token_mask: Tensor) -> TextStates:
        """Text in this oracle's dtype; the encoder may compute in a wider one."""
        states, mask, pooled = self.text_encoder(token_ids, token_mask)
        return TextStates(states.to(self.dtype), mask, pooled.to(self.dtype))

    def _text_kv(self, inputs: Mapping[str, Tensor]) -> Tensors:
        k, v = self.model.text_kv(inputs["text_states"])
        return {"text_k": k, "text_v": v}

    def _embed(self, inputs: Mapping[str, Tensor]) -> Tensors:
        wide = torch.promote_types(self.dtype, torch.float32)
        timestep, micro = (inputs[name].to(wide) for name in ("timestep", "micro"))
        pooled = inputs["pooled"].to(self.dtype)
        more = {name: inputs[name].to(wide) for name in LATE if name in inputs}
        return self.model.embed(inputs["model_input"], timestep, micro, pooled, self._rope(inputs), **more)._asdict()

    def _rope(self, inputs: Mapping[str, Tensor]) -> RopeTables:
        """The tables that a graph got, in this dtype; those it has no use for are empty."""
        return RopeTables(*(inputs.get(name, torch.empty(0)).to(self.dtype) for name in RopeTables._fields))

    def _block(self, index: int) -> GraphFunction:
        def run(inputs: Mapping[str, Tensor]) -> Tensors:
            given = (inputs[name] for name in ("x", "modulation", "text_k", "text_v", "text_mask"))
            return {"x_out": self.model.blocks[index](*given, self._rope(inputs))}

        return run

    def _halves(self) -> Iterator[tuple[str, GraphFunction]]:
        for index, (spatial, mixed) in enumerate(half_names(len(self.model.blocks))):
            yield spatial, partial(self._spatial_half, index)
            yield mixed, partial(self._mixed_half, index)

    def _spatial_half(self, index: int, inputs: Mapping[str, Tensor]) -> Tensors:
        block = cast(StivBlock, self.model.blocks[index])
        return {"x_out": block.spatial_half(inputs["x"], inputs["modulation"], self._rope(inputs))}

    def _mixed_half(self, index: int, inputs: Mapping[str, Tensor]) -> Tensors:
        names = ("x", "modulation", "text_k", "text_v", "text_mask")
        x, modulation, k, v, mask = (inputs[name] for name in names)
        block = cast(StivBlock, self.model.blocks[index])
        return {"x_out": block.mixed_half(x, modulation, k, v, mask, self._rope(inputs))}

    def _head(self, inputs: Mapping[str, Tensor]) -> Tensors:
        patches = self.model.head(inputs["x"], inputs["condition"])
        return {"velocity": self.model.unpatchify(patches, inputs["model_input"].shape)}


def extrapolated(inputs: Mapping[str, Tensor]) -> Tensors:
    """The ``extrapolate`` graph, in the dtype of its inputs."""
    known = torch.stack([inputs["residual_0"], inputs["residual_1"]], dim=1)
    guessed = inputs["x"] + torch.einsum("rk,rk...->r...", inputs["residual_weights"], known)
    skipped = inputs["skipped"].reshape(-1, 1, 1, 1)
    return {"x_out": torch.where(skipped, guessed, inputs["last"])}


def guided_step(inputs: Mapping[str, Tensor]) -> Tensors:
    """The ``step`` graph from the reference's guidance and conditioning functions, in the dtype of its inputs."""
    samples = [_sample_step(inputs, index) for index in range(len(inputs["latents"]))]
    latents, velocities, hidden = (torch.stack(part) for part in zip(*samples, strict=True))
    rows = inputs["row_sample"]
    model_input = replace_frames(hidden[rows], inputs["clean"][rows], inputs["row_mask"])
    return {"next_latents": latents, "guided_velocity": velocities, "next_model_input": model_input}


def _sample_step(inputs: Mapping[str, Tensor], index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Next latents, guided velocity and the input of a row that sees no given frame, each [T, C, h, w]."""
    own = {name: inputs[name][index : index + 1] for name in _OF_SAMPLES}
    rows = inputs["velocity"][inputs["sample_rows"][index]]
    guided = torch.einsum("r,r...->...", own["row_weights"][0], rows)[None]
    if own["renorm"].item():
        guided = cfg_renorm(guided, rows[:1], own["frame_mask"])
    current, previous = own["solver_weights"][0]
    moved = own["latents"] + own["dt"] * (current * guided + previous * own["previous_velocity"])
    updated = replace_frames(moved, own["clean"], own["frame_mask"])
    hidden = noise_frames(updated, own["clean"], own["noise"], own["next_timestep"], own["frame_mask"])
    latents = own["latents"] if own["hold"] else updated
    return latents[0], guided[0], hidden[0]


_OF_SAMPLES = (
    "latents",
    "clean",
    "noise",
    "frame_mask",
    "row_weights",
    "previous_velocity",
    "solver_weights",
    "dt",
    "next_timestep",
    "renorm",
    "hold",
)
"""Inputs of the ``step`` graph whose first axis is the samples."""
