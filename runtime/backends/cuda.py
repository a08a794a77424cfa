"""The few CUDA calls the TensorRT backend needs, every one checked; device memory that frees itself.

Imported without cuda-python; the library is loaded by :func:`load_cuda`.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from stiv_deploy.runtime.errors import BackendError, raise_interrupt

DRIVER_FILE = Path("/proc/driver/nvidia/version")
ALREADY_REACHED = 704
"""``cudaErrorPeerAccessAlreadyEnabled``."""
NOT_READY = 600
"""``cudaErrorNotReady``."""
INSTALL = "pip install 'stiv-deploy[gpu]' (NVIDIA's package cuda-python)"


def load_cuda() -> Any:
    """CUDA's runtime API (``cuda.bindings.runtime``); :class:`BackendError` if cuda-python is not installed."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise_interrupt(error)
        raise BackendError(f"cuda-python is not installed ({error}); {INSTALL}") from None


def count_gpus() -> int | None:
    """How many GPUs CUDA sees; ``None`` where cuda-python is not there to ask, or the driver does not answer."""
    try:
        status, count = load_cuda().cudaGetDeviceCount()
    except (BackendError, RuntimeError):  # cuda-python raises when it cannot load the driver's library
        return None
    return int(count) if int(status) == 0 else None


def driver_version() -> str:
    """The driver of this machine's GPUs, by its own number or by CUDA's; empty where neither is told."""
    with suppress(OSError):
        words = DRIVER_FILE.read_text(encoding="utf-8", errors="replace").split()
        return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdecimal()), "")
    try:
        status, number = load_cuda().cudaDriverGetVersion()
    except (BackendError, RuntimeError):
        return ""
    return f"CUDA {number}" if int(status) == 0 else ""


def no_such_gpu(index: int, count: int) -> str:
    """That there is no GPU ``index`` among ``count``, in one line."""
    return f"there is no GPU {index}; CUDA sees {count}, counted from 0"


@dataclass(frozen=True)
class Device:
    """A GPU: its index, name, and compute capability without the dot, such as ``"89"``."""

    index: int
    name: str
    sm: str

    def __str__(self) -> str:
        return f"{self.index}: {self.name} (SM {self.sm})"


class Releases:
    """When finalizers may give back what CUDA lent: at once, or after the captures that are on.

    A ``cudaFree`` ends a capture of its own thread with a fault, and one of another thread waits for a device that is
    being recorded. Which thread drops a last reference, or runs the garbage collector, is not foreseeable: hence one
    instance for the process, and no collector, which might end objects of TensorRT as well, while a capture is on.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: a finalizer may run in the middle of these very methods
        self._captures = 0
        self._owed: list[Callable[[], object]] = []
        self._collecting = False

    def give_back(self, release: Callable[[], object]) -> None:
        """Call ``release``, now or at the end of the captures that are on; at any moment, from any thread."""
        with self._lock:
            if self._captures:
                self._owed.append(release)
            else:
                release()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold everything back inside the ``with`` block."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    def _begin(self) -> None:
        with self._lock:
            self._captures += 1
            if self._captures == 1:
                self._collecting = gc.isenabled()
                gc.disable()

    def _end(self) -> None:
        with self._lock:
            self._captures -= 1
            if self._captures:
                return
            if self._collecting:
                gc.enable()
            while self._owed:
                self._owed.pop(0)()


RELEASES = Releases()
"""That of this process."""


_THREAD = threading.local()
"""``chosen``: this thread was given a GPU here before, and keeps that one when a finalizer runs on it."""


class Cuda:
    """Checked calls on one GPU, from any thread. ``api`` is ``cuda.bindings.runtime`` or a stand-in for it.

    CUDA's choice of a GPU is the calling thread's, and another library may change it: every call makes it anew.
    """

    def __init__(self, api: Any | None = None, index: int = 0) -> None:
        self.api = load_cuda() if api is None else api
        count = int(self._checked("cudaGetDeviceCount"))
        if index >= count:
            raise BackendError(no_such_gpu(index, count))
        self._index = index
        self.device = self._describe(index)

    def use(self) -> None:
        """Make this GPU the calling thread's: where libraries that use CUDA themselves then work."""
        self._checked("cudaSetDevice", self._index)
        _THREAD.chosen = True

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a CUDA function and return its value; :class:`BackendError` with function, code and meaning."""
        self.use()
        return self._checked(function, *arguments)

    def _checked(self, function: str, *arguments: Any) -> Any:
        try:
            status, *values = getattr(self.api, function)(*arguments)
        except RuntimeError as error:  # cuda-python raises when it cannot load the driver's library
            raise BackendError(f"{function} failed: {error}") from None
        if int(status) != 0:
            _, name = self.api.cudaGetErrorName(status)
            _, meaning = self.api.cudaGetErrorString(status)
            self.forget_error()
            raise BackendError(f"{function} failed: {_text(name)} ({_text(meaning)})")
        return values[0] if values else None

    def forget_error(self) -> None:
        """Clear CUDA's note of the last fault, which the next library that asks would take for its own."""
        self.api.cudaGetLastError()

    def _describe(self, index: int) -> Device:
        attribute = self.api.cudaDeviceAttr
        major = self._checked("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, index)
        minor = self._checked("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, index)
        name = _text(self._checked("cudaGetDeviceProperties", index).name)
        return Device(index, name.rstrip("\0"), f"{int(major)}{int(minor)}")

    def allocate(self, size: int) -> "Memory":
        """``size`` bytes of device memory, at least one."""
        return Memory(self, max(size, 1))

    def pinned(self, size: int) -> "PinnedMemory":
        """``size`` bytes of page-locked host memory, at least one."""
        return PinnedMemory(self, max(size, 1))

    def release_with(self, owner: object, function: str, handle: Any) -> None:
        """Give ``handle`` back by ``function`` when ``owner`` dies, but not while a capture is on."""
        release = partial(self._release, function, handle)
        # not at interpreter exit: by then the libraries are half gone, and the driver frees everything anyway
        weakref.finalize(owner, RELEASES.give_back, release).atexit = False

    def _release(self, function: str, handle: Any) -> None:
        """What a finalizer does, maybe amid another GPU's work, which must find that GPU chosen afterwards.

        Memory and graphs may be given back whatever GPU is chosen. A thread that has none yet is given this one:
        CUDA would set up GPU 0 for it.
        """
        if not hasattr(_THREAD, "chosen"):
            self.use()
        self._checked(function, handle)

    def event(self) -> "Event":
        """A new event, to be recorded in a stream of this GPU and waited for in any."""
        return Event(self)

    def reach(self, other: "Cuda") -> bool:
        """Let this GPU reach the memory of ``other`` without a way through the host, if both can; whether it does."""
        mine, theirs = self.device.index, other.device.index
        if mine == theirs or not int(self.call("cudaDeviceCanAccessPeer", mine, theirs)):
            return mine == theirs
        (status,) = self.api.cudaDeviceEnablePeerAccess(theirs, 0)
        if int(status) not in (0, ALREADY_REACHED):
            raise BackendError(f"GPU {mine} could not be let reach GPU {theirs} (CUDA error {int(status)})")
        self.forget_error()
        return True

    def stream(self) -> "Stream":
        """A new stream that does not wait for the default stream."""
        return Stream(self)


class Memory:
    """Device memory, freed with its last reference (``cudaFree`` waits for queued work that may use it)."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.size = size
        self.address = int(cuda.call("cudaMalloc", size))
        cuda.release_with(self, "cudaFree", self.address)


class PinnedMemory:
    """Page-locked host memory, which copies reach at full speed and without a stop on the way; freed as `Memory` is.

    ``numpy.asarray`` of it is its bytes, and keeps it.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.address = int(cuda.call("cudaMallocHost", size))
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }
        cuda.release_with(self, "cudaFreeHost", self.address)


class Event:
    """A point in a stream; waiting for it is waiting for all that was queued there before it was last recorded."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = cuda.call("cudaEventCreateWithFlags", cuda.api.cudaEventDisableTiming)
        cuda.release_with(self, "cudaEventDestroy", self.handle)

    @property
    def done(self) -> bool:
        """Whether all before it is; any but "not yet" of CUDA's answers ends the waiting for it."""
        self._cuda.use()
        (status,) = self._cuda.api.cudaEventQuery(self.handle)
        return int(status) != NOT_READY


@dataclass(frozen=True)
class Region:
    """Planes of runs of bytes in the memory of GPU ``device``, for a copy.

    ``pitch`` bytes lie from one run to the next, and ``runs`` of these from one plane to the next.
    """

    device: int
    address: int
    pitch: int
    runs: int


class Stream:
    """A CUDA stream: copies, waiting, and capture into CUDA graphs. ``handle`` is what other libraries take."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._stream = cuda.call("cudaStreamCreateWithFlags", cuda.api.cudaStreamNonBlocking)
        self.handle = int(self._stream)
        self.waited: Callable[[], None] = _nothing
        """Called when the host has waited for this stream; raises if what was queued has been ended before its end."""

    def use_device(self) -> None:
        """Make this stream's GPU the calling thread's."""
        self._cuda.use()

    def copy_in(self, address: int, array: np.ndarray) -> None:
        """Queue a copy of a contiguous host array to ``address``.

        The array may be reused when this returns: from pageable memory, which numpy's is, CUDA stages it first.
        """
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._cuda.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def copy_out(self, array: np.ndarray, address: int) -> None:
        """Fill a contiguous host array from ``address`` and wait until it is there."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._cuda.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)
        self.synchronize()

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy of ``size`` bytes within the device."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._cuda.call("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def record(self, event: Event) -> None:
        """Let ``event`` be this point."""
        self._cuda.call("cudaEventRecord", event.handle, self._stream)

    def wait(self, event: Event) -> None:
        """Queue nothing more before ``event``, as it was last recorded, wherever that was."""
        self._cuda.call("cudaStreamWaitEvent", self._stream, event.handle, 0)

    def copy_across(self, target: Region, source: Region, width: int, height: int, depth: int) -> None:
        """Queue a copy of ``depth`` planes of ``height`` runs of ``width`` bytes between GPUs, or within one."""
        api, asked = self._cuda.api, self._cuda.api.cudaMemcpy3DPeerParms()
        asked.srcDevice, asked.dstDevice = source.device, target.device
        asked.srcPtr, asked.dstPtr = (
            api.make_cudaPitchedPtr(each.address, each.pitch, each.pitch, each.runs) for each in (source, target)
        )
        asked.extent = api.make_cudaExtent(width, height, depth)
        self._cuda.call("cudaMemcpy3DPeerAsync", asked, self._stream)

    def synchronize(self) -> None:
        """Wait until all work queued here is done."""
        self._cuda.call("cudaStreamSynchronize", self._stream)
        self.waited()

    def capture(self, queue: Callable[[], None]) -> "Graph":
        """Record, rather than run, what ``queue`` queues here, as a launchable graph.

        Whatever ``queue`` raises, or :class:`BackendError` for a fault of CUDA, leaves the stream as it was.
        """
        with RELEASES.held():
            mode = self._cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            self._cuda.call("cudaStreamBeginCapture", self._stream, mode)
            try:
                queue()
            except BaseException:
                self._abandon_capture()
                raise
            return Graph(self._cuda, self._stream, self._cuda.call("cudaStreamEndCapture", self._stream))

    def _abandon_capture(self) -> None:
        """Stop recording after a fault and drop what was recorded."""
        _, graph = self._cuda.api.cudaStreamEndCapture(self._stream)
        if graph is not None and int(graph):
            self._cuda.call("cudaGraphDestroy", graph)
        self._cuda.forget_error()

    def close(self) -> None:
        """Wait for queued work and destroy the stream."""
        self._cuda.call("cudaStreamSynchronize", self._stream)
        self._cuda.call("cudaStreamDestroy", self._stream)


class Graph:
    """An instantiated CUDA graph; calling it queues one launch on the stream it was captured from."""

    def __init__(self, cuda: Cuda, stream: Any, graph: Any) -> None:
        self._cuda, self._stream = cuda, stream
        try:
            self._executable = cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            cuda.call("cudaGraphDestroy", graph)
        cuda.release_with(self, "cudaGraphExecDestroy", self._executable)

    def __call__(self) -> None:
        """Queue one launch."""
        self._cuda.call("cudaGraphLaunch", self._executable, self._stream)


def try_capture(cuda: Cuda) -> None:
    """Capture one small copy and replay it; :class:`BackendError` says what CUDA has against graphs here."""
    stream, target, source = cuda.stream(), cuda.allocate(1), cuda.allocate(1)
    try:
        stream.capture(partial(stream.copy, target.address, source.address, 1))()
    finally:
        stream.close()


def _nothing() -> None:
    """What there is to do after a wait for a stream that works alone."""


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
