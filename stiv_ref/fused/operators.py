"""The fused kernels as PyTorch operators: ``torch.ops.stiv.temporal_attention`` and ``torch.ops.stiv.spatial_qkv``.

On CUDA tensors they launch the kernel library through its C ABI (ctypes: nothing is compiled on the user's machine);
elsewhere they are the plain chain of operators, which is also their definition. Fake kernels let ``torch.compile`` and
``torch.export`` see through them. There is no backward.

Shapes: B batch, T token frames, S tokens of a frame, H heads, Dh head size, N = B * T. Maths: STIV (arXiv
2412.07730, section 2.2); layouts: ``runtime/plugins/attention/kernels.h``. All tensors are of the type of ``qkv``
but the scales, fp32 numbers; a scale makes the output FP8 E4M3: x / scale, to nearest even, saturated at +-448.

Both raise :class:`AttentionError`, at tracing and at run time, on tensors that do not fit each other or a ``qkv`` that
is not contiguous (a copy would cost what the kernel saves). CUDA tensors are also held to what the kernels are compiled
for (``stiv_ref/fused/launch.py``). A backward pass through them raises it too.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from stiv_deploy.stiv_ref.errors import AttentionError
from stiv_deploy.stiv_ref.fused.launch import cuda_library, current_stream, launch_spatial, launch_temporal
from stiv_deploy.stiv_ref.fused.outputs import FP8, empty_spatial, empty_temporal, shape_text
from stiv_deploy.stiv_ref.rope import rotate

LARGEST_FP8 = 448.0
TENSORS: Final = 6
"""Arguments that both operators begin with: qkv, bias, q_gamma, k_gamma, cos, sin."""


class Temporal(NamedTuple):
    """Arguments of :func:`temporal_attention`, as its kernels get them from PyTorch's dispatcher."""

    qkv: Tensor
    bias: Tensor | None
    q_gamma: Tensor
    k_gamma: Tensor
    cos: Tensor
    sin: Tensor
    heads: int
    epsilon: float = 1e-6
    output_scale: Tensor | None = None


class Spatial(NamedTuple):
    """Arguments of :func:`spatial_qkv`, likewise."""

    qkv: Tensor
    bias: Tensor | None
    q_gamma: Tensor
    k_gamma: Tensor
    cos: Tensor
    sin: Tensor
    heads: int
    epsilon: float = 1e-6
    query_scale: float = 1.0
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of q, k and v."""
        return self.q_scale, self.k_scale, self.v_scale


@torch.library.custom_op("stiv::temporal_attention", mutates_args=())
def temporal_attention(
    qkv: Tensor,
    bias: Tensor | None,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    epsilon: float = 1e-6,
    output_scale: Tensor | None = None,
) -> Tensor:
    """Attention over the frames of each position: ``qkv`` [B, T, S, 3*H*Dh] -> [B, T, S, H*Dh].

    ``bias`` [3*H*Dh] or None; gammas [Dh]; tables [T, Dh/2]; ``output_scale`` [] makes the output FP8.
    """
    _check_temporal(Temporal(qkv, bias, q_gamma, k_gamma, cos, sin, heads, epsilon, output_scale))
    q, k, v = _heads_of(qkv, bias, heads).permute(3, 0, 2, 4, 1, 5)  # 3 x (B, S, H, T, Dh)
    q, k = _normed(q, q_gamma, cos, sin, epsilon), _normed(k, k_gamma, cos, sin, epsilon)
    y = F.scaled_dot_product_attention(q, k, v)  # (B, S, H, T, Dh)
    return _stored(y.permute(0, 3, 1, 2, 4).flatten(3), output_scale)


@temporal_attention.register_kernel("cuda")
def temporal_attention_on_gpu(*arguments: Any, **keywords: Any) -> Tensor:
    """The kernel's launch on the current stream of the tensors' device; adds ``KernelError`` to the operator's."""
    call = Temporal(*arguments, **keywords)
    _check_temporal(call)
    with torch.cuda.device(call.qkv.device):
        return launch_temporal(
            cuda_library(), call[:TENSORS], call.heads, call.epsilon, call.output_scale, current_stream()
        )


@temporal_attention.register_fake
def _(*arguments: Any, **keywords: Any) -> Tensor:
    call = Temporal(*arguments, **keywords)
    _check_temporal(call)
    return empty_temporal(call.qkv, call.output_scale)


@torch.library.custom_op("stiv::spatial_qkv", mutates_args=())
def spatial_qkv(
    qkv: Tensor,
    bias: Tensor | None,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    epsilon: float = 1e-6,
    query_scale: float = 1.0,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bias, QK-norm, RoPE and layout before spatial attention: ``qkv`` [N, S, 3*H*Dh] -> q, k, v [N, H, S, Dh].

    ``bias`` [3*H*Dh] or None; gammas [Dh]; tables [S, Dh/2]; q is multiplied by ``query_scale``. The three scales [],
    given together, make the outputs FP8.
    """
    scales = (q_scale, k_scale, v_scale)
    _check_spatial(Spatial(qkv, bias, q_gamma, k_gamma, cos, sin, heads, epsilon, query_scale, *scales))
    q, k, v = _heads_of(qkv, bias, heads).permute(2, 0, 3, 1, 4)  # 3 x (N, H, S, Dh)
    q, k = _normed(q, q_gamma, cos, sin, epsilon), _normed(k, k_gamma, cos, sin, epsilon)
    q = q if query_scale == 1.0 else q * query_scale
    return _stored(q, q_scale), _stored(k, k_scale), _stored(v, v_scale)


@spatial_qkv.register_kernel("cuda")
def spatial_qkv_on_gpu(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's launch on the current stream of the tensors' device; adds ``KernelError`` to the operator's."""
    call = Spatial(*arguments, **keywords)
    _check_spatial(call)
    with torch.cuda.device(call.qkv.device):
        return launch_spatial(
            cuda_library(),
            call[:TENSORS],
            call.heads,
            call.epsilon,
            call.query_scale,
            call.scales,
            current_stream(),
        )


@spatial_qkv.register_fake
def _(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Spatial(*arguments, **keywords)
    _check_spatial(call)
    return empty_spatial(call.qkv, call.heads, call.q_scale)


def _refuse_backward(*_: object) -> NoReturn:
    raise AttentionError(
        "fused attention has no backward pass: train a model without fuse(), or sample under torch.no_grad()"
    )


temporal_attention.register_autograd(_refuse_backward)
spatial_qkv.register_autograd(_refuse_backward)


def _heads_of(qkv: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """``qkv`` [..., 3*H*Dh] plus ``bias``, as [..., 3, H, Dh]."""
    return (qkv if bias is None else qkv + bias).unflatten(-1, (3, heads, -1))


def _normed(x: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
    """RMS norm over the last axis of ``x`` [..., M, Dh], then RoPE over M."""
    return rotate(F.rms_norm(x, gamma.shape, gamma, eps=epsilon), cos, sin)


def _stored(x: Tensor, scale: Tensor | None) -> Tensor:
    """A contiguous copy of ``x`` (an operator's output must not share memory with its input), in FP8 with ``scale``."""
    if scale is not None:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        x = (wide / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8)  # older torch makes NaN of what is larger
    return x.clone(memory_format=torch.contiguous_format)


def _check_temporal(call: Temporal) -> None:
    what = "fused temporal attention"
    _check_qkv(what, call.qkv, ("B", "T", "S", "3*H*Dh"), call.heads)
    _check_parameters(what, call)
    _check_scales(what, call.qkv, () if call.output_scale is None else (call.output_scale,))


def _check_spatial(call: Spatial) -> None:
    what = "fused spatial pre-processing"
    _check_qkv(what, call.qkv, ("N", "S", "3*H*Dh"), call.heads)
    _check_parameters(what, call)
    given = tuple(scale for scale in call.scales if scale is not None)
    if len(given) not in (0, 3):
        raise AttentionError(f"{what}: {len(given)} of the scales of q, k and v given; give all three, or none")
    _check_scales(what, call.qkv, given)


def _check_qkv(what: str, qkv: Tensor, axes: tuple[str, ...], heads: int) -> None:
    layout = f"[{', '.join(axes)}]"
    if qkv.dim() != len(axes):
        raise AttentionError(f"{what}: qkv has shape {shape_text(qkv)}, it wants {layout}")
    if not qkv.dtype.is_floating_point:
        raise AttentionError(f"{what}: qkv is {qkv.dtype}, it wants floating-point numbers")
    if heads < 1 or qkv.shape[-1] % (6 * heads) or qkv.shape[-1] < 1:
        raise AttentionError(
            f"{what}: the last axis of qkv {shape_text(qkv)} is not 3 * {heads} heads of an even size; "
            f"give the packed {layout}"
        )
    if not qkv.is_contiguous():
        raise AttentionError(f"{what}: qkv {shape_text(qkv)} is not contiguous; give the linear's output as it is")


def _check_parameters(what: str, call: Temporal | Spatial) -> None:
    qkv, heads = call.qkv, call.heads
    length, head_dim = qkv.shape[1], qkv.shape[-1] // (3 * heads)
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "q_gamma": (call.q_gamma, (head_dim,)),
        "k_gamma": (call.k_gamma, (head_dim,)),
        "cos": (call.cos, (length, head_dim // 2)),
        "sin": (call.sin, (length, head_dim // 2)),
    }
    if call.bias is not None:
        wanted["bias"] = (call.bias, (qkv.shape[-1],))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            sizes = f"[{', '.join(str(size) for size in shape)}]"
            raise AttentionError(
                f"{what}: {name} has shape {shape_text(tensor)}, qkv {shape_text(qkv)} with {heads} heads wants {sizes}"
            )
        _check_kind(what, name, tensor, qkv.dtype, qkv.device)


def _check_scales(what: str, qkv: Tensor, scales: Sequence[Tensor]) -> None:
    for scale in scales:
        if scale.dim():
            raise AttentionError(f"{what}: a scale has shape {shape_text(scale)}; give one number, of shape []")
        _check_kind(what, "a scale", scale, torch.float32, qkv.device)


def _check_kind(what: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.device != device:
        raise AttentionError(
            f"{what}: {name} is {tensor.dtype} on {tensor.device}, it wants {dtype} on {device}; use .to(...) on it"
        )
