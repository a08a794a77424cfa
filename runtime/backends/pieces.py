"""Graphs one after another over one piece of work, from the host and back to it, again and again at one size."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from stiv_deploy.runtime.backends.base import Backend, Buffer, Call, run_in_order
from stiv_deploy.runtime.bundle.contract import GraphSpec

Bind = Callable[[Mapping[str, Buffer], Mapping[str, Buffer]], Call]
"""Binds a graph that somebody has chosen, as :meth:`Backend.bind` does."""


class PieceCoder:
    """Graphs of one input and one output each, bound to buffers of ``dims``: the second takes the first's result."""

    def __init__(self, backend: Backend, graphs: Sequence[tuple[GraphSpec, Bind]], dims: Mapping[str, int]) -> None:
        self._backend = backend
        self._calls: list[Call] = []
        (source,) = graphs[0][0].inputs
        self._source = self._result = backend.empty(source.sized(dict(dims)), source.dtype)
        for spec, bind in graphs:
            (given,), (made,) = spec.inputs, spec.outputs
            result = backend.empty(made.sized(dict(dims)), made.dtype)
            self._calls.append(bind({given.name: self._result}, {made.name: result}))
            self._result = result
        self._staged = backend.staging(self._result)

    @property
    def given(self) -> tuple[int, ...]:
        """Shape of a piece."""
        return self._source.shape

    def __call__(self, piece: np.ndarray) -> np.ndarray:
        """The result for ``piece``, of the input's shape and type; it is there until the next call."""
        self._backend.write(self._source, np.ascontiguousarray(piece))
        run_in_order(self._calls)
        self._backend.fetch(self._result, self._staged)
        return self._staged
