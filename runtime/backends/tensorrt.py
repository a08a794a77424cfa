"""Runs a bundle's TensorRT or TensorRT-RTX engines on one GPU.

Graphs run one after another on one stream, so that all their contexts work in one arena of device memory, as large as
the largest needs. Binding sets shapes and addresses once; a call then only launches, so that a sequence of calls can
be captured into a CUDA graph (:meth:`TensorRTBackend.capture`).
"""

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from stiv_deploy.runtime.backends.base import ALIGNMENT, ITEM_BYTES, Backend, Buffer, Call, from_bytes, run_in_order
from stiv_deploy.runtime.backends.cuda import Cuda, Graph, Memory, Stream, driver_version, load_cuda, try_capture
from stiv_deploy.runtime.backends.device_weights import DeviceWeights, check_loras, load_weights
from stiv_deploy.runtime.backends.engine_choice import (
    build_command,
    check_engine,
    check_plugin_library,
    engine_records,
    same_again,
)
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import DType
from stiv_deploy.runtime.bundle.engine_files import buckets_holding, engines_hash, unbuilt
from stiv_deploy.runtime.bundle.manifest import EngineRecord
from stiv_deploy.runtime.errors import BackendError, CaptureError, EngineError
from stiv_deploy.runtime.plugins.tensorrt_plugins import load_plugins, plugin_library
from stiv_deploy.runtime.tensorrt_library import TITLES, Flavour, import_tensorrt, missing_library

Shapes = dict[str, tuple[int, ...]]
log = logging.getLogger(__name__)


def unavailable_reason(flavour: Flavour, device: int = 0) -> str | None:
    """Why engines of ``flavour`` cannot run on GPU ``device`` here, in one line; ``None`` if they can."""
    missing = missing_library(flavour)
    if missing is not None:
        return missing
    try:
        Cuda(load_cuda(), device)
    except BackendError as error:
        return f"no usable NVIDIA GPU: {error}"
    return None


def graph_reason(flavour: Flavour, device: int = 0) -> str | None:
    """Why engines of ``flavour`` will not run as CUDA graphs on GPU ``device``; ``None`` if CUDA captures a trial here.

    What an engine says of itself is known when it is captured.
    """
    reason = unavailable_reason(flavour, device)
    if reason is not None:
        return reason
    try:
        try_capture(Cuda(load_cuda(), device))
    except BackendError as error:
        return str(error)
    return None


class Arena:
    """Device memory that all contexts take turns to work in; it only grows."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.memory: Memory | None = None
        self.generation = 0
        """Counts the times the memory was replaced."""

    def reserve(self, size: int) -> None:
        """Make the arena at least ``size`` bytes. Contexts attach the new memory before they next run."""
        if self.memory is None or self.memory.size < size:
            self.memory = None  # free the old memory first (cudaFree waits for its users), so that both never coexist
            self.memory = self._cuda.allocate(size)
            self.generation += 1


@dataclass
class LoadedEngine:
    """A deserialized engine, where it came from, and its execution contexts that no live binding uses."""

    record: EngineRecord
    engine: Any
    idle: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Twin:
    """Aligned memory that an engine uses in place of a view that is not."""

    buffer: Buffer
    aligned: Memory


class BoundGraph:
    """An execution context with all shapes and addresses set; calling it queues one run.

    ``twins`` of inputs are filled before it, those of outputs copied back after it.
    """

    def __init__(
        self, name: str, context: Any, stream: Stream, arena: Arena, inputs: Sequence[Twin], outputs: Sequence[Twin]
    ) -> None:
        self.name = name
        self._context = context
        self._stream = stream
        self._arena = arena
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self.kept: tuple[object, ...] = ()
        """Buffers and weights that the context points into, kept alive with this binding."""
        self._generation = 0  # of the arena that the context knows; a reference to it would keep it from being freed

    @property
    def settled(self) -> bool:
        """Whether it has run in the arena as it is now."""
        return self._generation == self._arena.generation

    @property
    def capturable(self) -> bool:
        """What the library says of capturing this context; TensorRT, unlike RTX, is not asked."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._stream.handle))

    def __call__(self) -> None:
        """Queue one run."""
        self._stream.use_device()
        memory = self._arena.memory
        if memory is not None and not self.settled:
            self._context.set_device_memory(memory.address, memory.size)
            self._generation = self._arena.generation
        for twin in self._inputs:
            self._stream.copy(twin.aligned.address, twin.buffer.address, twin.buffer.nbytes)
        if not self._context.execute_async_v3(self._stream.handle):
            raise BackendError(f"graph {self.name}: the engine could not be launched")
        for twin in self._outputs:
            self._stream.copy(twin.buffer.address, twin.aligned.address, twin.buffer.nbytes)


class CapturedCalls:
    """Calls captured into one CUDA graph; calling it queues them all with one launch."""

    def __init__(self, graph: Graph, calls: Sequence[Call], memory: Memory | None) -> None:
        self._graph = graph
        self._kept = (tuple(calls), memory)  # the graph holds bare addresses into these

    def __call__(self) -> None:
        """Queue one replay."""
        self._graph()


class TensorRTBackend(Backend):
    """The engines of ``bundle`` for GPU ``device`` of this machine.

    Records are checked against the graphs, the library's version and the GPU before anything is deserialized; raises
    :class:`EngineError` with what differs and the command that mends it. The plugin library is loaded if one of the
    engines was built with it; :class:`BackendError` if it is not there. Weights that engines take as inputs are copied
    to the device once for each graph, the bundle's LoRAs merged in; :class:`~stiv_deploy.runtime.errors.LoraError`
    where these change weights that lie in an engine. ``trt`` and ``cuda`` are stand-ins for tests.
    """

    captures = True

    def __init__(
        self, bundle: Bundle, flavour: Flavour, device: int = 0, *, trt: Any | None = None, cuda: Cuda | None = None
    ) -> None:
        self.name = flavour
        self._bundle = bundle
        self._flavour: Flavour = flavour
        self._trt = import_tensorrt(flavour) if trt is None else trt
        self._cuda = Cuda(index=device) if cuda is None else cuda
        self._cuda.use()
        gpu = self._cuda.device
        self.device = f"{gpu.name} (SM {gpu.sm})"
        self._records = self._checked_records(gpu.sm)
        self.library = f"{TITLES[flavour]} {self._trt.__version__}"
        self.driver = driver_version()
        self.records = tuple(self._records.values())
        check_loras(bundle, self.records)
        self.engines = engines_hash(self.records)
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._logger)
        self._load_plugins()
        self._stream = self._cuda.stream()
        self._arena = Arena(self._cuda)
        self._engines: dict[str, LoadedEngine] = {}
        self._weights: dict[tuple[str, tuple[str, ...]], DeviceWeights] = {}
        self._kernels: Any | None = None
        self._closed = False

    def _checked_records(self, sm: str) -> dict[tuple[str, str], EngineRecord]:
        """Engine records by graph and bucket; every graph must have one for at least one bucket, blocks or halves."""
        manifest = self._bundle.manifest
        records = engine_records(manifest, self._flavour, sm)
        for record in records:
            check_engine(record, manifest, self._trt.__version__)
        missing = unbuilt(manifest, {record.graph for record in records})
        if missing:
            remedy = build_command(self._flavour, records[0].sm)
            raise EngineError(f"no {TITLES[self._flavour]} engine for {', '.join(missing)}; {remedy}")
        return {(record.graph, record.bucket): record for record in records}

    def _load_plugins(self) -> None:
        """Register the plugin library, if engines need it and it is the one that they were built with."""
        needing = [record for record in self._records.values() if record.plugins is not None]
        if not needing:
            return
        try:
            library = plugin_library()
        except BackendError as error:
            raise BackendError(f"engine {needing[0].file.path} was built with plugins: {error}") from None
        for record in needing:
            check_plugin_library(record, self._bundle.manifest, library)
        load_plugins(self._trt, library)

    def _record_for(self, graph: str, shapes: Shapes) -> EngineRecord:
        """The engine of ``graph`` whose bucket allows ``shapes``."""
        buckets = buckets_holding(self._bundle.manifest, graph, shapes)
        for bucket in buckets:
            if (graph, bucket) in self._records:
                return self._records[graph, bucket]
        have = ", ".join(sorted(bucket for name, bucket in self._records if name == graph))
        if not have:
            raise EngineError(
                f"no {TITLES[self._flavour]} engine for {graph}; {build_command(self._flavour, self._cuda.device.sm)}"
            )
        sizes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
        raise EngineError(
            f"graph {graph} has engines for the buckets {have}, not for {sizes} "
            f"(it lies in {', '.join(buckets) or 'no bucket'}); {build_command(self._flavour, self._cuda.device.sm)}"
        )

    def _load(self, record: EngineRecord) -> LoadedEngine:
        """Deserialize on first use."""
        loaded = self._engines.get(record.file.path)
        if loaded is None:
            plan = self._bundle.verified(record.file).read_bytes()
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                remedy = same_again(record, self._bundle.manifest, self._cuda.device.sm)
                raise EngineError(
                    f"{record.file.path}: {TITLES[self._flavour]} {self._trt.__version__} refused this engine on "
                    f"{self.device}{self._validity(plan)}; {remedy}"
                )
            loaded = self._engines[record.file.path] = LoadedEngine(record, engine)
        return loaded

    def _weights_of(self, record: EngineRecord) -> DeviceWeights | None:
        """What the engine takes besides its graph's inputs, copied to the device on first use; None if nothing."""
        if not record.weights:
            return None
        key = record.graph, record.weights
        if key not in self._weights:
            self._weights[key] = load_weights(self._cuda, self._stream, self._bundle, record)
        return self._weights[key]

    def _validity(self, plan: bytes) -> str:
        """What the library says of a plan it refused (RTX only), for the error's text."""
        check = getattr(self._runtime, "get_engine_validity", None)
        if check is None:
            return ""
        verdict, diagnostics = check(plan)
        names = self._trt.EngineInvalidityDiagnostics.__members__
        reasons = [name for name, flag in names.items() if int(flag) and int(flag) & int(diagnostics)]
        return f" ({getattr(verdict, 'name', verdict)}{': ' if reasons else ''}{', '.join(reasons)})"

    def _profile_index(self, loaded: LoadedEngine, shapes: Shapes) -> int:
        """The engine's first optimization profile that allows ``shapes``."""
        for index in range(loaded.engine.num_optimization_profiles):
            if all(
                _within(loaded.engine.get_tensor_profile_shape(name, index), shape) for name, shape in shapes.items()
            ):
                return index
        raise EngineError(
            f"{loaded.record.file.path}: no optimization profile allows the shapes {shapes}; "
            f"{same_again(loaded.record, self._bundle.manifest)} --rebuild"
        )

    def _context(self, loaded: LoadedEngine) -> Any:
        """An idle context of the engine, or a new one that owns no device memory."""
        if loaded.idle:
            return loaded.idle.pop()
        context = loaded.engine.create_execution_context(self._context_settings(loaded.engine))
        if context is None:
            raise BackendError(f"graph {loaded.record.graph}: no execution context could be made on {self.device}")
        return context

    def _context_settings(self, engine: Any) -> Any:
        """No own device memory; on RTX also one cache of run-time compiled kernels, which equal blocks share.

        RTX compiles kernels for the very shapes, by default in the background and in use as soon as they are done:
        then two runs would not be one computation, and a captured graph would keep the makeshift. Here the first run
        of a binding waits for them.
        """
        user_managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._trt, "IRuntimeCache"):
            return user_managed
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(user_managed)
        if self._kernels is None:
            self._kernels = config.create_runtime_cache()
        config.set_runtime_cache(self._kernels)
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        return config

    def _twins(self, buffers: Mapping[str, Buffer]) -> dict[str, Twin]:
        """Aligned stand-ins for those of ``buffers`` that engines cannot take as they are."""
        return {
            name: Twin(buffer, self._cuda.allocate(buffer.nbytes))
            for name, buffer in buffers.items()
            if buffer.address % ALIGNMENT
        }

    def _prepare(self, graph: str, context: Any, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        """Select the profile, set shapes and addresses, and reserve the device memory the context asks for."""
        checked = [context.set_optimization_profile_async(profile, self._stream.handle)]
        checked += [context.set_input_shape(name, shape) for name, shape in shapes.items()]
        checked += [context.set_tensor_address(name, address) for name, address in addresses.items()]
        if not all(checked):
            raise EngineError(f"graph {graph}: the engine refused the shapes {shapes} or a buffer's address")
        self._arena.reserve(context.update_device_memory_size_for_shapes())

    def bind(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """Bind ``graph``; raises :class:`EngineError` if no engine allows these shapes."""
        self._cuda.use()
        shapes = {name: buffer.shape for name, buffer in inputs.items()}
        record = self._record_for(graph, shapes)
        loaded, weights = self._load(record), self._weights_of(record)
        buffers = {**inputs, **outputs}
        addresses = {name: buffer.address for name, buffer in buffers.items()} | (weights.addresses if weights else {})
        names = {loaded.engine.get_tensor_name(index) for index in range(loaded.engine.num_io_tensors)}
        if names != addresses.keys():
            raise EngineError(f"graph {graph}: the engine has tensors {sorted(names)}, bound are {sorted(addresses)}")
        profile = self._profile_index(loaded, shapes)
        ahead, after = self._twins(inputs), self._twins(outputs)
        aligned = {name: twin.aligned.address for name, twin in (ahead | after).items()}
        context = self._context(loaded)
        self._prepare(graph, context, profile, shapes, addresses | aligned)
        call = BoundGraph(graph, context, self._stream, self._arena, tuple(ahead.values()), tuple(after.values()))
        call.kept = (*buffers.values(), weights)
        # contexts are costly (RTX compiles its kernels for each), so the next request takes over a dead binding's
        weakref.finalize(call, loaded.idle.append, context).atexit = False
        return call

    def capture(self, calls: Sequence[Call]) -> Call:
        """One call that replays ``calls`` as a CUDA graph.

        Contexts set themselves up in their first run after a change of shapes or memory, which cannot be captured: if
        one has not had it, all run first. Shapes and addresses are frozen in the graph, buffers may be rewritten
        between replays. Raises :class:`CaptureError` if the library or CUDA refuses; the stream and ``calls`` work on
        as before.
        """
        bound = [call for call in calls if isinstance(call, BoundGraph)]
        if not all(call.settled for call in bound):
            run_in_order(calls)
        self.synchronize()
        refused = [call.name for call in bound if not call.capturable]
        if refused:
            raise CaptureError(f"{TITLES[self._flavour]} cannot capture {', '.join(refused)} into a CUDA graph")
        try:
            graph = self._stream.capture(partial(run_in_order, calls))
        except BackendError as error:
            raise CaptureError(f"no CUDA graph could be captured: {error}") from error
        return CapturedCalls(graph, calls, self._arena.memory)

    @property
    def cuda(self) -> Cuda:
        """This backend's GPU."""
        return self._cuda

    @property
    def stream(self) -> Stream:
        """Where all of this backend's work is queued."""
        return self._stream

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """Allocate with ``cudaMalloc``; freed with the last buffer that views it."""
        memory = self._cuda.allocate(int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype])
        return Buffer(memory.address, tuple(shape), dtype, memory)

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Queue a host-to-device copy on the engines' stream."""
        assert array.shape == buffer.shape
        assert str(array.dtype) == buffer.dtype
        self._stream.copy_in(buffer.address, np.ascontiguousarray(array))

    def read(self, buffer: Buffer) -> np.ndarray:
        """Copy to the host after all queued work; bfloat16 comes back as float32."""
        raw = np.empty(buffer.nbytes, np.uint8)
        self._stream.copy_out(raw, buffer.address)
        return from_bytes(raw, buffer.dtype, buffer.shape)

    def staging(self, buffer: Buffer) -> np.ndarray:
        """A page-locked host array for ``buffer``; an ordinary one where the system locks no more pages."""
        try:
            raw = np.asarray(self._cuda.pinned(buffer.nbytes))[: buffer.nbytes]
        except BackendError as error:
            log.info("an ordinary host buffer of %d bytes is taken: %s", buffer.nbytes, error)
            return np.empty(buffer.shape, buffer.dtype)
        return raw.view(buffer.dtype).reshape(buffer.shape)

    def fetch(self, buffer: Buffer, staged: np.ndarray) -> None:
        """Copy ``buffer`` to ``staged`` after all queued work, and wait for it."""
        assert (staged.shape, str(staged.dtype)) == (buffer.shape, buffer.dtype)
        self._stream.copy_out(staged, buffer.address)

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Queue a copy on the engines' stream between buffers of equal shape and dtype."""
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        self._stream.copy(target.address, source.address, source.nbytes)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def close(self) -> None:
        """Wait, then drop engines, contexts and the arena, and destroy the stream. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._stream.close()
        for loaded in self._engines.values():
            loaded.idle.clear()
        self._engines.clear()
        self._weights.clear()
        self._arena.memory = None


def _within(limits: Sequence[Sequence[int]], shape: Sequence[int]) -> bool:
    """Whether ``shape`` lies between the first and the last of a profile's shapes."""
    low, _, high = limits
    return len(low) == len(shape) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
