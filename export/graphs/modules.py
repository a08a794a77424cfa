"""The graphs of the contract as modules: reference code between the contract's inputs and outputs.

Each module's ``forward`` takes exactly the inputs of its graph in
:func:`~stiv_deploy.runtime.bundle.contract.graph_specs`, in order, and returns its outputs. The reference module sits
in the one child ``source``, whose prefix the ONNX names drop. A module may be in half precision (``.to(dtype)``):
whatever the contract keeps in float32 is cast at the boundary, inside.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from stiv_deploy.runtime.bundle.contract import FRAMES, ModelFacts, block_names, half_names
from stiv_deploy.stiv_ref.block import RopeTables, StivBlock
from stiv_deploy.stiv_ref.checkpoint import AnyTextEncoder, AnyVae, Checkpoint, CheckpointConfig
from stiv_deploy.stiv_ref.guidance import NORM_FLOOR
from stiv_deploy.stiv_ref.model import Stiv

Module = TypeVar("Module", bound=nn.Module)
FLOAT32_GRAPHS = frozenset({"image_encoder", "step", "decoder", FRAMES})
"""Graphs that are float32 throughout in a bundle of any precision. Activations of large VAEs overflow float16."""


def model_facts(config: CheckpointConfig) -> ModelFacts:
    """The architecture facts of a checkpoint that the contract and the runtime need."""
    shared = {name: value for name, value in config.model.model_dump().items() if name in ModelFacts.model_fields}
    return ModelFacts(
        **shared,
        max_text_tokens=config.text.max_tokens,
        spatial_factor=config.vae.spatial_factor,
        temporal_factor=config.vae.temporal_factor,
        causal_vae=config.vae.causal,
    )


def part(module: Module, *children: str) -> Module:
    """A view of ``module`` with only these children and no parameters of its own: its methods, sharing its weights."""
    view = copy.copy(module)
    view._modules = {name: module._modules[name] for name in children}
    view._parameters = {}
    return view


def _key_value_part(block: StivBlock) -> StivBlock:
    """A view of ``block`` with only the projection of text to keys and values."""
    view = part(block)
    view.cross = part(block.cross, "kv", "k_norm")
    return view


def _blocks(model: Stiv) -> list[StivBlock]:
    return [cast(StivBlock, block) for block in model.blocks]


class TextEncoderGraph(nn.Module):
    """``text_encoder``: token ids and mask -> states, pooled, in the type of the weights.

    Where the bundle's type is another one (see ``text_dtype``), the exported graph ends with a cast to it.
    """

    def __init__(self, source: AnyTextEncoder) -> None:
        super().__init__()
        self.source = source

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, L] twice -> [B, L, Dt], [B, Dt]."""
        encoded = self.source(token_ids, token_mask)
        return encoded.states, encoded.pooled


class TextKVGraph(nn.Module):
    """``text_kv``: text states -> cross-attention keys and values of all blocks."""

    def __init__(self, model: Stiv) -> None:
        super().__init__()
        self.source = part(model, "text_in", "text_out")
        self.source.blocks = nn.ModuleList(_key_value_part(block) for block in _blocks(model))

    def forward(self, text_states: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, Dt] -> twice [N, B, H, L, Dh]."""
        pair = self.source.text_kv(text_states)
        return pair.k, pair.v


class ImageEncoderGraph(nn.Module):
    """``image_encoder``: video -> standardized latents."""

    def __init__(self, source: AnyVae) -> None:
        super().__init__()
        self.source = source

    def forward(self, video: Tensor) -> Tensor:
        """[B, F, 3, H, W] in [-1, 1] -> [B, T, C, h, w]."""
        return self.source.encode(video)


class DecoderGraph(nn.Module):
    """``decoder``: latents -> video."""

    def __init__(self, source: AnyVae) -> None:
        super().__init__()
        self.source = source

    def forward(self, latents: Tensor) -> Tensor:
        """[B, T, C, h, w] -> [B, F, 3, H, W] in [-1, 1]."""
        return self.source.decode(latents)


class FramesGraph(nn.Module):
    """``frames``: video -> pictures of 8 bits, channels last, so that a quarter of the bytes leaves the device.

    NaN becomes 0, as where the runtime does the same in numpy: by what a clamp or the cast makes of it.
    """

    def forward(self, video: Tensor) -> Tensor:
        """[B, F, 3, H, W] in [-1, 1] -> uint8 [B, F, H, W, 3]; what lies beyond is clamped, halves go to even.

        The cast comes last: TensorRT takes no uint8 but as an output.
        """
        levels = (video * 127.5 + 127.5).round().clamp(0, 255)
        return levels.permute(0, 1, 3, 4, 2).to(torch.uint8)


def rope_of(
    dtype: torch.dtype,
    spatial_cos: Tensor,
    spatial_sin: Tensor,
    temporal_cos: Tensor | None,
    temporal_sin: Tensor | None,
) -> RopeTables:
    """The tables in ``dtype``; the spatial ones stand in for the temporal ones of image models, which never look."""
    if temporal_cos is None or temporal_sin is None:
        temporal_cos, temporal_sin = spatial_cos, spatial_sin
    return RopeTables(*(table.to(dtype) for table in (spatial_cos, spatial_sin, temporal_cos, temporal_sin)))


class EmbedGraph(nn.Module):
    """``embed``: model input, timestep, micro-conditions, pooled text -> tokens, modulation, condition."""

    def __init__(self, model: Stiv) -> None:
        super().__init__()
        positions = ["token_position", *["frame_position"] * model.config.temporal]
        self.source = part(model, "patch", *positions, "singleton", "modulation")

    def forward(
        self,
        model_input: Tensor,
        timestep: Tensor,
        micro: Tensor,
        pooled: Tensor,
        spatial_cos: Tensor,
        spatial_sin: Tensor,
        temporal_cos: Tensor | None = None,
        temporal_sin: Tensor | None = None,
        guidance: Tensor | None = None,
        target_time: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, C, h, w], [B], [B, 6], [B, Dt], 2 x [S, Dh/2], 2 x [T', Dh/2] -> [B, T', S, D], [B, 6, D], [B, D].

        Image models have no temporal tables; students take ``guidance`` [B] too, and flow maps ``target_time`` [B].
        """
        rope = rope_of(pooled.dtype, spatial_cos, spatial_sin, temporal_cos, temporal_sin)
        embedded = self.source.embed(model_input, timestep, micro, pooled, rope, guidance, target_time)
        return embedded.x, embedded.modulation, embedded.condition


class BlockGraph(nn.Module):
    """``block_00``, ...: one block. Tables and mask come in float32 and are cast to the tokens' type."""

    def __init__(self, source: StivBlock) -> None:
        super().__init__()
        self.source = source

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        text_mask: Tensor,
        spatial_cos: Tensor,
        spatial_sin: Tensor,
        temporal_cos: Tensor | None = None,
        temporal_sin: Tensor | None = None,
    ) -> Tensor:
        """[B, T', S, D] -> [B, T', S, D]; see the contract for the rest. Image models have no temporal tables."""
        tables = rope_of(x.dtype, spatial_cos, spatial_sin, temporal_cos, temporal_sin)
        return self.source(x, modulation, text_k, text_v, text_mask.to(x.dtype), tables)


class SpatialGraph(nn.Module):
    """``spatial_00``, ...: the first half of a block. What the other half alone needs is not in its graph."""

    def __init__(self, source: StivBlock) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor, modulation: Tensor, spatial_cos: Tensor, spatial_sin: Tensor) -> Tensor:
        """[B, T', S, D] of some of the frames -> [B, T', S, D]."""
        return self.source.spatial_half(x, modulation, rope_of(x.dtype, spatial_cos, spatial_sin, None, None))


class MixedGraph(nn.Module):
    """``mixed_00``, ...: the second half of a block."""

    def __init__(self, source: StivBlock) -> None:
        super().__init__()
        self.source = source

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        text_mask: Tensor,
        temporal_cos: Tensor,
        temporal_sin: Tensor,
    ) -> Tensor:
        """[B, T', S, D] of some of the positions -> [B, T', S, D]."""
        tables = rope_of(x.dtype, temporal_cos, temporal_sin, temporal_cos, temporal_sin)
        return self.source.mixed_half(x, modulation, text_k, text_v, text_mask.to(x.dtype), tables)


class ResidualGraph(nn.Module):
    """``residual``: what all blocks added to the tokens, for steps to come that skip them."""

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        """[B, T', S, D] in front of the blocks and behind them -> their difference, taken in at least float32."""
        return (_at_least_float32(last) - _at_least_float32(x)).to(x.dtype)


class ExtrapolateGraph(nn.Module):
    """``extrapolate``: tokens behind the blocks where these were skipped, by the last two residuals."""

    def forward(
        self,
        x: Tensor,
        last: Tensor,
        residual_0: Tensor,
        residual_1: Tensor,
        residual_weights: Tensor,
        skipped: Tensor,
    ) -> Tensor:
        """[B, T', S, D] four times, [B, 2], bool [B] -> [B, T', S, D]: where not ``skipped``, ``last`` as it is."""
        known = [_at_least_float32(each) for each in (residual_0, residual_1)]
        weights = [column[:, None, None, None] for column in residual_weights.unbind(1)]
        guessed = sum(_terms(known, weights), start=_at_least_float32(x)).to(x.dtype)
        return torch.where(skipped[:, None, None, None], guessed, last)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class HeadGraph(nn.Module):
    """``head``: tokens and condition -> velocity. ``model_input`` gives its shape only."""

    def __init__(self, model: Stiv) -> None:
        super().__init__()
        self.source = part(model, "head")

    def forward(self, x: Tensor, condition: Tensor, model_input: Tensor) -> Tensor:
        """[B, T', S, D], [B, D], [B, T, C, h, w] -> float32 [B, T, C, h, w]."""
        return self.source.unpatchify(self.source.head(x, condition), model_input.shape).float()


class StepGraph(nn.Module):
    """``step``: guidance, renormalization, solver update, frame replacement and the next model input.

    The shipped form of ``stiv_ref.guidance``, ``sampler`` and ``conditioning`` (arXiv 2412.07730, section 2): every
    guidance rule is a weighted sum over a sample's rows of the model, every solver a weighted sum of two velocities,
    and all weights are the sample's own, so that samples of all modes, scales, masks and solvers share one call.
    A weight of 0 takes nothing (it is no product, which NaN would survive). All float32.
    """

    def forward(
        self,
        velocity: Tensor,
        latents: Tensor,
        clean: Tensor,
        noise: Tensor,
        frame_mask: Tensor,
        sample_rows: Tensor,
        row_weights: Tensor,
        row_sample: Tensor,
        row_mask: Tensor,
        previous_velocity: Tensor,
        solver_weights: Tensor,
        dt: Tensor,
        next_timestep: Tensor,
        renorm: Tensor,
        hold: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``velocity`` [M, T, C, h, w], the others as in the contract -> next latents, guided velocity, next input.

        ``sample_rows`` [B, 3] are a sample's rows, the conditional one first; entries of weight 0 may be any row.
        ``previous_velocity`` is not looked at where its weight is 0, so that it may be uninitialized. Where ``hold``,
        the latents stay as they were and only the next input moves on: the predictor of a solver of two evaluations.
        """
        given = _wide(frame_mask)  # (B, T, 1, 1, 1)
        rows = [velocity.index_select(0, index) for index in sample_rows.unbind(1)]  # each (B, T, C, h, w)
        guided = _weighted(rows, row_weights)
        ratio = _norm(rows[0], given) / _norm(guided, given).clamp_min(NORM_FLOOR)
        guided = guided * torch.where(_wide(renorm) > 0, ratio, 1.0)

        step = _wide(dt) * _weighted([guided, previous_velocity], solver_weights)
        updated = torch.where(given, clean, latents + step)
        following = _wide(next_timestep)
        hidden = torch.where(given, following * clean + (1 - following) * noise, updated)
        seen, unseen = (each.index_select(0, row_sample) for each in (clean, hidden))  # (M, T, C, h, w)
        return torch.where(_wide(hold), latents, updated), guided, torch.where(_wide(row_mask), seen, unseen)


def _wide(values: Tensor) -> Tensor:
    """``values`` [B] or [B, T] with trailing axes up to [B, T, C, h, w]."""
    return values[(...,) + (None,) * (5 - values.dim())]


def _weighted(terms: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of ``terms`` [B, T, C, h, w] by the weights [B, len(terms)] of each sample, nothing from those of 0."""
    first, *rest = _terms(terms, [_wide(column) for column in weights.unbind(1)])
    return sum(rest, start=first)


def _terms(values: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Each of ``values`` times its own of ``weights``, which broadcast; nothing of one whose weight is 0."""
    return [torch.where(weight != 0, weight * value, 0.0) for value, weight in zip(values, weights, strict=True)]


def _norm(velocity: Tensor, given: Tensor) -> Tensor:
    """Norm [B, 1, 1, 1, 1] of ``velocity`` [B, T, C, h, w] per sample over the frames that are not given.

    In two sums: ONNX Runtime adds up the terms of one a vector at a time, which over a clip of 512 pixels loses 1e-5.
    """
    squares = torch.where(given, 0.0, velocity).square()
    return squares.sum(dim=(3, 4), keepdim=True).sum(dim=(1, 2), keepdim=True).sqrt()


def _block_modules(model: Stiv, *, halves: bool) -> Iterator[tuple[str, nn.Module]]:
    """Blocks by name, with ``halves`` each followed by its own."""
    count = len(model.blocks)
    for block, name, (spatial, mixed) in zip(_blocks(model), block_names(count), half_names(count), strict=True):
        yield name, BlockGraph(block)
        if halves:
            yield from ((spatial, SpatialGraph(block)), (mixed, MixedGraph(block)))


def graph_modules(checkpoint: Checkpoint, *, halves: bool = False, skips: bool = False) -> Mapping[str, nn.Module]:
    """All graphs of a checkpoint by the contract's names, in running order, sharing the checkpoint's parameters."""
    model = checkpoint.model
    return {
        "text_encoder": TextEncoderGraph(checkpoint.text_encoder),
        "text_kv": TextKVGraph(model),
        "image_encoder": ImageEncoderGraph(checkpoint.vae),
        "embed": EmbedGraph(model),
        **dict(_block_modules(model, halves=halves)),
        **({"residual": ResidualGraph(), "extrapolate": ExtrapolateGraph()} if skips else {}),
        "head": HeadGraph(model),
        "step": StepGraph(),
        "decoder": DecoderGraph(checkpoint.vae),
        FRAMES: FramesGraph(),
    }
