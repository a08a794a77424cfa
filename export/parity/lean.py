"""Oracles that hold one graph at a time: the memory of a block in float64 instead of that of the whole model."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from stiv_deploy.export.graphs.modules import graph_modules, part
from stiv_deploy.export.parity.oracle import Oracle, Tensors
from stiv_deploy.export.parity.requests import Request
from stiv_deploy.runtime.bundle.contract import block_names, block_of, is_block
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingInputs

IN_MODEL = ("text_kv", "embed", "head")
"""Graphs besides the blocks that are parts of the transformer."""


def only(checkpoint: Checkpoint, graph: str) -> Checkpoint:
    """A view of ``checkpoint`` with nothing but what ``graph`` computes with, sharing its weights."""
    absent: Any = nn.Identity()
    return replace(
        checkpoint,
        model=_model_part(checkpoint, graph),
        text_encoder=checkpoint.text_encoder if graph == "text_encoder" else absent,
        vae=checkpoint.vae if graph in ("image_encoder", "decoder") else absent,
    )


def _model_part(checkpoint: Checkpoint, graph: str) -> Stiv:
    if graph in IN_MODEL:
        view: Stiv = graph_modules(checkpoint)[graph].source  # type: ignore[assignment]
    else:
        view = part(checkpoint.model)
    owner = block_of(graph)
    if is_block(owner):
        names = block_names(len(checkpoint.model.blocks))
        blocks = zip(names, checkpoint.model.blocks, strict=True)
        view.blocks = nn.ModuleList(block if name == owner else nn.Identity() for name, block in blocks)
    elif graph != "text_kv":
        view.blocks = nn.ModuleList()
    return view


class OneAtATime(Oracle):
    """An oracle made anew, by ``make(graph)``, whenever another graph is asked for."""

    def __init__(self, make: Callable[[str], Oracle]) -> None:
        self._make = make
        self._last: tuple[str, Oracle] | None = None

    def of(self, graph: str) -> Oracle:
        """The oracle that can run ``graph`` and no other."""
        if self._last is None or self._last[0] != graph:
            self._last = None  # its memory goes before the next one's comes
            self._last = graph, self._make(graph)
        return self._last[1]

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> Tensors:
        """Outputs of ``graph``."""
        return self.of(graph).run(graph, inputs)

    def rope(self, latents: Tensor) -> Tensors:
        """The RoPE tables for ``latents``, by contract name."""
        return self.of("embed").rope(latents)

    def sampling_inputs(self, request: Request) -> SamplingInputs:
        """Inputs of :func:`~stiv_deploy.stiv_ref.sampler.sample` for ``request``."""
        return self.of("text_encoder").sampling_inputs(request)
