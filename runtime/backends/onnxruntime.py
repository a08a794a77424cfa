"""ONNX Runtime backend: the graphs of the bundle as they are, on the CPU or by the CUDA execution provider.

Every graph is one session, loaded on first use; every binding is one ``IOBinding`` on fixed addresses, so that a call
moves no tensor and allocates no output. All sessions share one CPU arena: the graphs run one after another, and
arenas of their own would add up.
"""

import os
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from stiv_deploy.runtime.backends.base import ITEM_BYTES, Backend, Buffer, Call, from_bytes
from stiv_deploy.runtime.backends.cuda import count_gpus, no_such_gpu
from stiv_deploy.runtime.backends.onnxruntime_int8 import keep_products_exact
from stiv_deploy.runtime.backends.onnxruntime_memory import DeviceMemory, HostMemory, Where, execution_providers
from stiv_deploy.runtime.bundle.bundle import AGAIN, Bundle
from stiv_deploy.runtime.bundle.contract import DType, Format, Precision
from stiv_deploy.runtime.errors import BackendError, BundleError, StivError

THREADS_VARIABLE = "STIV_THREADS"
ONNX_TYPES: dict[DType, int] = {"float32": 1, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
"""``TensorProto.DataType`` numbers, without importing onnx."""
ERRORS_ONLY = 3
DAMAGED = (
    ort_errors.InvalidProtobuf,
    ort_errors.InvalidGraph,
    ort_errors.NoSuchFile,
    ort_errors.NoModel,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
)


def unavailable_reason(where: Where, device: int = 0) -> str | None:
    """Why ONNX Runtime cannot run there on ``device``, in one line; ``None`` if it can."""
    if where == "cpu":
        return (
            None if device == 0 else f"it runs on the CPU, device {device} is a GPU: name no device, or a GPU backend"
        )
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime has no CUDA execution provider; install the 'gpu' extra (onnxruntime-gpu)"
    count = count_gpus()
    if count is not None and device >= count:
        return no_such_gpu(device, count)
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, "cuda", device)
    except Exception as error:  # a pybind RuntimeError whose text is the driver's
        return f"CUDA cannot be used ({str(error).splitlines()[0]})"
    return None


def thread_count(threads: int | None) -> int:
    """``threads``, or ``STIV_THREADS``, or 0 for all cores; :class:`BackendError` if that is not a whole number."""
    text = os.environ.get(THREADS_VARIABLE, "0") if threads is None else str(threads)
    if not text.isdecimal():
        raise BackendError(f"the number of threads must be a whole number, 0 for all cores; got {text!r}")
    return int(text)


@cache
def _share_arena() -> None:
    """Register the process's one CPU arena, which grows by what is asked for instead of by powers of two."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    unlimited, same_as_requested, default = 0, 1, -1
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(unlimited, same_as_requested, default, default))


def set_quantization(options: ort.SessionOptions, quantization: Format | None, precision: Precision) -> None:
    """Options that a quantized graph needs, by its 8-bit format and the type of everything else.

    INT8 among float32 becomes integer products. FP8 is simulated, as is INT8 among half precision, for which ONNX
    Runtime (1.31) has no kernels: there its own handling of Q/DQ would move FP8 into operators that cannot take it, so
    that the graph does not load, and would dequantize the weights in every call instead of once.
    """
    if quantization == "int8" and precision == "float32":
        keep_products_exact(options)
    elif quantization is not None:
        options.add_session_config_entry("session.disable_quant_qdq", "1")


def session_options(
    threads: int, quantization: Format | None = None, precision: Precision = "float32"
) -> ort.SessionOptions:
    """Options of all sessions: ``threads`` CPU threads (0: all cores), quiet, memory kept from growing with shapes."""
    options = ort.SessionOptions()
    set_quantization(options, quantization, precision)
    options.log_severity_level = ERRORS_ONLY
    options.enable_mem_pattern = False  # caches a plan for every shape ever seen
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.intra_op_num_threads = threads
    # Every session has its own threads (a pool shared by the process would be forced on its other sessions too), and
    # those of a graph that is done must not spin beside those of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class OnnxRuntimeBackend(Backend):
    """Runs a bundle in ONNX Runtime, on the CPU or on GPU ``device``. Calls are synchronous."""

    def __init__(self, bundle: Bundle, where: Where = "cpu", threads: int | None = None, device: int = 0) -> None:
        self.name = "onnxruntime" if where == "cpu" else "onnxruntime-cuda"
        self.device = f"CPU ({os.cpu_count()} cores)" if where == "cpu" else f"CUDA device {device}"
        self._bundle = bundle
        self._where, self._index = where, device
        _share_arena()
        record = bundle.manifest.quantization
        self._options = session_options(
            thread_count(threads), None if record is None else record.format, bundle.manifest.precision
        )
        self._sessions: dict[str, ort.InferenceSession] = {}

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """Allocate uninitialized memory."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype]
        memory = HostMemory(nbytes) if self._where == "cpu" else DeviceMemory(nbytes, self._where, self._index)
        return Buffer(memory.address, tuple(shape), dtype, memory)

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy a host array of the buffer's very shape and dtype into it."""
        assert array.shape == buffer.shape, (array.shape, buffer.shape)
        assert array.dtype == buffer.dtype, (array.dtype, buffer.dtype)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        buffer.owner.write(buffer.address - buffer.owner.address, data)

    def host_view(self, buffer: Buffer) -> np.ndarray | None:
        """The buffer itself on the CPU, where calls have ended when they return; ``None`` for bfloat16."""
        raw: np.ndarray | None = buffer.owner.raw
        if raw is None or buffer.dtype == "bfloat16":
            return None
        start = buffer.address - buffer.owner.address
        return raw[start : start + buffer.nbytes].view(buffer.dtype).reshape(buffer.shape)

    def read(self, buffer: Buffer) -> np.ndarray:
        """Return a host copy (bfloat16 as float32)."""
        raw = buffer.owner.read(buffer.address - buffer.owner.address, buffer.nbytes)
        return from_bytes(raw, buffer.dtype, buffer.shape)

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Copy between buffers of equal shape and dtype that do not overlap."""
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        start = source.address - source.owner.address
        target.owner.copy(target.address - target.owner.address, source.owner, start, source.nbytes)

    def bind(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """Bind ``graph`` to buffers, loading it on first use, and return the call that runs it.

        Raises :class:`BundleError` if its file is damaged, :class:`BackendError` if it cannot run on this device.
        """
        session = self._session(graph)
        binding = session.io_binding()
        where = self._where, self._index
        for name, buffer in inputs.items():
            binding.bind_input(name, *where, ONNX_TYPES[buffer.dtype], buffer.shape, buffer.address)
        for name, buffer in outputs.items():
            binding.bind_output(name, *where, ONNX_TYPES[buffer.dtype], buffer.shape, buffer.address)
        return partial(_run, session, binding, graph, (*inputs.values(), *outputs.values()))

    def synchronize(self) -> None:
        """Nothing to wait for: calls return when their work is done."""

    def close(self) -> None:
        """Release the sessions; bound calls keep theirs until they die."""
        self._sessions.clear()

    def _session(self, graph: str) -> ort.InferenceSession:
        if graph not in self._sessions:
            self._sessions[graph] = self._load(self._bundle.graph_file(graph))
        return self._sessions[graph]

    def _load(self, path: Path) -> ort.InferenceSession:
        try:
            providers = execution_providers(self._where, self._index)
            session = ort.InferenceSession(str(path), self._options, providers=providers, enable_fallback=0)
        except ort_errors.NotImplemented as error:
            manifest = self._bundle.manifest
            option = "--precision" if manifest.quantization is None else "--activations"
            raise BackendError(
                f"{path}: {self.name} cannot run this {manifest.precision} graph ({_first_line(error)}); "
                f"export with '{option} float32', or use another backend"
            ) from None
        except DAMAGED as error:
            raise BundleError(
                f"{path}: not a graph that ONNX Runtime can load ({_first_line(error)}); {AGAIN}"
            ) from None
        if self._where == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise BackendError(
                f"{path}: ONNX Runtime fell back to the CPU; check the CUDA installation with 'stiv doctor'"
            )
        return session


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def _run(session: ort.InferenceSession, binding: Any, graph: str, _alive: tuple[Buffer, ...]) -> None:
    """Run a binding. ``_alive`` are its buffers, which the binding knows by address only."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # pybind exception types differ by fault; the text is what tells
        raise StivError(f"graph {graph} failed in ONNX Runtime: {_first_line(error)}") from error
