"""NVFP4: E2M1 elements in blocks of 16 along the inputs of a linear, two scales on top of each other.

A tensor has one scale in float32, a range over 6 * 448, and each block one in E4M3, its largest magnitude over 6 and
over the tensor's scale. A value is element * block scale * tensor scale. Block scales are made of the values at hand,
of weights once, of activations in every call (*dynamic* quantization): only the tensor's scale is calibrated. All of it
is computed in float32, in the order of NVIDIA ModelOpt's ``NVFP4QTensor``, whose values it has bit by bit
(tests/unit/calibration/test_nvfp4.py). Source of the format: NVIDIA, "Introducing NVFP4", and the TensorRT
documentation on quantized types.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stiv_deploy.calibration.layers import BLOCK

LARGEST_ELEMENT = 6.0
LARGEST_SCALE, LEAST_SCALE = 448.0, 2.0**-9
"""Of block scales. A block that would have less has the least scale, so that nothing is divided by zero."""
SIGN = 8
"""The bit of a code that says that its element is negative."""


class Blocks(NamedTuple):
    """A tensor [..., K] in NVFP4: ``elements`` float32 [..., K/16, 16] and ``scales`` E4M3 [..., K/16, 1]."""

    elements: Tensor
    scales: Tensor

    def values(self, scale: Tensor) -> Tensor:
        """What they stand for with the tensor's ``scale`` []: float32 [..., K]."""
        return (self.elements * (self.scales.float() * scale)).flatten(-2)

    @property
    def codes(self) -> Tensor:
        """The elements as 4 bits in uint8 [..., K]: sign, two of exponent, one of mantissa."""
        size = self.elements.abs()
        code = torch.where(size <= 2, 2 * size, torch.where(size <= 4, size + 2, 7.0))
        negative = torch.signbit(self.elements) & (size > 0)
        return (code.to(torch.uint8) + SIGN * negative.to(torch.uint8)).flatten(-2)


def to_elements(values: Tensor) -> Tensor:
    """The nearest E2M1 numbers (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), at ties the even code; saturates."""
    size = values.abs().clamp(max=LARGEST_ELEMENT)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, values)


def to_blocks(values: Tensor, scale: Tensor) -> Blocks:
    """``values`` [..., K] in NVFP4 with the tensor's ``scale`` [], float32; K is a multiple of 16."""
    grouped = values.float().unflatten(-1, (-1, BLOCK))
    largest = grouped.abs().amax(-1, keepdim=True)
    scales = (largest / (LARGEST_ELEMENT * scale)).clamp(LEAST_SCALE, LARGEST_SCALE).to(torch.float8_e4m3fn)
    return Blocks(to_elements(grouped / (scales.float() * scale)), scales)


def fake_quantized_nvfp4(values: Tensor, scale: Tensor) -> Tensor:
    """``values`` [..., K] rounded to NVFP4, in their own type."""
    return to_blocks(values, scale).values(scale).to(values.dtype)


class Nvfp4Quantizer(nn.Module):
    """Rounds to NVFP4 with the tensor's ``scale`` [], in the place of one of ModelOpt's quantizers.

    ModelOpt's own runs on GPUs only.
    """

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale  # no buffer: it stays float32 whatever the model is cast to
        self.enabled = True

    def enable(self) -> None:
        """Round from now on."""
        self.enabled = True

    def disable(self) -> None:
        """Leave values as they are from now on."""
        self.enabled = False

    def forward(self, values: Tensor) -> Tensor:
        """``values`` [..., K], rounded or as they are."""
        return fake_quantized_nvfp4(values, self.scale) if self.enabled else values
