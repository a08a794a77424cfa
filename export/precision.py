"""Precisions by their names: what a bundle's tensors are in, its aliases, and the types of torch."""

from typing import TYPE_CHECKING, get_args

from stiv_deploy.export.errors import ExportError
from stiv_deploy.runtime.bundle.contract import Format, Precision

if TYPE_CHECKING:
    import torch

PRECISIONS: dict[str, Precision] = {
    **{name: name for name in get_args(Precision)},
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
"""Precisions by name and alias."""
FORMATS: tuple[Format, ...] = get_args(Format)
"""8-bit formats: a precision of the commands, but not the type of a bundle's tensors."""


def parse_precision(text: str, option: str = "precision") -> Precision:
    """The type of a bundle's tensors by its name or alias; :class:`ExportError` names ``option`` if there is none."""
    try:
        return PRECISIONS[text.lower()]
    except KeyError:
        more = f", {' or '.join(FORMATS)}" if option == "precision" else ""
        wanted = f"float32, float16{',' if more else ' or'} bfloat16{more}"
        raise ExportError(f"--{option} {text}: no such precision; use {wanted}") from None


def torch_dtype(precision: Precision) -> "torch.dtype":
    """The torch dtype of a bundle's precision."""
    import torch

    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[precision]
