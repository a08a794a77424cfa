"""From tensors to calls of the kernel library: what :mod:`~stiv_deploy.stiv_ref.fused.operators` does on a GPU.

The launching functions take any library: the emulated one runs the same kernels on CPU tensors, for tests.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from stiv_deploy.runtime.plugins.library import (
    POINTERS,
    KernelDtype,
    KernelLibrary,
    SpatialQkv,
    TemporalAttention,
    open_library,
)
from stiv_deploy.runtime.plugins.spec import HEAD_DIMS, MAX_FRAMES
from stiv_deploy.stiv_ref.errors import AttentionError
from stiv_deploy.stiv_ref.fused.outputs import empty_spatial, empty_temporal, shape_text

Tensors = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]
"""qkv, bias, q_gamma, k_gamma, cos, sin."""
DTYPES = {
    torch.float32: KernelDtype.FLOAT32,
    torch.float16: KernelDtype.FLOAT16,
    torch.bfloat16: KernelDtype.BFLOAT16,
    torch.float8_e4m3fn: KernelDtype.FLOAT8_E4M3,
}
INPUTS = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 16
"""Bytes; the kernels read that many at a time."""


@cache
def cuda_library() -> KernelLibrary:
    """The kernel library for GPU tensors; ``KernelError`` with the commands that build it, if it is missing."""
    library = open_library()
    if library.backend != "cuda":
        raise AttentionError(
            f"{library.path} is the {library.backend} kernel library, which cannot read GPU memory; build the real one "
            "with `make plugins` and unset STIV_PLUGIN_LIBRARY"
        )
    return library


def current_stream() -> int:
    """The current CUDA stream of the current device, as the C ABI takes it."""
    return int(torch.cuda.current_stream().cuda_stream)


def check_kernels(head_dim: int, dtype: torch.dtype) -> None:
    """:class:`AttentionError` if there are no kernels for heads of this size and type."""
    if head_dim not in HEAD_DIMS:
        sizes = ", ".join(str(size) for size in HEAD_DIMS)
        raise AttentionError(
            f"fused attention has GPU kernels for head sizes {sizes}, not {head_dim}; use the model without fuse()"
        )
    if dtype not in INPUTS:
        raise AttentionError(
            f"fused attention has GPU kernels for float32, float16 and bfloat16, not {dtype}; cast the model, or use "
            "it without fuse()"
        )


def launch_temporal(
    library: KernelLibrary,
    tensors: Tensors,
    heads: int,
    epsilon: float,
    output_scale: Tensor | None,
    stream: int = 0,
) -> Tensor:
    """Temporal attention by ``library`` on ``stream``; arguments as of the operator, already checked there."""
    qkv = tensors[0]
    batch, frames = qkv.shape[:2]
    if frames > MAX_FRAMES:
        raise AttentionError(
            f"fused attention has GPU kernels for up to {MAX_FRAMES} token frames, qkv {shape_text(qkv)} has {frames}; "
            "give a shorter video, or use a model without fuse()"
        )
    common, _kept = _common(tensors, heads, epsilon)
    output = empty_temporal(qkv, output_scale)
    if qkv.numel():
        call = TemporalAttention(
            **common,
            output=output.data_ptr(),
            output_scale=_scale(output_scale),
            output_dtype=DTYPES[output.dtype],
            batch=batch,
            frames=frames,
        )
        library.temporal_attention(call, stream)
    return output


def launch_spatial(
    library: KernelLibrary,
    tensors: Tensors,
    heads: int,
    epsilon: float,
    query_scale: float,
    scales: tuple[Tensor | None, Tensor | None, Tensor | None],
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spatial pre-processing by ``library`` on ``stream``; arguments as of the operator, already checked there."""
    qkv = tensors[0]
    common, _kept = _common(tensors, heads, epsilon)
    q, k, v = empty_spatial(qkv, heads, scales[0])
    if qkv.numel():
        call = SpatialQkv(
            **common,
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            q_scale=_scale(scales[0]),
            k_scale=_scale(scales[1]),
            v_scale=_scale(scales[2]),
            output_dtype=DTYPES[q.dtype],
            rows=qkv.shape[0],
            query_scale=query_scale,
        )
        library.spatial_qkv(call, stream)
    return q, k, v


def _common(tensors: Tensors, heads: int, epsilon: float) -> tuple[dict[str, Any], list[Tensor]]:
    """What both calls have, by its name in a call, and the tensors to keep until that is enqueued."""
    qkv, bias, *parameters = tensors
    head_dim = qkv.shape[-1] // (3 * heads)
    check_kernels(head_dim, qkv.dtype)
    if qkv.data_ptr() % ALIGNMENT:
        raise AttentionError(
            f"fused attention: qkv {shape_text(qkv)} starts at an address that is no multiple of {ALIGNMENT} bytes "
            f"(storage offset {qkv.storage_offset()}); give a tensor of its own, as .clone() makes"
        )
    kept = [qkv, *(_aligned(tensor) for tensor in parameters)]
    common: dict[str, Any] = {"positions": qkv.shape[-2], "heads": heads, "head_dim": head_dim, "epsilon": epsilon}
    common |= zip(POINTERS, (x.data_ptr() for x in kept), strict=True)
    if bias is not None:
        kept.append(_aligned(bias))
        common["bias"] = kept[-1].data_ptr()
    return common | {"dtype": DTYPES[qkv.dtype]}, kept


def _aligned(tensor: Tensor) -> Tensor:
    """A small parameter as the kernels want it; a copy where it is a slice of something."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _scale(scale: Tensor | None) -> int:
    return 0 if scale is None else scale.data_ptr()
