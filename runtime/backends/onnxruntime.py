"""ONNX Runtime backend: the graphs of the bundle as they are, on the CPU or by the CUDA execution provider.

Every graph is one session, loaded on first use; every binding is one ``IOBinding`` on fixed addresses, so that a call
moves no tensor and allocates no output. All sessions share one CPU arena: the graphs run one after another, and
arenas of their own would add up.
"""

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from stiv_deploy.runtime.backends.base import ITEM_BYTES, Backend, Buffer, Call, from_bytes
from stiv_deploy.runtime.backends.cuda import count_gpus, driver_version, no_such_gpu
from stiv_deploy.runtime.backends.onnxruntime_int8 import keep_products_exact
from stiv_deploy.runtime.backends.onnxruntime_memory import DeviceMemory, HostMemory, Where, execution_providers
from stiv_deploy.runtime.bundle.bundle import AGAIN, Bundle
from stiv_deploy.runtime.bundle.card import FP8_OPTION
from stiv_deploy.runtime.bundle.contract import DType, Format, GraphSpec, Precision, TensorSpec
from stiv_deploy.runtime.bundle.merging import Replacement, replacements
from stiv_deploy.runtime.errors import BackendError, BundleError, StivError, briefly, few, one_line

THREADS_VARIABLE = "STIV_THREADS"
THREADS_LIMIT = 1_024
"""Most threads that may be asked for; more than there are cores are not made, since every session has its own."""
ONNX_TYPES: dict[DType, int] = {"float32": 1, "uint8": 2, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
"""``TensorProto.DataType`` numbers, without importing onnx."""
SESSION_TYPES: dict[DType, str] = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
    "bool": "tensor(bool)",
    "uint8": "tensor(uint8)",
}
"""What a session calls them."""
GIB = 2**30
ERRORS_ONLY = 3
CPU_FILE, MACHINE = Path("/proc/cpuinfo"), platform.machine()
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
    """``threads``, or ``STIV_THREADS``, at most the cores of this machine; 0 for all of them.

    Raises :class:`BackendError` if that is not a whole number up to ``THREADS_LIMIT``.
    """
    given = os.environ.get(THREADS_VARIABLE, "0") if threads is None else briefly(threads)
    if not (given.isdecimal() and len(given) <= 6 and int(given) <= THREADS_LIMIT):
        raise BackendError(
            f"the number of threads must be a whole number up to {THREADS_LIMIT}, 0 for all cores; got "
            f"{one_line(given, 80)!r}"
        )
    return min(int(given), os.cpu_count() or 1)


@cache
def cpu_name() -> str:
    """The model of this machine's CPU, which decides which kernels are taken; else its architecture."""
    with suppress(OSError):
        lines = CPU_FILE.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((one_line(line.partition(":")[2], 100) for line in lines if line.startswith("model name")), MACHINE)
    return MACHINE


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
    that the graph does not load, and would dequantize the weights in every call instead of once. In NVFP4 the graphs
    are twins of standard operators, and need nothing.
    """
    if quantization == "int8" and precision == "float32":
        keep_products_exact(options)
    elif quantization in ("fp8", "int8"):
        options.add_session_config_entry(FP8_OPTION, "1")


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
    # Every session has its own threads: where a process has one pool for all, ONNX Runtime (1.31) refuses sessions that
    # want their own, which is the default, and with it what others run in the process. Those of a graph that is done
    # must not spin beside those of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class OnnxRuntimeBackend(Backend):
    """Runs a bundle in ONNX Runtime, on the CPU or on GPU ``device``. Calls are synchronous.

    ``threads`` are made as they are given, be they more than there are cores, 0 for all cores; None is for
    :func:`thread_count` to say.
    """

    def __init__(self, bundle: Bundle, where: Where = "cpu", threads: int | None = None, device: int = 0) -> None:
        self.name = "onnxruntime" if where == "cpu" else "onnxruntime-cuda"
        self.device = f"CPU ({os.cpu_count()} cores)" if where == "cpu" else f"CUDA device {device}"
        self.library = f"onnxruntime {ort.__version__}"
        self.driver = cpu_name() if where == "cpu" else driver_version()
        if not is_unicode(bundle.folder):
            raise BackendError(
                f"{bundle.folder}: ONNX Runtime reads no file below a name that is not Unicode; rename it"
            )
        self._bundle = bundle
        self._where, self._index = where, device
        _share_arena()
        record = bundle.manifest.quantization
        self._new_options = partial(
            session_options,
            thread_count(None) if threads is None else threads,
            None if record is None else record.format,
            bundle.manifest.precision,
        )
        self._options = self._new_options()
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._changed: dict[str, Mapping[str, Replacement]] = {}

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """Allocate uninitialized memory; :class:`BackendError` where there is not as much."""
        nbytes = prod(shape) * ITEM_BYTES[dtype]
        memory = self._memory(nbytes)
        return Buffer(memory.address, tuple(shape), dtype, memory)

    def _memory(self, nbytes: int) -> HostMemory | DeviceMemory:
        try:
            return HostMemory(nbytes) if self._where == "cpu" else DeviceMemory(nbytes, self._where, self._index)
        except (MemoryError, ValueError, TypeError, RuntimeError) as error:  # numpy's, and ONNX Runtime's of a device
            raise BackendError(
                f"{self.device} has no {nbytes / GIB:.1f} GiB for one buffer ({one_line(str(error), 200)}); ask for "
                "fewer clips at once, fewer frames or smaller ones"
            ) from None

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
        return partial(_run, session, binding, graph, (*inputs.values(), *outputs.values(), self._changed[graph]))

    def synchronize(self) -> None:
        """Nothing to wait for: calls return when their work is done."""

    def close(self) -> None:
        """Release the sessions; bound calls keep theirs until they die."""
        self._sessions.clear()

    def _session(self, graph: str) -> ort.InferenceSession:
        if graph not in self._sessions:
            path = self._bundle.graph_file(graph)
            self._changed[graph] = replacements(self._bundle, graph)
            session = self._load(path, self._options_with(self._changed[graph]))
            check_session(session, self._bundle.manifest.graphs[graph].spec, path)
            self._sessions[graph] = session
        return self._sessions[graph]

    def _options_with(self, changed: Mapping[str, Replacement]) -> ort.SessionOptions:
        """Those of all sessions, and ``changed`` weights, which the session reads where they are."""
        if not changed:
            return self._options
        options = self._new_options()
        options.add_external_initializers(
            list(changed),
            [ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values, kind) for values, kind in changed.values()],
        )
        return options

    def _load(self, path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        try:
            providers = execution_providers(self._where, self._index)
            session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
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


def is_unicode(path: Path) -> bool:
    """Whether a file's name can be given to a library that wants UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_session(session: ort.InferenceSession, spec: GraphSpec, path: Path) -> None:
    """:class:`BundleError` if the graph in ``path`` has other inputs or outputs than ``spec``."""
    for kind, found, wanted in (
        ("inputs", session.get_inputs(), spec.inputs),
        ("outputs", session.get_outputs(), spec.outputs),
    ):
        have = {each.name: (each.type, tuple(each.shape)) for each in found}
        faults = [each.name for each in wanted if not _fits(each, have.get(each.name))]
        faults += [name for name in have if name not in {each.name for each in wanted}]
        if faults:
            raise BundleError(
                f"{path}: another graph than the manifest says, its {kind} differ: {few(faults)}; {AGAIN}"
            )


def _fits(spec: TensorSpec, found: tuple[str, tuple[int | str | None, ...]] | None) -> bool:
    """Whether a tensor is of the type and rank of ``spec``, and of its sizes where both are numbers."""
    if found is None or found[0] != SESSION_TYPES[spec.dtype] or len(found[1]) != len(spec.shape):
        return False
    sizes = zip(found[1], spec.shape, strict=True)
    return all(have == want for have, want in sizes if isinstance(have, int) and isinstance(want, int))


def _first_line(error: Exception) -> str:
    return one_line((str(error).splitlines() or [type(error).__name__])[0], 200)


def _run(session: ort.InferenceSession, binding: Any, graph: str, _alive: tuple[object, ...]) -> None:
    """Run a binding. ``_alive`` are its buffers and changed weights, which the session knows by address only."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # pybind exception types differ by fault; the text is what tells
        raise StivError(f"graph {graph} failed in ONNX Runtime: {_first_line(error)}") from error
