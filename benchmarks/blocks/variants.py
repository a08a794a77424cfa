"""The ways to run one block that are compared."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blocks.counts import Precision
from blocks.fp8 import to_fp8
from blocks.peaks import has_fp8
from stiv_deploy.runtime.errors import StivError
from stiv_deploy.runtime.plugins.library import open_library
from stiv_deploy.stiv_ref.block import StivBlock
from stiv_deploy.stiv_ref.fused.modules import fuse

Call = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a block is run: precision of its GEMMs, by ``torch.compile`` or eagerly, and who does attention.

    ``fused`` is the project's own kernels; ``dynamic`` takes FP8 scales from every input anew.
    """

    name: str
    precision: Precision = "bf16"
    compiled: bool = False
    fused: bool = False
    dynamic: bool = False


PLAIN = Variant(name="eager bf16")
VARIANTS = (
    PLAIN,
    Variant(name="torch.compile bf16", compiled=True),
    Variant(name="eager FP8", precision="fp8"),
    Variant(name="torch.compile FP8", precision="fp8", compiled=True),
    Variant(name="torch.compile FP8, dynamic scales", precision="fp8", compiled=True, dynamic=True),
    Variant(name="torch.compile bf16, fused attention", compiled=True, fused=True),
    Variant(name="torch.compile FP8, fused attention", precision="fp8", compiled=True, fused=True),
)


def obstacle(variant: Variant, device: torch.device) -> str | None:
    """Why ``variant`` cannot run on ``device``, in one line, or None. On the CPU all can."""
    if device.type != "cuda":
        return None
    if variant.precision == "fp8" and not has_fp8(device):
        major, minor = torch.cuda.get_device_capability(device)
        return f"FP8 matrix products need compute capability 8.9, this GPU has {major}.{minor}"
    if variant.fused:
        try:
            backend = open_library().backend
        except StivError as error:
            return str(error)
        if backend != "cuda":
            return f"the kernel library is the {backend} build, which takes no GPU pointers"
    return None


def variant_block(variant: Variant, block: StivBlock, scales: dict[str, Tensor]) -> StivBlock:
    """A copy of ``block`` with the linears and the attention of ``variant``; ``scales`` are the static ones."""
    own = copy.deepcopy(block)
    if variant.precision == "fp8":
        to_fp8(own, None if variant.dynamic else scales)
    if variant.fused:
        fuse(own)
    return own


def variant_call(variant: Variant, block: StivBlock, device: torch.device) -> Call:
    """What runs ``block``. A CPU compiles without code generation: a dry run waits for no C++ compiler."""
    if not variant.compiled:
        return block
    compiled: Call = torch.compile(
        block, fullgraph=True, dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager"
    )
    return compiled
