"""Compiles every graph of a bundle ahead of time and enters the engines in its manifest, all of them or none.

One builder process per distinct engine, some at a time; finished plans go to the plan cache, and into the bundle only
when every one is there. The manifest and the engine files are then replaced in one uninterruptible moment.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stiv_deploy.export.engines.install import commit, staged
from stiv_deploy.export.engines.job import BUILDER_REVISION, FLAGS_SET, EngineJob, Profile
from stiv_deploy.export.engines.plan_cache import CachedPlan, PlanCache, default_cache, plan_key
from stiv_deploy.export.engines.plugin_graphs import BuildAttention, Packaging, choose_packaging
from stiv_deploy.export.engines.processes import BuilderProcesses
from stiv_deploy.export.engines.shared_plan import choose_weight_inputs, first_of_form
from stiv_deploy.export.engines.weight_inputs import weight_inputs
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Format, Frozen, has_layer, is_block, is_half
from stiv_deploy.runtime.bundle.engine_files import (
    engine_path,
    graph_hash,
    graph_profile,
    reduced_for,
    shared_name,
    sm_folder,
    takes_tf32,
)
from stiv_deploy.runtime.bundle.manifest import HALVES_REMEDY, PORTABLE, Bucket, EngineRecord, FileRecord, Manifest
from stiv_deploy.runtime.errors import BackendError, EngineError, OutputError, few
from stiv_deploy.runtime.pipeline.limits import memory_bytes
from stiv_deploy.runtime.progress import Progress, unheard
from stiv_deploy.runtime.tensorrt_library import TITLES, Flavour, import_tensorrt, targets

AUTO = "auto"
FP8_SM = 89
"""The first compute capability whose tensor cores take FP8 (Ada; Hopper and Blackwell do too)."""
FP4_SMS = ("120", "121")
"""Compute capabilities that TensorRT-RTX 1.7 builds NVFP4 for (Blackwell of GeForce and RTX PRO, and of DGX Spark)."""
MOST_JOBS = 4
MEMORY_FACTOR, BUILDER_MEMORY = 3.5, 2**28
"""A builder process needs so many times the bytes of its weights, and so many bytes besides: measured with RTX 1.7."""
BLOCKS, HALVES = "blocks", "halves"
"""Stand for all blocks, and for all halves of blocks, among the names of graphs."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """Engines of the bundle in the folder ``bundle``, to be built for the GPU ``sm``.

    ``buckets`` and ``graphs`` empty mean all, ``blocks`` among the graphs all blocks; ``jobs`` None means what suits
    the machine and builder, ``cache`` is the folder of finished plans. With ``attention`` "plugin" or "quick" graphs
    that have a form with plugin nodes are built from it, the others as always; "plugin" takes the plugin library,
    "quick" the kernels that need no library where the engine runs. With ``shared_plan`` the weights of all graphs of
    the transformer are inputs of their engines, and equal blocks share one. ``written`` is the manifest of an export by
    this very command, whose files then need no hashing. Raises :class:`EngineError` for less than one job.
    """

    bundle: Path
    backend: Flavour
    sm: str
    buckets: tuple[str, ...] = ()
    graphs: tuple[str, ...] = ()
    jobs: int | None = None
    cache: Path = field(default_factory=default_cache)
    rebuild: bool = False
    optimization_level: int | None = None
    attention: BuildAttention = "native"
    shared_plan: bool = False
    written: Manifest | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise EngineError(f"--jobs must be at least 1, got {self.jobs}")


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """One finished engine; ``cached`` if no builder ran for it (another build, or an equal graph, made it).

    ``attention`` is the form of its graph that it was built from, ``file`` where it lies in the bundle: graphs whose
    weights are inputs may share one.
    """

    graph: str
    file: str
    attention: BuildAttention
    plan: CachedPlan
    cached: bool


class BuildReport(Frozen):
    """The engines of a build in the order of the graphs, for which GPU, and by which library."""

    bundle: Path
    backend: Flavour
    version: str
    sm: str
    engines: tuple[BuiltEngine, ...]


def gpu_sm() -> str:
    """Compute capability of this machine's GPU; :class:`BackendError` if there is none."""
    from stiv_deploy.runtime.backends.cuda import Cuda

    return Cuda().device.sm


def resolve_sm(trt: Any, flavour: Flavour, sm: str) -> str:
    """Check ``sm`` against what the library can compile for; ``auto`` becomes the SM of the GPU at hand.

    Raises :class:`BackendError`: TensorRT-RTX compiles ahead of time for a fixed list; TensorRT measures kernels
    while building, so that it needs a GPU and builds for that one only.
    """
    known = targets(trt)
    options = ", ".join([*known, PORTABLE, AUTO])
    if known and sm not in (*known, PORTABLE, AUTO):
        raise BackendError(f"{TITLES[flavour]} {trt.__version__} supports SM {options}; got {sm!r}")
    if known and sm != AUTO:
        return sm
    if not known and sm == PORTABLE:
        raise BackendError(f"{TITLES[flavour]} has no portable engines; give the SM of this machine's GPU, or {AUTO}")
    return _sm_of_gpu(trt, flavour, sm)


def _sm_of_gpu(trt: Any, flavour: Flavour, sm: str) -> str:
    known = targets(trt)
    hint = f"give --sm {', '.join(known)} or {PORTABLE}" if known else "build on the machine that will run the engines"
    try:
        here = gpu_sm()
    except BackendError as error:
        raise BackendError(f"{TITLES[flavour]} --sm {sm} needs an NVIDIA GPU here ({error}); {hint}") from None
    if known and here not in known:
        raise BackendError(f"{TITLES[flavour]} {trt.__version__} does not support this GPU's SM {here}; {hint}")
    if sm not in (AUTO, here):
        raise BackendError(f"{TITLES[flavour]} builds for the GPU at hand, SM {here}; got --sm {sm}; {hint}")
    return here


def check_formats(manifest: Manifest, graphs: Sequence[str], sm: str) -> None:
    """:class:`BackendError` if one of ``graphs`` has layers in a format that the GPU ``sm`` has no arithmetic for."""
    record = manifest.quantization
    fault = None if record is None else format_fault(record.format, sm)
    if record is None or fault is None:
        return
    chosen = [name for name, choice in record.layers.items() if choice != "high"]
    found = next((name for name in chosen if any(has_layer(graph, name) for graph in graphs)), None)
    if found is not None:
        what, remedy = fault
        raise BackendError(
            f"SM {sm} has no {what} and layer {found} of this bundle is {record.format.upper()}; "
            f"export with --precision {remedy}, or build for another GPU"
        )


def source_file(bundle: Bundle, graph: str, sm: str) -> Path:
    """The file without plugin nodes that engines of ``graph`` for the GPU ``sm`` are built from, verified."""
    record = bundle.manifest.graphs[graph]
    if record.fp4 is not None:
        return bundle.fp4_file(graph)
    return bundle.graph_file(graph) if reduced_for(record, sm) is None else bundle.reduced_file(graph)


def format_fault(quantization: Format, sm: str) -> tuple[str, str] | None:
    """What the GPU ``sm`` lacks for a format, in words, and the formats to take instead; None if it lacks nothing."""
    if quantization == "fp8" and sm != PORTABLE and int(sm) < FP8_SM:
        return f"FP8 arithmetic (it begins with SM {FP8_SM})", "int8"
    if quantization == "nvfp4" and sm not in (*FP4_SMS, PORTABLE):
        return f"NVFP4 products in TensorRT-RTX (SM {' and '.join(FP4_SMS)} have)", "fp8 or int8"
    return None


def choose_buckets(manifest: Manifest, names: Sequence[str]) -> list[Bucket]:
    """The buckets called ``names``, all if empty; :class:`EngineError` for an unknown one."""
    known = {bucket.name: bucket for bucket in manifest.buckets}
    return [known[name] for name in known_names(names, list(known), "bucket")]


def choose_graphs(manifest: Manifest, names: Sequence[str], default: Sequence[str] = ()) -> list[str]:
    """The graphs called ``names``, :data:`BLOCKS` and :data:`HALVES` being all those; if empty ``default``, or all.

    Raises :class:`EngineError` for an unknown one.
    """
    known = list(manifest.graphs)
    kinds = {BLOCKS: list(filter(is_block, known)), HALVES: list(filter(is_half, known))}
    if HALVES in names and not manifest.halves:
        raise EngineError(f"blocks are not here as halves; {HALVES_REMEDY}")
    chosen = dict.fromkeys(each for name in names for each in kinds.get(name) or [name])
    return known_names(list(chosen) or default, known, "graph")


def known_names(names: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """``names``, all ``known`` ones if empty; :class:`EngineError` if one is not known."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise EngineError(f"unknown {what} {few(unknown)}; the bundle has {few(known, 20)}")
    return list(names or known)


def default_jobs(flavour: Flavour, weights: int = 0) -> int:
    """Builders to run at a time: TensorRT measures kernels, so one; RTX only compiles, so one per core up to four.

    No more than this machine's memory has room for, where the largest graph has ``weights`` bytes of weights.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    needed = int(MEMORY_FACTOR * weights + BUILDER_MEMORY)
    room = (memory_bytes() or MOST_JOBS * needed) // needed
    return 1 if flavour == "tensorrt" else max(1, min(cores, MOST_JOBS, room))


class EngineBuild:
    """One run of ``stiv build``: everything is checked on construction, before the first builder starts.

    Raises :class:`~stiv_deploy.runtime.errors.BundleError` for a damaged graph file, :class:`BackendError` for a
    missing library or an impossible target, :class:`EngineError` for an unknown graph or bucket, :class:`OutputError`
    where it could not write, for plugins whatever :func:`choose_packaging` does, and for shared plans whatever
    :func:`~stiv_deploy.export.engines.shared_plan.choose_weight_inputs` and
    :func:`~stiv_deploy.export.engines.weight_inputs.weight_inputs` do.
    """

    def __init__(self, request: BuildRequest) -> None:
        bundle = Bundle.open(request.bundle)
        trt = import_tensorrt(request.backend)
        self.bundle, self.request = bundle, request
        self.version: str = trt.__version__
        self.sm = resolve_sm(trt, request.backend, request.sm)
        self.buckets = choose_buckets(bundle.manifest, request.buckets)
        self.graphs = choose_graphs(bundle.manifest, request.graphs)
        check_formats(bundle.manifest, self.graphs, self.sm)
        with_inputs = (
            choose_weight_inputs(bundle.manifest, self.graphs, request.attention) if request.shared_plan else []
        )
        self.packaging = choose_packaging(trt, bundle.manifest, self.graphs, request.backend, request.attention)
        if not os.access(bundle.folder, os.W_OK):
            raise OutputError(
                f"{bundle.folder}: engines cannot be written into this bundle; copy it to a folder you own"
            )
        self.cache = PlanCache(request.cache)
        if request.written is not None:
            bundle.trust(request.written)
        with ThreadPoolExecutor(2) as readers:  # hashing lets go of the interpreter
            self._onnx = dict(zip(self.graphs, readers.map(self._file, self.graphs), strict=True))
        found = {graph: weight_inputs(self._onnx[graph]) for graph in with_inputs}
        self._inputs = {graph: inputs for graph, inputs in found.items() if inputs.shapes}
        self._firsts = first_of_form(self._inputs)
        self._builders = BuilderProcesses()

    def packaging_of(self, graph: str) -> Packaging | None:
        """What becomes of the plugin nodes of ``graph``, None if it is built from its native form."""
        form, packaging = self.bundle.manifest.graphs[graph].plugin, self.packaging
        return packaging if packaging is not None and packaging.takes(form) else None

    def _file(self, graph: str) -> Path:
        """The file that ``graph`` is built from, verified."""
        if self.packaging_of(graph) is not None:
            return self.bundle.plugin_file(graph)
        return source_file(self.bundle, graph, self.sm)

    def reduces(self, graph: str) -> bool:
        """Whether ``graph`` is built from its form in 16 bits."""
        return reduced_for(self.bundle.manifest.graphs[graph], self.sm) is not None

    def _hash(self, graph: str) -> str:
        """Of the file that ``graph`` is built from, with its weights."""
        record = self.bundle.manifest.graphs[graph]
        plugin, fp4 = self.packaging_of(graph) is not None, record.fp4 is not None
        return graph_hash(record, plugin=plugin, reduced=self.reduces(graph), fp4=fp4)

    def job(self, graph: str, plan: Path) -> EngineJob:
        """The job of ``graph``, to be written to ``plan``."""
        manifest, flavour, packaging = self.bundle.manifest, self.request.backend, self.packaging_of(graph)
        library = None if packaging is None else packaging.library
        timing = self.cache.timing(f"{flavour}-{self.version}-sm{self.sm}") if flavour == "tensorrt" else None
        return EngineJob(
            graph=graph,
            onnx=str(self._onnx[graph]),
            plan=str(plan),
            backend=flavour,
            sm=None if self.sm == PORTABLE else self.sm,
            profiles=tuple(self._profile(graph, bucket) for bucket in self.buckets),
            optimization_level=self.request.optimization_level,
            timing_cache=None if timing is None else str(timing),
            plugins=None if library is None else str(library.path),
            quick=packaging is not None and library is None,
            tf32=takes_tf32(manifest, graph) and not self.reduces(graph),
            weights_as_inputs=graph in self._inputs,
        )

    def _profile(self, graph: str, bucket: Bucket) -> Profile:
        """Shapes of all inputs, of weights too where they are some."""
        own = graph_profile(self.bundle.manifest, graph, bucket)
        return own | self._inputs[graph].profile if graph in self._inputs else own

    def key(self, graph: str) -> str:
        """The plan's key in the cache: equal graphs with equal weights share one."""
        job, packaging, inputs = self.job(graph, Path()), self.packaging_of(graph), self._inputs.get(graph)
        extra = {} if packaging is None else {"plugins": packaging.identity}  # native plans have the keys they had
        return plan_key(
            onnx=self._hash(graph) if inputs is None else inputs.digest,
            profiles=[sorted(values.items()) for values in job.profiles],
            backend=job.backend,
            version=self.version,
            sm=self.sm,
            optimization_level=job.optimization_level,
            revision=BUILDER_REVISION,
            flags=[FLAGS_SET[job.backend], job.flags_cleared],
            **extra,
        )

    def _build(self, graph: str, key: str) -> BuiltEngine:
        """Take the plan from the cache or build it in a process of its own."""
        found = None if self.request.rebuild else self.cache.find(key)
        if found is not None:
            return self._built(graph, found, cached=True)
        try:
            return self._built(graph, self._plan(graph, key), cached=False)
        except OSError as error:
            raise self._no_room(graph, error.strerror or str(error)) from None

    def _plan(self, graph: str, key: str) -> CachedPlan:
        """A new plan, built in a process of its own and kept in the cache."""
        with self.cache.draft(key) as draft:
            result = self._builders.run(self.job(graph, draft))
            if result.unwritten is not None:
                raise self._no_room(graph, result.unwritten)
            if result.error is not None:
                builder = f"{TITLES[self.request.backend]} {self.version}"
                raise EngineError(f"{graph}: {builder} cannot build it for {sm_folder(self.sm)}: {result.error}")
            return self.cache.keep(key, draft, result.seconds, result.sha256)

    def _no_room(self, graph: str, reason: str) -> OutputError:
        return OutputError(
            f"{graph}: its plan cannot be written to the cache {self.cache.folder} ({reason}); make room, or give "
            "--cache DIR; finished plans are kept there for the next build"
        )

    def _built(self, graph: str, plan: CachedPlan, *, cached: bool) -> BuiltEngine:
        attention = "native" if self.packaging_of(graph) is None else self.request.attention
        return BuiltEngine(graph=graph, file=self._path(graph, plan), attention=attention, plan=plan, cached=cached)

    def _build_all(self, progress: Progress) -> dict[str, BuiltEngine]:
        """Build every distinct engine, some at a time; the first failure, or Ctrl-C, ends all builders."""
        graphs_of: dict[str, list[str]] = {}
        for graph in self.graphs:
            graphs_of.setdefault(self.key(graph), []).append(graph)
        built: dict[str, BuiltEngine] = {}
        pool = ThreadPoolExecutor(self.request.jobs or default_jobs(self.request.backend, self._weights()))
        progress("the first engines", 0, len(self.graphs))
        try:
            futures = {pool.submit(self._build, graphs[0], key): graphs for key, graphs in graphs_of.items()}
            for future in as_completed(futures):
                engine = future.result()
                for index, graph in enumerate(futures[future]):
                    built[graph] = self._built(graph, engine.plan, cached=engine.cached or index > 0)
                    progress(graph, len(built), len(self.graphs))
        except BaseException:
            self._builders.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return built

    def _weights(self) -> int:
        """Bytes of the largest graph's weights that a builder holds."""
        held = [self.bundle.manifest.graphs[graph].data for graph in self.graphs if graph not in self._inputs]
        return max((data.bytes for data in held if data is not None), default=0)

    def _path(self, graph: str, plan: CachedPlan) -> str:
        """Where the engine goes in the bundle: one that others may share never replaces another under its name."""
        first = self._firsts.get(graph)
        name = graph if first is None else shared_name(first, plan.sha256)
        return engine_path(self.request.backend, self.sm, name, self.request.buckets)

    def _records(self, engine: BuiltEngine) -> list[EngineRecord]:
        """Manifest entries of one engine: one per bucket."""
        plan, packaging, inputs = engine.plan, self.packaging_of(engine.graph), self._inputs.get(engine.graph)
        library = None if packaging is None else packaging.library
        return [
            EngineRecord(
                graph=engine.graph,
                bucket=bucket.name,
                backend=self.request.backend,
                backend_version=self.version,
                sm=self.sm,
                file=FileRecord(path=engine.file, sha256=plan.sha256, bytes=plan.bytes),
                onnx=self._hash(engine.graph),
                plugins=None if library is None else library.sha256,
                weights=() if inputs is None else tuple(inputs.shapes),
                build_seconds=plan.build_seconds,
            )
            for bucket in self.buckets
        ]

    def run(self, progress: Progress) -> BuildReport:
        """Build and install; ``progress`` hears of each engine as it is done.

        Raises :class:`EngineError` with the builder's own words. The bundle is unchanged unless this returns.
        """
        built = self._build_all(progress)
        records = [record for graph in self.graphs for record in self._records(built[graph])]
        with staged(self.bundle.folder, {each.file: each.plan.path for each in built.values()}) as files:
            commit(self.bundle, files, records)
        return BuildReport(
            bundle=self.request.bundle,
            backend=self.request.backend,
            version=self.version,
            sm=self.sm,
            engines=tuple(built[graph] for graph in self.graphs),
        )


def build_engines(request: BuildRequest, progress: Progress = unheard) -> BuildReport:
    """Build the engines that ``request`` asks for and enter them in the bundle, all or none.

    Raises what :class:`EngineBuild` does, before the first builder starts, and what its run does.
    """
    return EngineBuild(request).run(progress)
