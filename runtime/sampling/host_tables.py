"""Small inputs that the host decides: arrays that are written to the device together, or lie there already."""

from collections.abc import Mapping
from itertools import accumulate
from math import prod

import numpy as np

from stiv_deploy.runtime.backends.base import ITEM_BYTES, Backend, aligned
from stiv_deploy.runtime.bundle.contract import DType


class HostTables:
    """Host arrays ``values`` by name, all zero at first, and the device ``buffers`` that :meth:`flush` makes equal.

    ``tables`` are shapes and dtypes (float32, int64 or bool) by name. All lie in one piece of memory, so that a flush
    is one copy, and none where the host can write to the buffers themselves.
    """

    def __init__(self, backend: Backend, tables: Mapping[str, tuple[tuple[int, ...], DType]]) -> None:
        sizes = [prod(shape) * ITEM_BYTES[dtype] for shape, dtype in tables.values()]
        starts = [0, *accumulate(map(aligned, sizes))]
        self._device = backend.empty((starts[-1] // ITEM_BYTES["int64"],), "int64")
        shared = backend.host_view(self._device)
        self._host = np.empty(self._device.shape, dtype=np.int64) if shared is None else shared
        self._host[...] = 0
        self._copied = shared is None
        raw, places = self._host.view(np.uint8), list(zip(tables.items(), starts, sizes, strict=False))
        self.values = {
            name: raw[start : start + size].view(dtype).reshape(shape) for (name, (shape, dtype)), start, size in places
        }
        self.buffers = {name: self._device.part(start, shape, dtype) for (name, (shape, dtype)), start, _ in places}
        self._backend = backend

    def flush(self) -> None:
        """Write the values to the device, where they are not there already."""
        if self._copied:
            self._backend.write(self._device, self._host)
