"""The STIV transformer: latents, timestep and text in, velocity out.

Shapes: B batch, T latent frames, C channels, h, w latent size; T', S, D token frames, tokens of a frame, width;
L text tokens, Dt text width. Source: arXiv 2412.07730, section 2 (PixArt-alpha base, arXiv 2310.00426).

The forward pass is split where the deployment splits it: :meth:`Stiv.text_kv` once a request, then
:meth:`Stiv.embed`, the blocks and :meth:`Stiv.head` at every step.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stiv_deploy.stiv_ref.block import MODULATIONS, RopeTables, StivBlock, additive_mask, stateless_norm
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.rope import spatial_table, temporal_table
from stiv_deploy.stiv_ref.skipping import Skipping

MICRO_GROUPS = {"resolution": 2, "crop": 2, "stride": 1, "frames": 1}
"""Micro-conditions and how many numbers each has: original (height, width), crop (top, left), frame stride, frames."""
MICRO_VALUES = sum(MICRO_GROUPS.values())
GUIDANCE_UNIT = 10.0
"""Angle of the fastest sinusoid that a guidance scale of 1 is embedded by: scales a tenth apart differ, and are near.
"""


class Embedded(NamedTuple):
    """What :meth:`Stiv.embed` returns: tokens [B, T', S, D], modulation [B, 6, D], singleton condition [B, D]."""

    x: Tensor
    modulation: Tensor
    condition: Tensor


class TextKV(NamedTuple):
    """Cross-attention keys and values of all blocks, each [N, B, H, L, Dh]."""

    k: Tensor
    v: Tensor


def sinusoidal(values: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding [..., width] of ``values`` [...], cosines first, periods up to 10000 (DiT).

    Angles reach 1000, so they are computed in at least fp32, from frequencies that are rounded once.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float64, device=values.device) * (-math.log(10_000.0) / half)
    dtype = torch.promote_types(values.dtype, torch.float32)
    angle = values.to(dtype).unsqueeze(-1) * exponent.exp().to(dtype)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class ScalarEmbedder(nn.Module):
    """``count`` scalars -> sinusoidal features, concatenated -> two-layer MLP -> stateless norm: one summand [B, D]."""

    def __init__(self, count: int, frequency_width: int, width: int) -> None:
        super().__init__()
        self.frequency_width = frequency_width
        self.inner = nn.Linear(count * frequency_width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        """Embed ``values`` fp32 [B, count]."""
        features = sinusoidal(values, self.frequency_width).flatten(1).to(self.inner.weight.dtype)
        return stateless_norm(self.outer(F.silu(self.inner(features))))


class LateEmbedder(nn.Module):
    """A scalar that a trained model gets as a further condition: sinusoidal features -> two-layer MLP, [B, D].

    Its outer layer starts at zero, so that the model begins as it was. It lacks the norm of :class:`ScalarEmbedder`,
    which would make the first step away from zero a whole one.
    """

    def __init__(self, frequency_width: int, width: int) -> None:
        super().__init__()
        self.frequency_width = frequency_width
        self.inner = nn.Linear(frequency_width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        """Embed ``values`` fp32 [B]."""
        features = sinusoidal(values, self.frequency_width).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(features)))


class SingletonCondition(nn.Module):
    """Timestep, micro-conditions and pooled text, each normed, then summed to one vector [B, D]; a student's, too."""

    def __init__(self, config: StivConfig) -> None:
        super().__init__()
        self.timestep = ScalarEmbedder(1, config.frequency_width, config.width)
        self.micro = nn.ModuleDict(
            {name: ScalarEmbedder(count, config.frequency_width, config.width) for name, count in MICRO_GROUPS.items()}
        )
        self.pooled = nn.Linear(config.text_width, config.width)
        self.student = config.student
        if config.student is not None:
            self.guidance = LateEmbedder(config.frequency_width, config.width)
            if config.student.flow_map:
                self.target_time = LateEmbedder(config.frequency_width, config.width)

    def forward(
        self,
        timestep: Tensor,
        micro: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
        target_time: Tensor | None = None,
    ) -> Tensor:
        """Combine ``timestep`` [B] in [0, 1], ``micro`` [B, 6], pooled text [B, Dt] and what a student takes, [B] each.

        A flow map is told how far ``target_time`` is away.
        """
        condition = self.timestep(1000 * timestep.unsqueeze(1)) + stateless_norm(self.pooled(pooled))
        groups = micro.split(list(MICRO_GROUPS.values()), dim=1)
        for name, values in zip(MICRO_GROUPS, groups, strict=True):
            condition = condition + self.micro[name](values)
        if self.student is not None:
            assert guidance is not None
            condition = condition + self.guidance(GUIDANCE_UNIT * guidance)
            if self.student.flow_map:
                assert target_time is not None
                condition = condition + self.target_time(1000 * (target_time - timestep))
        return condition


class Head(nn.Module):
    """Final stateless norm with its own shift and scale, then a linear to the values of a patch."""

    def __init__(self, config: StivConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(2, config.width))
        self.out = nn.Linear(config.width, config.patch_values)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens [B, T', S, D] and the singleton condition [B, D] to patches [B, T', S, pt*ps*ps*C]."""
        shift, scale = (condition.unsqueeze(1) + self.table)[:, None].chunk(2, dim=2)  # 2 x (B, 1, 1, D)
        return self.out(stateless_norm(x) * (1 + scale) + shift)


class Stiv(nn.Module):
    """STIV as text-to-video, or as text-to-image when ``config.temporal`` is false (T = 1).

    Tokens get their absolute place, as in PixArt-alpha, here by projections of the two RoPE tables that start as random
    features of unit variance. RoPE alone tells tokens apart by distance only: in pure noise all frames look alike and
    so do left and right, so that a caption's direction of motion cannot be used at the times when it decides.
    """

    def __init__(self, config: StivConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = nn.Linear(config.patch_values, config.width)
        self.token_position = nn.Linear(config.head_dim, config.width, bias=False)
        if config.temporal:
            self.frame_position = nn.Linear(config.head_dim, config.width, bias=False)
        self.singleton = SingletonCondition(config)
        self.modulation = nn.Linear(config.width, MODULATIONS * config.width)
        self.text_in = nn.Linear(config.text_width, config.width)
        self.text_out = nn.Linear(config.width, config.width)
        self.blocks = nn.ModuleList(StivBlock(config) for _ in range(config.blocks))
        self.head = Head(config)
        if config.full_blocks:
            self.mask_token = nn.Parameter(torch.empty(config.width))

    def initialize(self, generator: torch.Generator | None = None) -> "Stiv":
        """Initialize for training: Xavier linears, PixArt's modulation tables, zero output (so a zero velocity)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, LateEmbedder):
                nn.init.zeros_(module.outer.weight)
        nn.init.normal_(self.modulation.weight, std=0.02, generator=generator)
        for table in [*(block.table for block in cast("Iterable[StivBlock]", self.blocks)), self.head.table]:
            nn.init.normal_(table, std=self.config.width**-0.5, generator=generator)
        nn.init.zeros_(self.head.out.weight)
        unit = (self.config.head_dim / 2) ** -0.5  # cosines and sines of head_dim / 2 angles: their squares sum to that
        nn.init.normal_(self.token_position.weight, std=unit, generator=generator)
        if self.config.temporal:
            nn.init.normal_(self.frame_position.weight, std=unit, generator=generator)
        if self.config.full_blocks:
            nn.init.normal_(self.mask_token, std=0.02, generator=generator)
        return self

    def token_grid(self, latents_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Token frames, rows and columns of latents [B, T, C, h, w]; ``ValueError`` if the patch does not fit."""
        _, frames, channels, height, width = latents_shape
        pt, ps = self.config.patch
        if channels != self.config.latent_channels:
            raise ValueError(f"latents have {channels} channels, the model wants {self.config.latent_channels}")
        if frames % pt or height % ps or width % ps:
            raise ValueError(
                f"latents of {frames} frames, {height}x{width} are not divisible by the patch ({pt}, {ps}, {ps})"
            )
        return frames // pt, height // ps, width // ps

    def patchify(self, latents: Tensor) -> Tensor:
        """Cut latents [B, T, C, h, w] into tokens [B, T/pt, S, pt*ps*ps*C]."""
        batch, _, channels, _, _ = latents.shape
        frames, rows, columns = self.token_grid(latents.shape)
        pt, ps = self.config.patch
        x = latents.reshape(batch, frames, pt, channels, rows, ps, columns, ps)
        return x.permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(batch, frames, rows * columns, self.config.patch_values)

    def unpatchify(self, patches: Tensor, latents_shape: tuple[int, ...]) -> Tensor:
        """Inverse of :meth:`patchify`, to latents of ``latents_shape``."""
        frames, rows, columns = self.token_grid(latents_shape)
        pt, ps = self.config.patch
        x = patches.reshape(patches.shape[0], frames, rows, columns, pt, ps, ps, self.config.latent_channels)
        return x.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(latents_shape)

    def rope_tables(self, latents_shape: tuple[int, ...]) -> RopeTables:
        """RoPE tables for latents of this shape, on the model's device and in its dtype."""
        frames, rows, columns = self.token_grid(latents_shape)
        config = self.config
        tables = (
            *spatial_table((rows, columns), config.head_dim, config.base_grid, config.rope_theta),
            *temporal_table(frames, config.head_dim, config.base_frames, config.rope_theta),
        )
        return RopeTables(*(table.to(self.patch.weight) for table in tables))

    def text_kv(self, text_states: Tensor) -> TextKV:
        """Cross-attention K and V of every block from text states [B, L, Dt]."""
        text = self.text_out(F.gelu(self.text_in(text_states), approximate="tanh"))
        pairs = [block.cross.text_kv(text) for block in cast("Iterable[StivBlock]", self.blocks)]
        return TextKV(torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs]))

    def places(self, rope: RopeTables) -> Tensor:
        """What tells tokens where they are: [S, D] for an image model, [T', S, D] for a video model."""
        place = self.token_position(torch.cat((rope.spatial_cos, rope.spatial_sin), dim=-1))  # (S, D)
        if self.config.temporal:
            position = torch.cat((rope.temporal_cos, rope.temporal_sin), dim=-1)  # (T', Dh)
            place = place + self.frame_position(position).unsqueeze(1)
        return place

    def embed(
        self,
        latents: Tensor,
        timestep: Tensor,
        micro: Tensor,
        pooled: Tensor,
        rope: RopeTables,
        guidance: Tensor | None = None,
        target_time: Tensor | None = None,
    ) -> Embedded:
        """Tokens and conditions of one step: latents [B, T, C, h, w], timestep [B], micro [B, 6], pooled [B, Dt].

        Students take their ``guidance`` scales fp32 [B], flow maps the ``target_time`` fp32 [B] of the step.
        """
        x = self.patch(self.patchify(latents).to(self.patch.weight.dtype)) + self.places(rope)
        condition = self.singleton(timestep, micro, pooled, guidance, target_time)
        modulation = self.modulation(F.silu(condition)).unflatten(1, (MODULATIONS, self.config.width))
        return Embedded(x, modulation, condition)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        micro: Tensor,
        text_states: Tensor,
        token_mask: Tensor,
        pooled: Tensor,
        text_kv: TextKV | None = None,
        keep: Tensor | None = None,
        guidance: Tensor | None = None,
        target_time: Tensor | None = None,
        skipping: Skipping | None = None,
    ) -> Tensor:
        """Predict the velocity, same shape as ``latents`` [B, T, C, h, w].

        ``timestep`` [B] in [0, 1] (0 noise, 1 data); ``micro`` [B, 6]; ``text_states`` [B, L, Dt] with 0/1
        ``token_mask`` [B, L]; ``pooled`` [B, Dt]. ``text_kv`` may be given to reuse it over the steps of a request.
        In masked training only the tokens ``keep`` int64 [B, S'] of each frame pass the main blocks. Students take
        their ``guidance`` scales fp32 [B], and predict the guided velocity; flow maps its mean up to ``target_time``
        fp32 [B], which is not before ``timestep``. ``skipping`` says whether the blocks run, and keeps their residuals.
        """
        if not self.config.temporal and latents.shape[1] != 1:
            raise ValueError(f"an image model takes one frame, got {latents.shape[1]}")
        if keep is not None and not self.config.full_blocks:
            raise ValueError("masked training needs a model with full_blocks, this one has none")
        text_k, text_v = self.text_kv(text_states) if text_kv is None else text_kv
        mask = additive_mask(token_mask).to(text_k.dtype)
        rope = self.rope_tables(latents.shape)
        x, modulation, condition = self.embed(latents, timestep, micro, pooled, rope, guidance, target_time)
        if skipping is not None and (guessed := skipping.guess()) is not None:
            return self.unpatchify(self.head((x + guessed).to(x.dtype), condition), latents.shape)
        first, main = x, len(self.blocks) - self.config.full_blocks
        x, own_rope = (x, rope) if keep is None else (kept(x, keep), kept_rope(rope, keep, x.shape[1]))
        for index, (block, k, v) in enumerate(zip(self.blocks, text_k, text_v, strict=True)):
            if keep is not None and index == main:
                x, own_rope = self.put_back(x, keep, rope), rope
            x = block(x, modulation, k, v, mask, own_rope)
        if skipping is not None:
            skipping.remember(first, x)
        return self.unpatchify(self.head(x, condition), latents.shape)

    def put_back(self, x: Tensor, keep: Tensor, rope: RopeTables) -> Tensor:
        """All tokens [B, T', S, D]: mask tokens at their places, ``x`` [B, T', S', D] where ``keep`` [B, S'] says."""
        batch, frames, _, width = x.shape
        tokens = rope.spatial_cos.shape[0]
        masked = (self.mask_token + self.places(rope)).to(x.dtype).expand(batch, frames, tokens, width)
        return masked.scatter(2, _over_frames(keep, x), x)


def _over_frames(keep: Tensor, x: Tensor) -> Tensor:
    """``keep`` [B, S'] as an index [B, T', S', D] into the tokens of every frame of ``x`` [B, T', ., D]."""
    return keep[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


def kept(x: Tensor, keep: Tensor) -> Tensor:
    """Tokens ``keep`` [B, S'] of every frame of ``x`` [B, T', S, D]: [B, T', S', D]."""
    return x.gather(2, _over_frames(keep, x))


def kept_rope(rope: RopeTables, keep: Tensor, frames: int) -> RopeTables:
    """Tables for kept tokens: the spatial ones, a set for every row of spatial attention, [B * T', 1, S', Dh/2]."""
    cos, sin = (table[keep].repeat_interleave(frames, 0).unsqueeze(1) for table in (rope.spatial_cos, rope.spatial_sin))
    return RopeTables(cos, sin, rope.temporal_cos, rope.temporal_sin)
