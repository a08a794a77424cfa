"""Precisions: the 8-bit formats, and what a bundle's tensors are in as types of torch."""

from typing import TYPE_CHECKING, get_args

from stiv_deploy.runtime.bundle.contract import Format, Precision

if TYPE_CHECKING:
    import torch

FORMATS: tuple[Format, ...] = get_args(Format)
"""8-bit formats: a precision of the commands, but not the type of a bundle's tensors."""


def torch_dtype(precision: Precision) -> "torch.dtype":
    """The torch dtype of a bundle's precision."""
    import torch

    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[precision]
