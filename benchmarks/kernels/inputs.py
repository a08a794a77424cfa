"""Random inputs of the kernels as torch tensors, and the calls of the kernel library on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stiv_deploy.runtime.plugins.library import POINTERS, KernelDtype, KernelLibrary, SpatialQkv, TemporalAttention

KERNEL_DTYPES = {
    torch.float32: KernelDtype.FLOAT32,
    torch.float16: KernelDtype.FLOAT16,
    torch.bfloat16: KernelDtype.BFLOAT16,
    torch.float8_e4m3fn: KernelDtype.FLOAT8_E4M3,
}
FP8 = torch.float8_e4m3fn
EPSILON = 1e-6
SIZES = {3: ("batch", "frames", "positions"), 2: ("rows", "positions")}
"""Names of the axes of qkv before its 3, by their number: temporal attention, and pre-processing."""
GUARD = 1024  # bytes of NaN before and behind every output


@dataclass
class Inputs:
    """Tensors of one call, of one dtype: ``qkv`` [B, T, S, 3, H, Dh], or [N, S, 3, H, Dh] for pre-processing.

    ``bias`` [3, H, Dh] or None, gammas [Dh], tables [T or S, Dh / 2]; ``scales`` fp32 [1] or [3] of an FP8 output.
    """

    qkv: Tensor
    bias: Tensor | None
    q_gamma: Tensor
    k_gamma: Tensor
    cos: Tensor
    sin: Tensor
    scales: Tensor | None = None
    query_scale: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the inputs."""
        return self.qkv.dtype

    @property
    def output_dtype(self) -> torch.dtype:
        """Dtype of the output."""
        return self.qkv.dtype if self.scales is None else FP8

    @property
    def output_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the outputs: y, or q, k, v."""
        *leading, _, heads, head_dim = self.qkv.shape
        if len(leading) == 3:
            return [(*leading, heads * head_dim)]
        return [(leading[0], heads, leading[1], head_dim)] * 3


def random_inputs(
    generator: torch.Generator, leading: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype
) -> Inputs:
    """Numbers of unit size; ``leading`` is (B, T, S), or (N, S) for pre-processing."""
    device, length = generator.device, leading[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape, device=device).uniform_(low, high, generator=generator)

    angles = uniform(0, 2 * torch.pi, length, head_dim // 2)
    return Inputs(
        qkv=normal(*leading, 3, heads, head_dim),
        bias=normal(3, heads, head_dim),
        q_gamma=uniform(0.5, 1.5, head_dim).to(dtype),
        k_gamma=uniform(0.5, 1.5, head_dim).to(dtype),
        cos=angles.cos().to(dtype),
        sin=angles.sin().to(dtype),
    )


class Guarded:
    """A tensor to be filled, of NaN, with NaN before and behind it."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._size = torch.Size(shape).numel() * dtype.itemsize
        padded = -(-self._size // 16) * 16  # keeps the zone behind, too, aligned
        self._whole = torch.full((GUARD + padded + GUARD,), 0xFF, dtype=torch.uint8, device=device)
        self.tensor = self._whole[GUARD : GUARD + self._size].view(dtype).view(*shape)

    def intact(self) -> bool:
        """Whether nothing beside the tensor was written."""
        before, behind = self._whole[:GUARD], self._whole[GUARD + self._size :]
        return bool((before == 0xFF).all() and (behind == 0xFF).all())


def stream_of(device: torch.device) -> int:
    """The current stream as the kernel library takes it; 0 on the CPU."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def sizes_and_types(
    leading: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype, output_dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of a call that are no pointers, by name."""
    return {
        **dict(zip(SIZES[len(leading)], leading, strict=True)),
        "heads": heads,
        "head_dim": head_dim,
        "dtype": KERNEL_DTYPES[dtype],
        "output_dtype": KERNEL_DTYPES[output_dtype],
    }


def launch(library: KernelLibrary, inputs: Inputs, outputs: Sequence[Tensor]) -> None:
    """One launch on the current stream: temporal attention for one output, pre-processing for q, k, v."""
    names = ("output",) if len(outputs) == 1 else ("q", "k", "v")
    *leading, _, heads, head_dim = inputs.qkv.shape
    call: dict[str, Any] = {name: getattr(inputs, name).data_ptr() for name in POINTERS}
    call |= {name: output.data_ptr() for name, output in zip(names, outputs, strict=True)}
    call |= sizes_and_types(leading, heads, head_dim, inputs.dtype, outputs[0].dtype)
    call |= {"bias": 0 if inputs.bias is None else inputs.bias.data_ptr(), "epsilon": EPSILON}
    if inputs.scales is not None:
        scales = zip(names, inputs.scales, strict=len(outputs) == 3)
        call |= {f"{name}_scale": scale.data_ptr() for name, scale in scales}
    stream = stream_of(inputs.qkv.device)
    if len(outputs) == 1:
        library.temporal_attention(TemporalAttention(**call), stream)
    else:
        library.spatial_qkv(SpatialQkv(**call, query_scale=inputs.query_scale), stream)
