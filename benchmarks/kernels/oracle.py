"""What the kernels compute: in fp64 from the formulas, and in the inputs' precision from plain torch operators.

The first says what is right, the second how exact this precision is, and what the kernels are faster than.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.inputs import EPSILON, FP8, Inputs

LARGEST_FP8 = 448.0
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


# fp64


def _exact_qk(x: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm over the last axis, then the pairs (i, i + Dh / 2) turned; all in fp64."""
    half = x.shape[-1] // 2
    y = x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * gamma.double()
    first, second = y[..., :half], y[..., half:]
    c, s = cos.double(), sin.double()
    return torch.cat((first * c - second * s, first * s + second * c), -1)


def _exact_qkv(inputs: Inputs) -> Tensor:
    x = inputs.qkv.double()
    return x if inputs.bias is None else x + inputs.bias.double()


def exact_temporal(inputs: Inputs) -> Tensor:
    """fp64 [B, T, S, H * Dh]."""
    x = _exact_qkv(inputs)
    tables = inputs.cos[:, None, None], inputs.sin[:, None, None]
    q = _exact_qk(x[:, :, :, 0], inputs.q_gamma, *tables)
    k = _exact_qk(x[:, :, :, 1], inputs.k_gamma, *tables)
    logits = torch.einsum("btshd,bushd->bshtu", q, k) * x.shape[-1] ** -0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bshtu,bushd->btshd", weights, x[:, :, :, 2]).flatten(3)


def exact_spatial(inputs: Inputs) -> list[Tensor]:
    """q, k, v, fp64 [N, H, S, Dh]."""
    x = _exact_qkv(inputs)
    tables = inputs.cos[:, None], inputs.sin[:, None]
    q = _exact_qk(x[:, :, 0], inputs.q_gamma, *tables) * torch.tensor(inputs.query_scale).double().to(x.device)
    k = _exact_qk(x[:, :, 1], inputs.k_gamma, *tables)
    return [y.transpose(1, 2) for y in (q, k, x[:, :, 2])]


# Plain torch


def _plain_qk(x: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = F.rms_norm(x, gamma.shape, gamma, EPSILON).chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def _to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8)


def plain_qkv(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [..., H, M, Dh] of qkv [..., M, 3, H, Dh]: bias, norm, RoPE and the change of layout."""
    x = inputs.qkv if inputs.bias is None else inputs.qkv + inputs.bias
    q, k, v = (y.transpose(-2, -3) for y in x.unbind(-3))
    tables = inputs.cos, inputs.sin
    return _plain_qk(q, inputs.q_gamma, *tables), _plain_qk(k, inputs.k_gamma, *tables), v


def plain_temporal(inputs: Inputs, attention: object = F.scaled_dot_product_attention) -> Tensor:
    """Temporal attention [B, T, S, H * Dh] as a model has it: frames to the inside, ``attention``, and back."""
    batch, _, positions = inputs.qkv.shape[:3]
    moved = inputs.qkv.transpose(1, 2)  # B S T 3 H Dh
    rows = Inputs(moved, inputs.bias, inputs.q_gamma, inputs.k_gamma, inputs.cos, inputs.sin)
    q, k, v = (x.flatten(0, 1) for x in plain_qkv(rows))  # B*S H T Dh
    y = attention(q, k, v)  # type: ignore[operator]
    y = y.unflatten(0, (batch, positions)).permute(0, 3, 1, 2, 4).flatten(3)
    return y.contiguous() if inputs.scales is None else _to_fp8(y, inputs.scales[0])


def plain_spatial(inputs: Inputs) -> tuple[Tensor, ...]:
    """q, k, v [N, H, S, Dh], contiguous."""
    q, k, v = plain_qkv(inputs)
    outputs = (q if inputs.query_scale == 1 else q * inputs.query_scale, k, v)
    if inputs.scales is None:
        return tuple(x.contiguous() for x in outputs)
    return tuple(_to_fp8(x, scale).contiguous() for x, scale in zip(outputs, inputs.scales, strict=True))


# How far from exact a result may be


def temporal_tolerance(inputs: Inputs, exact: Tensor) -> float:
    """Twice what plain torch of this precision loses, and the rounding of the largest output."""
    unscaled = Inputs(inputs.qkv, inputs.bias, inputs.q_gamma, inputs.k_gamma, inputs.cos, inputs.sin)
    lost, most = float((plain_temporal(unscaled).double() - exact).abs().max()), float(exact.abs().max())
    return 2 * lost + (2 * UNIT_ROUNDOFF[inputs.dtype] + 1e-7) * most


def spatial_tolerance(inputs: Inputs, exact: Tensor) -> float:
    """fp32 arithmetic of Dh terms; the rounding of the result to 16 bits unless FP8 follows."""
    rounding = UNIT_ROUNDOFF[inputs.dtype] if inputs.scales is None else 0.0
    return (inputs.qkv.shape[-1] * 2.0**-24 + rounding) * float(exact.abs().max()) * (1 + 1e-6)


def share_of_tolerance(got: Tensor, exact: Tensor, allowed: float, scale: float | None) -> float:
    """Largest error over what is allowed; infinite where ``got`` is not finite. FP8 adds half a unit of its own."""
    if scale is None:
        errors, limits = (got.double() - exact).abs(), torch.tensor(allowed, dtype=torch.float64)
    else:
        clipped = exact.clamp(-LARGEST_FP8 * scale, LARGEST_FP8 * scale)
        half_units = scale * (clipped.abs() / scale * 2.0**-4).clamp_min(2.0**-10)
        errors = (got.float().double() * scale - clipped).abs()
        limits = (1 + 2.0**-4) * allowed + half_units * (1 + 1e-6)
    share = (errors / limits.to(errors.device).clamp_min(1e-300)).nan_to_num(nan=torch.inf)
    return float(share.max())
