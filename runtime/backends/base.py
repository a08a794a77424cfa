"""What a backend is: device buffers, and graphs bound to them.

A request allocates its buffers once, binds every graph to them once, and then only calls. That is what CUDA graphs,
engines with fixed addresses and ONNX Runtime's I/O binding all want.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Self

import numpy as np

from stiv_deploy.runtime.bundle.contract import DType
from stiv_deploy.runtime.bundle.manifest import EngineRecord
from stiv_deploy.runtime.bundle.verified import Machine

ITEM_BYTES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1, "uint8": 1}
ALIGNMENT = 256
"""Bytes; ``IExecutionContext.setTensorAddress`` demands it. ``cudaMalloc`` gives it, a view may not have it."""
Call = Callable[[], None]
"""Runs a bound graph; work may be queued, see :meth:`Backend.synchronize`."""


def aligned(size: int) -> int:
    """``size`` bytes rounded up so that what follows may be bound to an engine."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Buffer:
    """Contiguous device memory with a shape. ``owner`` keeps the memory alive; views share their parent's owner."""

    address: int
    shape: tuple[int, ...]
    dtype: DType
    owner: Any

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def reshape(self, *shape: int) -> "Buffer":
        """The same memory under another shape of equal size."""
        assert prod(shape) == prod(self.shape)
        return Buffer(self.address, shape, self.dtype, self.owner)

    def first(self, count: int) -> "Buffer":
        """The first ``count`` rows along the first axis, as a view."""
        assert 0 <= count <= self.shape[0]
        return Buffer(self.address, (count, *self.shape[1:]), self.dtype, self.owner)

    def part(self, start: int, shape: tuple[int, ...], dtype: DType) -> "Buffer":
        """A view of another shape and dtype over the bytes from ``start`` on."""
        part = Buffer(self.address + start, shape, dtype, self.owner)
        assert 0 <= start <= start + part.nbytes <= self.nbytes
        return part

    @property
    def raw(self) -> "Buffer":
        """Its bytes, uint8 [nbytes], as a view."""
        return self.part(0, (self.nbytes,), "uint8")

    def __getitem__(self, index: int) -> "Buffer":
        """Row ``index`` along the first axis, as a view."""
        assert 0 <= index < self.shape[0]
        return Buffer(self.address + index * (self.nbytes // self.shape[0]), self.shape[1:], self.dtype, self.owner)


def from_bytes(raw: np.ndarray, dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    """Array of ``shape`` from its bytes (uint8, owned); bfloat16, a float32's upper half, is widened to float32."""
    if dtype != "bfloat16":
        return raw.view(dtype).reshape(shape)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)


class Backend(ABC):
    """Executes the graphs of one bundle. Use as a context manager; buffers die with their last reference."""

    name: str
    device: str
    """The device in words, for reports."""
    captures = False
    """Whether :meth:`capture` records the calls, so that running them again costs one launch."""
    library = ""
    """What computes, with its version."""
    driver = ""
    """The GPU's driver; on a CPU the CPU itself."""
    engines: str | None = None
    """SHA-256 over those of the engine files in use; None where the graphs themselves are run."""
    records: Sequence[EngineRecord] = ()
    """What the bundle says of the engine files in use."""

    @property
    def machine(self) -> Machine:
        """All that a result of this backend depends on besides the bundle."""
        return Machine(
            backend=self.name, device=self.device, driver=self.driver, library=self.library, engines=self.engines
        )

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """Allocate uninitialized memory."""

    @abstractmethod
    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy a host array of the buffer's very shape and dtype (float32, int64 or bool) into it."""

    def host_view(self, buffer: Buffer) -> np.ndarray | None:
        """The buffer itself as an array, where the host can write to it between calls; else ``None``."""
        return None

    @abstractmethod
    def read(self, buffer: Buffer) -> np.ndarray:
        """Wait for queued work and return a host copy (a bfloat16 buffer comes back as float32)."""

    def staging(self, buffer: Buffer) -> np.ndarray:
        """A host array to :meth:`fetch` ``buffer`` into again and again; page-locked where copies are faster so."""
        view = self.host_view(buffer)
        return np.empty(buffer.shape, buffer.dtype) if view is None else view

    def fetch(self, buffer: Buffer, staged: np.ndarray) -> None:
        """Wait for queued work; the contents of ``buffer`` are then in ``staged``, which is of :meth:`staging`."""
        if self.host_view(buffer) is None:
            staged[...] = self.read(buffer)

    @abstractmethod
    def bind(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """Bind ``graph`` to buffers, loading it on first use, and return the call that runs it."""

    @abstractmethod
    def copy(self, target: Buffer, source: Buffer) -> None:
        """Queue a copy within the device between buffers of equal shape and dtype, views included.

        They must not overlap.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    @abstractmethod
    def close(self) -> None:
        """Release sessions, engines and streams."""

    def capture(self, calls: Sequence[Call]) -> Call:
        """One call for ``calls`` in their order.

        A backend may record them here and replay the record: shapes and addresses are then frozen, contents are not.
        It runs them first if one has not run yet, so they must compute the same when repeated. Raises
        :class:`CaptureError` where that is refused; ``calls`` and the backend work on as before.
        """
        return partial(run_in_order, tuple(calls))

    def upload(self, array: np.ndarray) -> Buffer:
        """Allocate a buffer for ``array`` and copy it there."""
        buffer = self.empty(array.shape, str(array.dtype))  # type: ignore[arg-type]
        self.write(buffer, array)
        return buffer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_in_order(calls: Sequence[Call]) -> None:
    """Call each of ``calls``."""
    for call in calls:
        call()
