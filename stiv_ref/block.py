"""One STIV block, the unit that is exported, quantized and compiled.

Shapes: B batch, T token frames, S tokens of a frame, D width, H heads, Dh head size, L text tokens.
Order (arXiv 2412.07730, section 2.2): spatial attention -> temporal attention -> cross-attention -> FFN, each as a
sandwich ``x + gate * LN(f(modulate(LN(x))))`` with stateless norms. All attention has QK-norm (figure 3), that in space
and time RoPE. Where cross-attention stands, and that it is a sandwich too, is ours, as in PixArt-alpha.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.rope import rotate

MODULATIONS = 6  # shift, scale, gate of spatial attention, then of the FFN
MASKED = -1e4
"""What the additive text mask holds at padding: exp(-1e4) is 0 in every float type, and fp16 can hold it."""


class RopeTables(NamedTuple):
    """Rotary tables of one input size: spatial [S, Dh/2], temporal [T, Dh/2]."""

    spatial_cos: Tensor
    spatial_sin: Tensor
    temporal_cos: Tensor
    temporal_sin: Tensor


def stateless_norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without learned affine (the paper's *stateless* norm)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def additive_mask(token_mask: Tensor) -> Tensor:
    """Additive attention mask fp32 [B, 1, 1, L] of a 0/1 token mask [B, L]."""
    return ((1 - token_mask.float()) * MASKED)[:, None, None, :]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale; one scale of ``size`` serves all heads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` [..., size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


class SelfAttention(nn.Module):
    """Multi-head self-attention with QK-norm and RoPE over the second-to-last axis."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend within each row of ``x`` [N, M, D]; tables [M, Dh/2]; returns [N, M, D]."""
        rows, length, width = x.shape
        qkv = self.qkv(x).reshape(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).chunk(3)  # 3 x (1, N, H, M, Dh)
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v)  # (N, H, M, Dh)
        return self.out(y.transpose(1, 2).reshape(rows, length, width))


class CrossAttention(nn.Module):
    """Attention from video tokens to text, with QK-norm unless ``qk_norm`` is off.

    Keys and values are projected, and the keys normalized, once a request by :meth:`text_kv`.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, normalized, and values [B, H, L, Dh] of projected text states [B, L, D]."""
        batch, length, width = text.shape
        kv = self.kv(text).reshape(batch, length, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4).chunk(2)
        return self.k_norm(k.squeeze(0)), v.squeeze(0)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attend from ``x`` [B, N, D] to text k, v [B, H, L, Dh] under the additive mask [B, 1, 1, L]."""
        batch, length, width = x.shape
        q = self.q_norm(self.q(x).reshape(batch, length, self.heads, width // self.heads)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, N, Dh)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    """Two linears around a tanh-GELU."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, ratio * width)
        self.down = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., D] to the same shape."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class StivBlock(nn.Module):
    """One block. Without ``config.temporal`` it is the block of the image model (T2I).

    The temporal branch has a static gate that starts at zero, so that a video model begins as its image model. (A
    zero output projection could not do that: the stateless norm behind it would blow the first update up to unit size.)
    """

    def __init__(self, config: StivConfig) -> None:
        super().__init__()
        self.has_temporal = config.temporal
        self.table = nn.Parameter(torch.empty(MODULATIONS, config.width))
        self.spatial = SelfAttention(config.width, config.heads)
        if config.temporal:
            self.temporal = SelfAttention(config.width, config.heads)
            self.temporal_gate = nn.Parameter(torch.zeros(config.width))
        self.cross = CrossAttention(config.width, config.heads, config.cross_qk_norm)
        self.ffn = FeedForward(config.width, config.mlp_ratio)

    def forward(
        self, x: Tensor, modulation: Tensor, text_k: Tensor, text_v: Tensor, text_mask: Tensor, rope: RopeTables
    ) -> Tensor:
        """Run the block on ``x`` [B, T, S, D] and return the same shape.

        ``modulation`` [B, 6, D] is the shared AdaLN output; the block adds its own table to it. ``text_k``, ``text_v``
        [B, H, L, Dh]; ``text_mask`` additive [B, 1, 1, L].
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self._modulations(modulation)
        x = self._spatial(x, shift, scale, gate, rope)
        return self._mixed(x, ffn_shift, ffn_scale, ffn_gate, text_k, text_v, text_mask, rope)

    def spatial_half(self, x: Tensor, modulation: Tensor, rope: RopeTables) -> Tensor:
        """The first half, spatial attention, on ``x`` [B, T, S, D]: it needs all tokens of a frame, frames alone."""
        shift, scale, gate, *_ = self._modulations(modulation)
        return self._spatial(x, shift, scale, gate, rope)

    def mixed_half(
        self, x: Tensor, modulation: Tensor, text_k: Tensor, text_v: Tensor, text_mask: Tensor, rope: RopeTables
    ) -> Tensor:
        """The second half, all that follows, on ``x`` [B, T, S, D]: it needs all frames of a position, positions alone.

        One half after the other is the block, whose arguments these are.
        """
        *_, shift, scale, gate = self._modulations(modulation)
        return self._mixed(x, shift, scale, gate, text_k, text_v, text_mask, rope)

    def _modulations(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of spatial attention, then of the FFN, [B, 1, 1, D] each."""
        return (modulation + self.table).unsqueeze(2).chunk(MODULATIONS, dim=1)

    def _spatial(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, rope: RopeTables) -> Tensor:
        batch, frames, tokens, width = x.shape
        y = stateless_norm(x) * (1 + scale) + shift
        y = self.spatial(y.reshape(batch * frames, tokens, width), rope.spatial_cos, rope.spatial_sin)
        return x + gate * stateless_norm(y.reshape(batch, frames, tokens, width))

    def _mixed(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        text_mask: Tensor,
        rope: RopeTables,
    ) -> Tensor:
        batch, frames, tokens, width = x.shape
        if self.has_temporal:
            x = x + self.temporal_gate * self.over_frames(stateless_norm(x), rope)

        y = self.cross(stateless_norm(x).reshape(batch, frames * tokens, width), text_k, text_v, text_mask)
        x = x + stateless_norm(y).reshape(batch, frames, tokens, width)

        y = self.ffn(stateless_norm(x) * (1 + scale) + shift)
        return x + gate * stateless_norm(y)

    def over_frames(self, x: Tensor, rope: RopeTables) -> Tensor:
        """Attend over the frames of each position of ``x`` [B, T, S, D]; returns the same shape, normed."""
        batch, frames, tokens, width = x.shape
        y = x.transpose(1, 2).reshape(batch * tokens, frames, width)
        y = stateless_norm(self.temporal(y, rope.temporal_cos, rope.temporal_sin))
        return y.reshape(batch, tokens, frames, width).transpose(1, 2)
