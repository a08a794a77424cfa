"""Stand-ins for TensorRT and CUDA: device memory in host memory, and engines that run their graph in ONNX Runtime.

What a stand-in cannot show (that real engines compute the right thing) is in ``tests/gpu``.
"""

# ruff: noqa: N802, N815 - the names are CUDA's and TensorRT's

import ctypes
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from stiv_deploy.runtime.backends.cuda import Cuda
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend
from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, write_manifest
from stiv_deploy.runtime.bundle.engine_files import graph_hash, graph_profile
from stiv_deploy.runtime.bundle.manifest import EngineRecord

VERSION = "1.7.1"
OK, OUT_OF_MEMORY, INVALID_HANDLE, NOT_SUPPORTED, CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 0, 2, 400, 801, 900, 901
FAULTS = {
    INVALID_HANDLE: ("cudaErrorInvalidResourceHandle", "invalid resource handle"),
    OUT_OF_MEMORY: ("cudaErrorMemoryAllocation", "out of memory"),
    NOT_SUPPORTED: ("cudaErrorNotSupported", "operation not supported"),
    CAPTURE_UNSUPPORTED: ("cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"),
    CAPTURE_INVALIDATED: ("cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error"),
}
ORT_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


class FakeCudart:
    """``cuda.bindings.runtime`` over host memory. Queued work runs at once, or is recorded while capturing.

    Every thread has a GPU of its own choice, at first 0. Its use there costs a context, which is noted, and a stream
    takes work from threads that have chosen the stream's GPU.
    """

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )

    def __init__(self, sm: tuple[int, int] = (8, 9), limit: int = 1 << 30, gpus: int = 1) -> None:
        self.sm, self.gpus = sm, gpus
        self.chosen = threading.local()
        self.contexts: set[int] = set()
        self.limit = limit
        self.pinned: dict[int, ctypes.Array] = {}
        self.pinned_limit = 1 << 30
        self.fetched: list[tuple[int, bool]] = []
        """Bytes of every copy to the host, and whether that went to page-locked memory."""
        self.memory: dict[int, ctypes.Array] = {}
        self.streams: dict[int, int] = {}
        """GPU by stream."""
        self.handles = itertools.count(77)
        self.calls: list[str] = []
        self.captured: list[Callable[[], None]] | None = None
        self.spoilt = False
        """Whether the capture that is on has met something that cannot be captured."""
        self.last_error = OK
        self.refuse_graphs = False

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and name not in ("cudaGetErrorName", "cudaGetErrorString"):
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def cudaGetDeviceCount(self) -> tuple:
        return OK, self.gpus

    def cudaSetDevice(self, index: int) -> tuple:
        assert 0 <= index < self.gpus
        self.chosen.gpu = index
        return (OK,)

    def gpu(self) -> int:
        """The calling thread's GPU, which is about to be used."""
        gpu = getattr(self.chosen, "gpu", 0)
        self.contexts.add(gpu)
        return gpu

    def takes(self, stream: int) -> bool:
        return self.streams[stream] == self.gpu()

    def cudaDeviceGetAttribute(self, attribute: str, index: int) -> tuple:
        return OK, self.sm[attribute == "minor"]

    def cudaGetDeviceProperties(self, index: int) -> tuple:
        return OK, SimpleNamespace(name=b"Fake GPU\0\0")

    def cudaGetErrorName(self, status: int) -> tuple:
        return OK, FAULTS[status][0].encode()

    def cudaGetErrorString(self, status: int) -> tuple:
        return OK, FAULTS[status][1].encode()

    def cudaGetLastError(self) -> tuple:
        status, self.last_error = self.last_error, OK
        return (status,)

    def spoil(self) -> int:
        """What is not allowed while capturing, from any thread: it fails, and the capture with it."""
        self.spoilt = True
        return self.fault(CAPTURE_UNSUPPORTED)

    def fault(self, status: int) -> int:
        self.last_error = status
        return status

    def cudaMalloc(self, size: int) -> tuple:
        if self.captured is not None:
            return self.spoil(), None
        self.gpu()
        if sum(map(len, self.memory.values())) + size > self.limit:
            return self.fault(OUT_OF_MEMORY), None
        block = (ctypes.c_uint8 * (size + 256))()
        address = -(-ctypes.addressof(block) // 256) * 256  # cudaMalloc aligns to 256 bytes
        self.memory[address] = block
        return OK, address

    def cudaFree(self, address: int) -> tuple:
        if self.captured is not None:
            return (self.spoil(),)
        self.gpu()
        del self.memory[address]
        return (OK,)

    def cudaMallocHost(self, size: int) -> tuple:
        if sum(map(len, self.pinned.values())) + size > self.pinned_limit:
            return self.fault(OUT_OF_MEMORY), None
        block = (ctypes.c_uint8 * size)()
        self.pinned[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cudaFreeHost(self, address: int) -> tuple:
        del self.pinned[address]
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple:
        assert flags == self.cudaStreamNonBlocking
        stream = next(self.handles)
        self.streams[stream] = self.gpu()
        return OK, stream

    def cudaStreamDestroy(self, stream: int) -> tuple:
        del self.streams[stream]
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple:
        assert self.captured is None, "waiting is not allowed while capturing"
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple:
        if not self.takes(stream):
            return (self.fault(INVALID_HANDLE),)
        if kind == self.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            self.enqueue(lambda: ctypes.memmove(target, source, size))
        else:
            ctypes.memmove(target, source, size)
        if kind == self.cudaMemcpyKind.cudaMemcpyDeviceToHost:
            self.fetched.append((size, target in self.pinned))
        return (OK,)

    def touched(self, address: int, size: int, *, written: bool) -> None:
        """An engine has read, or written, ``size`` bytes at ``address``."""

    def enqueue(self, work: Callable[[], None]) -> None:
        work() if self.captured is None else self.captured.append(work)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple:
        self.captured, self.spoilt = [], False
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple:
        self.graph, self.captured = self.captured, None
        return (self.fault(CAPTURE_INVALIDATED), None) if self.spoilt else (OK, 5)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple:
        return (self.fault(NOT_SUPPORTED), None) if self.refuse_graphs else (OK, tuple(self.graph))

    def cudaGraphDestroy(self, graph: int) -> tuple:
        return (OK,)

    def cudaGraphExecDestroy(self, graph: tuple) -> tuple:
        if self.captured is not None:
            return (self.spoil(),)
        return (OK,)

    def cudaGraphLaunch(self, graph: tuple, stream: int) -> tuple:
        if not self.takes(stream):
            return (self.fault(INVALID_HANDLE),)
        for work in graph:
            work()
        return (OK,)


def fixed(tensor: Any) -> bool:
    """Whether an input has one shape only, as weights have, which nobody sets."""
    return all(isinstance(size, int) for size in tensor.shape)


class FakeContext:
    def __init__(self, engine: "FakeEngine") -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        self.profile: int | None = None
        self.set_up = False
        """Whether it has run since its shapes and its memory were set."""
        self.runs = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream in self.engine.library.cudart.streams
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "the profile comes before the shapes"
        self.shapes[name] = shape
        self.set_up = False
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0  # as TensorRT's header demands

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.shapes.keys() == {tensor.name for tensor in self.engine.session.get_inputs() if not fixed(tensor)}
        return self.engine.scratch

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.scratch
        self.memory = address, size
        self.set_up = False

    def execute_async_v3(self, stream: int) -> bool:
        cudart = self.engine.library.cudart
        if not cudart.takes(stream):
            return False
        if cudart.captured is not None and not self.set_up:
            cudart.spoilt = True  # it would set itself up now, which cannot be captured
            return False
        cudart.enqueue(self._run)
        return self.engine.library.launches

    def is_stream_capturable(self, stream: int) -> bool:
        cudart = self.engine.library.cudart
        assert cudart.captured is None
        assert cudart.takes(stream)
        return self.engine.graph not in self.engine.library.not_capturable

    def _run(self) -> None:
        assert self.memory is not None
        ctypes.memset(self.memory[0], 0xAB, self.engine.scratch)  # a freed arena would crash or be seen here
        assert self.memory[0] in self.engine.library.cudart.memory
        feed = {
            tensor.name: self._array(tensor.name, self.shapes.get(tensor.name, tensor.shape), ORT_TYPES[tensor.type])
            for tensor in self.engine.session.get_inputs()
        }
        outputs = self.engine.session.run(None, feed)
        for tensor, value in zip(self.engine.session.get_outputs(), outputs, strict=True):
            self._array(tensor.name, value.shape, value.dtype, written=True)[...] = value
        self.runs += 1
        self.set_up = True

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any, *, written: bool = False) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.engine.library.cudart.touched(self.addresses[name], size, written=written)
        raw = (ctypes.c_uint8 * size).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)


class FakeEngine:
    """The "plan" is the path of an ONNX file and how much scratch memory its contexts want."""

    def __init__(self, library: "FakeTensorRT", plan: bytes) -> None:
        graph, path, scratch = plan.decode().split("\n")
        self.library, self.graph, self.scratch = library, graph, int(scratch)
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.names = [tensor.name for tensor in (*self.session.get_inputs(), *self.session.get_outputs())]
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(library.profiles[graph])
        self.contexts: list[FakeContext] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_profile_shape(self, name: str, index: int) -> tuple:
        return self.library.profiles[self.graph][index][name]

    def create_runtime_config(self) -> SimpleNamespace:
        config = SimpleNamespace(strategy=None, cache=None)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        config.create_runtime_cache = self.library.make_cache
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        return config

    def create_execution_context(self, how: Any) -> FakeContext:
        self.library.context_settings.append(how)
        self.library.cudart.gpu()
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeTensorRT:
    """The part of the TensorRT module that the backend uses."""

    __version__ = VERSION
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    EngineInvalidityDiagnostics = SimpleNamespace(__members__={"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            self.severity = severity

    def __init__(self, cudart: FakeCudart, profiles: dict[str, list]) -> None:
        self.cudart, self.profiles = cudart, profiles
        self.loaded: list[FakeEngine] = []
        self.context_settings: list[Any] = []
        self.refuse = False
        self.launches = True
        self.not_capturable: set[str] = set()
        self.caches = 0

    def make_cache(self) -> str:
        self.caches += 1
        return "kernels"

    def Runtime(self, logger: Any) -> SimpleNamespace:
        return SimpleNamespace(
            deserialize_cuda_engine=self._load,
            get_engine_validity=lambda plan: (SimpleNamespace(name="INVALID"), 2),
        )

    def _load(self, plan: bytes) -> FakeEngine | None:
        self.cudart.gpu()
        if self.refuse:
            return None
        self.loaded.append(FakeEngine(self, plan))
        return self.loaded[-1]


def scratch_of(graph: str) -> int:
    """How much device memory the stand-in of ``graph`` wants: all different, ``head`` the most."""
    return {"head": 9000, "embed": 500}.get(graph, 1000 + len(graph))


def add_engines(folder: Path, sm: str = "89", backend: str = "tensorrt", version: str = VERSION) -> Path:
    """Write stand-in engines for every graph of a bundle and enter them in its manifest."""
    bundle = Bundle.open(folder)
    records = []
    for graph, record in bundle.manifest.graphs.items():
        path = f"engines/{backend}/{sm}/{graph}.engine"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"{graph}\n{folder / record.file.path}\n{scratch_of(graph)}")
        records.append(
            EngineRecord(
                graph=graph,
                bucket=bundle.manifest.buckets[0].name,
                backend=backend,  # type: ignore[arg-type]
                backend_version=version,
                sm=sm,
                file=file_record(folder, path),
                onnx=graph_hash(record),
                build_seconds=1.0,
            )
        )
    write_manifest(folder, bundle.manifest.model_copy(update={"engines": (*bundle.manifest.engines, *records)}))
    return folder


def open_backend(
    folder: Path, cudart: FakeCudart | None = None, flavour: str = "tensorrt", device: int = 0
) -> tuple[TensorRTBackend, FakeTensorRT]:
    """The backend on stand-ins for the bundle in ``folder``."""
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    profiles = {
        name: [graph_profile(manifest, name, bucket) for bucket in manifest.buckets] for name in manifest.graphs
    }
    cudart = cudart or FakeCudart()
    trt = FakeTensorRT(cudart, profiles)
    backend = TensorRTBackend(bundle, flavour, trt=trt, cuda=Cuda(cudart, device))  # type: ignore[arg-type]
    return backend, trt


@pytest.fixture
def stand_ins() -> SimpleNamespace:
    """The stand-ins and what makes them: ``cudart``, ``trt`` (classes), ``scratch_of``, ``add_engines``, ``open``."""
    return SimpleNamespace(
        cudart=FakeCudart, trt=FakeTensorRT, scratch_of=scratch_of, add_engines=add_engines, open=open_backend
    )


@pytest.fixture
def folder(own_bundle: Path) -> Path:
    """A toy bundle with a stand-in engine for every graph."""
    return add_engines(own_bundle)
