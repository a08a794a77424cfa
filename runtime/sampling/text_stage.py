"""Prompts to what the model needs of them, once each: pooled text, mask, and the keys and values of all blocks."""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from stiv_deploy.runtime.backends.base import Backend, Buffer, Call
from stiv_deploy.runtime.bundle.contract import GraphSpec, graph_specs
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.sampling.conditioning import additive_mask
from stiv_deploy.runtime.sampling.hooks import Hook, no_hook

GRAPHS = ("text_encoder", "text_kv")
KEPT_BYTES = 2**28
"""Device memory for prompts that are kept; some 15 of the largest model's with 128 tokens."""


class Tokens(NamedTuple):
    """One prompt: token ids and 0/1 mask, int64 [L] each."""

    ids: np.ndarray
    mask: np.ndarray

    @property
    def key(self) -> bytes:
        """Equal for equal prompts."""
        return self.ids.tobytes() + self.mask.tobytes()


class TextRow(NamedTuple):
    """An encoded prompt on the device: ``pooled`` [Dt], additive ``mask`` [1, 1, L], ``k`` and ``v`` [N, H, L, Dh]."""

    pooled: Buffer
    mask: Buffer
    k: Buffer
    v: Buffer

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(buffer.nbytes for buffer in self)


class TextStage:
    """Encodes prompts one by one and keeps those used last, up to ``kept_bytes`` of device memory.

    Alone, so that a prompt's values do not depend on the others of its call; ``rows`` is the smallest number that the
    graphs take, of which one is kept.
    """

    def __init__(
        self, backend: Backend, manifest: Manifest, rows: int = 1, hook: Hook = no_hook, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self._backend = backend
        self._rows = rows
        self._kept_bytes = kept_bytes
        self.hits = 0
        """How often a prompt was there already."""
        self._kept: OrderedDict[bytes, TextRow] = OrderedDict()
        specs = graph_specs(manifest.model, manifest.precision)
        dims = {"model_batch": rows, "text_tokens": manifest.model.max_text_tokens}
        tensors = {tensor.name: tensor for name in GRAPHS for tensor in (*specs[name].inputs, *specs[name].outputs)}
        self._buffers = {name: backend.empty(each.sized(dims), each.dtype) for name, each in tensors.items()}
        self._calls = [hook(name, self._bind(name, specs[name])) for name in GRAPHS]

    def _bind(self, graph: str, spec: GraphSpec) -> Call:
        inputs, outputs = (
            {each.name: self._buffers[each.name] for each in part} for part in (spec.inputs, spec.outputs)
        )
        return self._backend.bind(graph, inputs, outputs)

    def __call__(self, tokens: Tokens) -> TextRow:
        """The encoded prompt, from an earlier call or computed now."""
        self.hits += tokens.key in self._kept
        if tokens.key not in self._kept:
            self._make_room()
            self._kept[tokens.key] = self._encode(tokens)
        self._kept.move_to_end(tokens.key)
        return self._kept[tokens.key]

    def forget(self) -> None:
        """Keep no prompt: each is computed anew when it comes again. Those in use live on with their users."""
        self._kept.clear()

    def _make_room(self) -> None:
        """Forget prompts until one more fits; the memory of one that is still used lives on with its user."""
        sizes = [row.nbytes for row in self._kept.values()]
        while sizes and sum(sizes) + sizes[-1] > self._kept_bytes:
            self._kept.popitem(last=False)
            sizes.pop(0)

    def _encode(self, tokens: Tokens) -> TextRow:
        for name, values in (("token_ids", tokens.ids), ("token_mask", tokens.mask)):
            self._backend.write(self._buffers[name], np.tile(values, (self._rows, 1)))
        for call in self._calls:
            call()
        return TextRow(
            self._copied(self._buffers["pooled"][0]),
            self._backend.upload(additive_mask(tokens.mask[None])[0]),
            self._first_of_each(self._buffers["text_k"]),
            self._first_of_each(self._buffers["text_v"]),
        )

    def _copied(self, source: Buffer) -> Buffer:
        target = self._backend.empty(source.shape, source.dtype)
        self._backend.copy(target, source)
        return target

    def _first_of_each(self, source: Buffer) -> Buffer:
        """The first row of every block: [N, H, L, Dh] of [N, rows, H, L, Dh]."""
        blocks, _, *shape = source.shape
        target = self._backend.empty((blocks, *shape), source.dtype)
        for block in range(blocks):
            self._backend.copy(target[block], source[block][0])
        return target
