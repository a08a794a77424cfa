"""The velocity model of one request size: ``embed``, blocks and ``head`` bound to buffers that are allocated once."""

import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from stiv_deploy.runtime.backends.base import Backend, Buffer, Call
from stiv_deploy.runtime.bundle.contract import block_names, graph_specs
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.sampling.conditioning import additive_mask
from stiv_deploy.runtime.sampling.rope import rope_tables

Hook = Callable[[str, Call], Call]
"""Given a graph's name and its bound call, returns the call to use instead: to time it, or to look at its buffers."""


def no_hook(_graph: str, call: Call) -> Call:
    """The hook that changes nothing."""
    return call


class GraphClock:
    """A hook that sums the seconds spent in each graph.

    Without ``synchronize`` these are the seconds until a call returns; with a backend's ``synchronize`` they include
    the device's work, at the price of a wait after every graph.
    """

    def __init__(self, synchronize: Call | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._synchronize = synchronize

    @property
    def total(self) -> float:
        """Seconds in all graphs."""
        return sum(self.seconds.values())

    def __call__(self, graph: str, call: Call) -> Call:
        """Wrap ``call``."""
        seconds, synchronize, now = self.seconds, self._synchronize, time.perf_counter

        def timed() -> None:
            start = now()
            call()
            if synchronize is not None:
                synchronize()
            seconds[graph] += now() - start

        return timed


class Denoiser:
    """Runs the transformer on ``model_input`` at ``timestep`` and leaves the result in ``velocity``.

    Buffers, for the model batch M = branches * batch of ``dims`` (see :func:`contract.dimensions`): ``model_input``
    and ``velocity`` fp32 [M, T, C, h, w], ``timestep`` fp32 [M]. Set text and micro-conditions before the first call.
    """

    def __init__(self, backend: Backend, manifest: Manifest, dims: dict[str, int], hook: Hook = no_hook) -> None:
        self.backend = backend
        self.model = manifest.model
        self.dims = dims
        self.hook = hook
        self.specs = graph_specs(manifest.model, manifest.precision)
        self._buffers = {name: self._allocate(graph, name) for graph, name in _OWN_BUFFERS}
        self._buffers |= {name: backend.upload(table) for name, table in rope_tables(self.model, dims).items()}
        self._ping_pong = (self._buffers["x"], self._allocate("embed", "x"))
        self.model_input = self._buffers["model_input"]
        self.timestep = self._buffers["timestep"]
        self.velocity = self._buffers["velocity"]
        self._encode_text = [self.bind("text_encoder"), self.bind("text_kv")]
        self._step = self._bind_step()

    def _allocate(self, graph: str, name: str) -> Buffer:
        spec = self.specs[graph]
        tensor = next(tensor for tensor in (*spec.inputs, *spec.outputs) if tensor.name == name)
        return self.backend.empty(tensor.sized(self.dims), tensor.dtype)

    def bind(self, graph: str, **buffers: Buffer) -> Call:
        """Bind ``graph`` to ``buffers`` by name, the rest to this denoiser's own buffers, through the hook."""
        spec, known = self.specs[graph], self._buffers | buffers
        call = self.backend.bind(
            graph,
            {tensor.name: known[tensor.name] for tensor in spec.inputs},
            {tensor.name: known[tensor.name] for tensor in spec.outputs},
        )
        return self.hook(graph, call)

    def _bind_step(self) -> tuple[Call, ...]:
        x, x_out = self._ping_pong
        calls = [self.bind("embed", x=x)]
        for index, name in enumerate(block_names(self.model.blocks)):
            text = {key: self._buffers[key][index] for key in ("text_k", "text_v")}
            calls.append(self.bind(name, x=x, x_out=x_out, **text))
            x, x_out = x_out, x
        return (*calls, self.bind("head", x=x))

    def set_text(self, token_ids: np.ndarray, token_mask: np.ndarray) -> None:
        """Encode token ids and 0/1 mask, int64 [M, L], and project the keys and values of all blocks."""
        self.backend.write(self._buffers["token_ids"], token_ids)
        self.backend.write(self._buffers["token_mask"], token_mask)
        self.backend.write(self._buffers["text_mask"], additive_mask(token_mask))
        for call in self._encode_text:
            call()

    def set_micro(self, micro: np.ndarray) -> None:
        """Set the micro-conditions, fp32 [M, 6]."""
        self.backend.write(self._buffers["micro"], micro)

    def __call__(self) -> None:
        """Compute ``velocity`` from ``model_input`` and ``timestep``; queues work, see :meth:`Backend.synchronize`."""
        for call in self._step:
            call()


_OWN_BUFFERS = (
    ("text_encoder", "token_ids"),
    ("text_encoder", "token_mask"),
    ("text_encoder", "text_states"),
    ("text_encoder", "pooled"),
    ("text_kv", "text_k"),
    ("text_kv", "text_v"),
    ("embed", "model_input"),
    ("embed", "timestep"),
    ("embed", "micro"),
    ("embed", "x"),
    ("embed", "modulation"),
    ("embed", "condition"),
    ("block_00", "text_mask"),
    ("head", "velocity"),
)
"""Graph and tensor of each buffer that a denoiser allocates once."""
