"""What the fused operators write to: the same tensors for their definition, their fake kernels and their launch."""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


def empty_temporal(qkv: Tensor, output_scale: Tensor | None) -> Tensor:
    """What temporal attention writes to, [B, T, S, H*Dh]."""
    dtype = qkv.dtype if output_scale is None else FP8
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=dtype)


def empty_spatial(qkv: Tensor, heads: int, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What spatial pre-processing writes to: q, k, v [N, H, S, Dh]."""
    rows, tokens, channels = qkv.shape
    shape, dtype = (rows, heads, tokens, channels // (3 * heads)), qkv.dtype if scale is None else FP8
    return qkv.new_empty(shape, dtype=dtype), qkv.new_empty(shape, dtype=dtype), qkv.new_empty(shape, dtype=dtype)


def shape_text(tensor: Tensor) -> str:
    """A tensor's shape for a message, [2, 3]."""
    return f"[{', '.join(str(size) for size in tensor.shape)}]"
