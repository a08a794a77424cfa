"""The reference's model as its sampling loop calls it, in another floating type than its own."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from stiv_deploy.export.graphs.modules import part
from stiv_deploy.export.graphs.writer import in_precision
from stiv_deploy.stiv_ref.block import StivBlock
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.model import Stiv, TextKV

WHOLE_BYTES = 2**28
"""Largest model (256 MiB) that is copied as a whole: that of one block at each evaluation takes its time."""


class Boundary(nn.Module):
    """A model of low precision whose velocity leaves as fp32, as the ``head`` graph's does (fp64 stays fp64)."""

    def __init__(self, model: Stiv) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> StivConfig:
        """The architecture."""
        return self.model.config

    def text_kv(self, text_states: Tensor) -> TextKV:
        """Keys and values of all blocks."""
        return self.model.text_kv(text_states)

    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        """The velocity, in at least fp32."""
        velocity: Tensor = self.model(*args, **kwargs)
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))


class _InTurn(nn.Module):
    """``source`` in ``dtype`` for as long as it runs; what projects its text stays."""

    def __init__(self, source: StivBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self._source, self._dtype = (source,), dtype  # in a tuple, so that it is no child, which would be cast
        self.cross = in_precision(part(source.cross, "kv", "k_norm"), dtype)

    def forward(self, *args: Any) -> Tensor:
        """The block's result."""
        (source,) = self._source
        result: Tensor = in_precision(source, self._dtype)(*args)
        return result


def in_turn(model: Stiv, dtype: torch.dtype, whole: int = WHOLE_BYTES) -> Boundary:
    """``model`` in ``dtype``; where that takes more than ``whole`` bytes, memory holds one block of it at a time."""
    if dtype.itemsize * sum(each.numel() for each in model.parameters()) <= whole:
        return Boundary(in_precision(model, dtype))
    view = copy.copy(model)
    own = {name: in_precision(child, dtype) for name, child in model.named_children() if name != "blocks"}
    blocks = (cast(StivBlock, block) for block in model.blocks)
    view._modules = {**own, "blocks": nn.ModuleList(_InTurn(block, dtype) for block in blocks)}
    return Boundary(view)
