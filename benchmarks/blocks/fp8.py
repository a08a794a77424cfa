"""FP8 linears: E4M3 weights and activations with one scale each, one ``torch._scaled_mm`` a call."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
MULTIPLE = 16
"""``torch._scaled_mm`` wants both sizes of a weight to be multiples of this."""
ONCE_A_REQUEST = "cross.kv"
"""The linear of a block that is no part of its forward pass."""


def scale_of(x: Tensor) -> Tensor:
    """The fp32 scalar that maps the largest magnitude of ``x`` to the largest FP8 number; 1 for zeros."""
    largest = x.abs().amax().float()
    return torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))


def quantized(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` in E4M3, saturated."""
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8)


class Fp8Linear(nn.Module):
    """A linear in E4M3 with bf16 result, ``y = scale_x * scale_w * (x8 @ w8^T) + bias``.

    ``input_scale`` (fp32, a number for the whole tensor) is static; without it every call takes its own maximum.
    ``ValueError`` if a size is no multiple of 16.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(self, linear: nn.Linear, input_scale: Tensor | None = None) -> None:
        super().__init__()
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            raise ValueError(
                f"linear of {linear.in_features} x {linear.out_features}: FP8 wants multiples of {MULTIPLE}"
            )
        weight = linear.weight.detach()
        scale = scale_of(weight)
        self.register_buffer("weight", quantized(weight, scale))  # [out, in]; its transpose is column-major
        self.register_buffer("weight_scale", scale)
        bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", None if input_scale is None else input_scale.float())

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in] to bf16 [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        scale = scale_of(rows) if self.input_scale is None else self.input_scale
        y = torch._scaled_mm(
            quantized(rows, scale),
            self.weight.t(),
            scale_a=scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])


def forward_linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and modules of the linears that a block's forward pass runs."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and name != ONCE_A_REQUEST:
            yield name, module


@torch.no_grad()
def input_scales(block: nn.Module, *inputs: object) -> dict[str, Tensor]:
    """Static scales: the largest input of each linear when ``block`` runs on ``inputs``, over the largest FP8."""
    scales: dict[str, Tensor] = {}

    def observe(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            scales[name] = scale_of(given[0])

        return linears[name].register_forward_pre_hook(hook)

    linears = dict(forward_linears(block))
    handles = [observe(name) for name in linears]
    try:
        block(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return scales


def to_fp8(block: nn.Module, scales: dict[str, Tensor] | None = None) -> None:
    """Replace the linears of ``block`` in place; with ``scales`` by name they are static, else dynamic."""
    for name, linear in list(forward_linears(block)):
        parent, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(parent), attribute, Fp8Linear(linear, None if scales is None else scales[name]))
