"""Builds each distinct graph of a bundle for the audit alone, per target and bucket; keeps the report, not the plan."""

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from stiv_deploy.export.audit.fusion_audit import AuditRow, Expectation, audit_graph, expectation
from stiv_deploy.export.audit.layer_report import EngineLayer, read_report
from stiv_deploy.export.audit.lost_fusions import AuditNote, lost_fusions
from stiv_deploy.export.engines.build import (
    FP4_SMS,
    check_formats,
    choose_graphs,
    default_jobs,
    resolve_sm,
    source_file,
)
from stiv_deploy.export.engines.job import EngineJob, EngineResult
from stiv_deploy.export.engines.processes import BuilderProcesses
from stiv_deploy.export.engines.shared_plan import choose_weight_inputs
from stiv_deploy.export.engines.weight_inputs import WeightInputs, weight_inputs
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import SKIP_GRAPHS, Format, Frozen, Precision, is_block, is_half
from stiv_deploy.runtime.bundle.engine_files import graph_profile, reduced_for, sm_folder, takes_tf32
from stiv_deploy.runtime.bundle.manifest import PORTABLE, Bucket, Manifest
from stiv_deploy.runtime.errors import EngineError
from stiv_deploy.runtime.progress import Progress, unheard
from stiv_deploy.runtime.tensorrt_library import TITLES, Flavour, import_tensorrt

AUDITED = ("text_kv", "embed", *SKIP_GRAPHS, "head", "step")
"""Graphs beside the blocks that run in the bundle's type and are audited by default, ``step`` for stray types."""
DEFAULT_SMS = ("89", "120")
"""GPUs that engines are audited for by default; those of NVFP4 for :data:`FP4_SMS`."""
MIB = 2**20
LOGGED = "block_00"
"""The graph that a build log is of, if nobody says."""


@dataclass(frozen=True, kw_only=True)
class AuditedEngine:
    """One engine that was built and checked, and the graphs that it stands for."""

    target: str
    bucket: str
    graph: str
    same: tuple[str, ...]
    kernels: int
    build_seconds: float
    plan_bytes: int


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """An audit of the bundle in the folder ``bundle``, of engines that ``backend`` builds for the GPUs ``sms``.

    ``sms`` empty means :func:`default_sms`, ``graphs`` empty :func:`default_graphs`, ``blocks`` among them all blocks;
    ``jobs`` None means what suits the machine and builder. With ``log``, a build log or a layer-information JSON,
    nothing is built: it is audited as that of the one graph in ``graphs``, :data:`LOGGED` if empty. With
    ``shared_plan``, and where the bundle has such engines for a GPU, weights are inputs of the engines, as in ``stiv
    build --shared-plan``, and what that loses is noted. Raises :class:`EngineError` for less than one job.
    """

    bundle: Path
    backend: Flavour = "tensorrt-rtx"
    sms: tuple[str, ...] = ()
    graphs: tuple[str, ...] = ()
    log: Path | None = None
    jobs: int | None = None
    shared_plan: bool = False

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise EngineError(f"--jobs must be at least 1, got {self.jobs}")


class AuditReport(Frozen):
    """The checks of an audit and the engines that they were made on, and what bundle and builder these are of."""

    model: str
    precision: Precision
    quantization: Format | None
    builder: str
    engines: tuple[AuditedEngine, ...]
    rows: tuple[AuditRow, ...]
    notes: tuple[AuditNote, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> str:
        """Everything, with ``passed``."""
        values = self.model_dump(mode="json")
        rows = values.pop("rows")
        return json.dumps({**values, "passed": self.passed, "rows": rows}, indent=1)


def default_sms(manifest: Manifest) -> tuple[str, ...]:
    """GPUs that the engines of a bundle are audited for, if nobody says."""
    quantization = manifest.quantization
    return FP4_SMS if quantization is not None and quantization.format == "nvfp4" else DEFAULT_SMS


def distinct_graphs(manifest: Manifest, graphs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The first of each kind of graph, and all of its kind: equal topology, and equal expectations from the plan."""
    kinds: dict[str, list[str]] = {}
    for graph in graphs:
        kinds.setdefault(_kind(manifest, graph), []).append(graph)
    return {same[0]: tuple(same) for same in kinds.values()}


def _kind(manifest: Manifest, graph: str) -> str:
    expected = expectation(manifest, graph).model_copy(update={"graph": ""})
    return f"{manifest.graphs[graph].topology} {expected.model_dump_json()}"


def default_graphs(manifest: Manifest) -> list[str]:
    """Blocks and their halves, :data:`AUDITED`, and the VAE where it has a form in 16 bits, in the bundle's order."""

    def audited(name: str) -> bool:
        return name in AUDITED or is_block(name) or is_half(name) or manifest.graphs[name].reduced is not None

    return list(filter(audited, manifest.graphs))


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One engine to build: its job, what to expect of it, and for which graphs.

    ``job`` is that of the engine with its weights in its plan, whose ``inputs`` they are if not None.
    """

    job: EngineJob
    inputs: WeightInputs | None
    expected: Expectation
    target: str
    bucket: str
    same: tuple[str, ...]


class Audit:
    """One run of ``stiv audit``: everything is checked on construction, before the first builder starts.

    Raises :class:`~stiv_deploy.runtime.errors.BundleError` for a damaged graph file,
    :class:`~stiv_deploy.runtime.errors.BackendError` for a missing library or an impossible target among ``sms``,
    :class:`EngineError` for an unknown graph.
    """

    def __init__(self, bundle: Bundle, request: AuditRequest) -> None:
        trt = import_tensorrt(request.backend)
        manifest = bundle.manifest
        self.bundle, self.backend, self.shared_plan = bundle, request.backend, request.shared_plan
        self.jobs = request.jobs or default_jobs(request.backend)
        self.title = f"{TITLES[self.backend]} {trt.__version__}"
        chosen = choose_graphs(manifest, request.graphs, default_graphs(manifest))
        targets = [resolve_sm(trt, self.backend, sm) for sm in request.sms or default_sms(manifest)]
        for sm in targets:
            check_formats(manifest, chosen, sm)
        self.shareable = choose_weight_inputs(manifest, chosen, "native") if request.shared_plan else chosen
        kinds = distinct_graphs(manifest, chosen)
        self._folder = tempfile.TemporaryDirectory(prefix="stiv-audit-")
        self.tasks = [
            self._task(graph, same, sm, bucket)
            for sm in targets
            for graph, same in kinds.items()
            for bucket in manifest.buckets
        ]
        self._builders = BuilderProcesses()

    def _task(self, graph: str, same: tuple[str, ...], sm: str, bucket: Bucket) -> _Task:
        """The engine of ``graph`` for one target and bucket: what fuses depends on the sizes, so each is looked at."""
        manifest = self.bundle.manifest
        reduced = reduced_for(manifest.graphs[graph], sm)
        path = f"{self._folder.name}/{sm_folder(sm)}-{graph}-{bucket.name}"
        job = EngineJob(
            graph=graph,
            onnx=str(source_file(self.bundle, graph, sm)),
            plan=f"{path}.plan",
            backend=self.backend,
            sm=None if sm == PORTABLE else sm,
            profiles=(graph_profile(manifest, graph, bucket),),
            report=f"{path}.txt",
            tf32=takes_tf32(manifest, graph) and reduced is None,
        )
        expected, inputs = expectation(manifest, graph, reduced), self._weight_inputs(graph, sm)
        return _Task(
            job=job,
            inputs=inputs,
            expected=expected.model_copy(update={"counted": inputs is None}),
            target=sm_folder(sm),
            bucket=bucket.name,
            same=same,
        )

    def _weight_inputs(self, graph: str, sm: str) -> WeightInputs | None:
        """Weights of ``graph`` that are to be inputs: as asked, or as in the bundle's engines for ``sm``."""
        built = [each for each in self.bundle.manifest.engines if (each.backend, each.sm) == (self.backend, sm)]
        shared = self.shared_plan or any(each.weights for each in built if each.graph == graph)
        if not shared or graph not in self.shareable:
            return None
        inputs = weight_inputs(source_file(self.bundle, graph, sm))
        return inputs if inputs.shapes else None

    def _built(self, job: EngineJob, target: str) -> tuple[tuple[EngineLayer, ...], EngineResult]:
        """The layers of a new engine, which is not kept."""
        result = self._builders.run(job)
        fault = result.error or result.unwritten
        if fault is not None:
            raise EngineError(f"{job.graph}: {self.title} cannot build it for {target}: {fault}")
        assert job.report is not None
        layers = read_report(Path(job.report))
        Path(job.plan).unlink()
        return layers, result

    def _run(self, task: _Task) -> tuple[list[AuditRow], AuditedEngine, list[AuditNote]]:
        job = task.job if task.inputs is None else job_with_inputs(task.job, task.inputs)
        layers, result = self._built(job, task.target)
        engine = AuditedEngine(
            target=task.target,
            bucket=task.bucket,
            graph=task.job.graph,
            same=task.same,
            kernels=kernel_count(layers),
            build_seconds=result.seconds,
            plan_bytes=result.bytes,
        )
        return audit_graph(layers, task.expected, task.target, task.bucket), engine, self._notes(task, layers, engine)

    def _notes(self, task: _Task, layers: Sequence[EngineLayer], engine: AuditedEngine) -> list[AuditNote]:
        """What weights as inputs lose, if they are that."""
        if task.inputs is None:
            return []
        own, result = self._built(task.job, task.target)
        kernels, size = kernel_count(own), result.bytes / MIB
        counts = (
            f"{engine.kernels} kernels, {engine.plan_bytes / MIB:.1f} MiB; {kernels} and {size:.1f} with its weights"
        )
        place = {"target": task.target, "bucket": task.bucket, "graph": engine.graph}
        return [AuditNote(**place, text=text) for text in (counts, *lost_fusions(layers, own, task.inputs.shapes))]

    def run(self, progress: Progress) -> AuditReport:
        """Build and check everything; :class:`EngineError` in the builder's own words if a graph cannot be built."""
        rows: list[AuditRow] = []
        engines: list[AuditedEngine] = []
        notes: list[AuditNote] = []
        pool = ThreadPoolExecutor(self.jobs)
        progress("the first engines", 0, len(self.tasks))
        try:
            for done, (checks, engine, lost) in enumerate(pool.map(self._run, self.tasks), 1):
                rows += checks
                notes += lost
                engines.append(engine)
                progress(f"{engine.graph} {engine.target}", done, len(self.tasks))
        except BaseException:
            self._builders.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._folder.cleanup()
        return _report(self.bundle, self.title, engines, rows, notes)


def job_with_inputs(job: EngineJob, inputs: WeightInputs) -> EngineJob:
    """The same job with weights as inputs."""
    profiles = tuple(profile | inputs.profile for profile in job.profiles)
    path = f"{job.plan.removesuffix('.plan')}-shared"
    return replace(job, plan=f"{path}.plan", report=f"{path}.txt", profiles=profiles, weights_as_inputs=True)


def kernel_count(layers: Sequence[EngineLayer]) -> int:
    """Layers that launch a kernel."""
    return sum(layer.is_kernel for layer in layers)


def _report(
    bundle: Bundle,
    builder: str,
    engines: Sequence[AuditedEngine],
    rows: Sequence[AuditRow],
    notes: Sequence[AuditNote] = (),
) -> AuditReport:
    manifest = bundle.manifest
    return AuditReport(
        model=manifest.model.name,
        precision=manifest.precision,
        quantization=manifest.quantization.format if manifest.quantization else None,
        builder=builder,
        engines=tuple(engines),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def audit_bundle(request: AuditRequest, progress: Progress = unheard) -> AuditReport:
    """Check what ``request`` asks for; nothing is written.

    Raises :class:`~stiv_deploy.runtime.errors.BundleError`, what :class:`Audit` and its run do, and
    :class:`~stiv_deploy.export.errors.ReportError` for what is no log.
    """
    bundle = Bundle.open(request.bundle)
    if request.log is None:
        return Audit(bundle, request).run(progress)
    graphs = request.graphs or (LOGGED,)
    if len(graphs) != 1 or graphs[0] not in bundle.manifest.graphs:
        known = ", ".join(bundle.manifest.graphs)
        raise EngineError(f"--log is of one graph, got --graphs {','.join(graphs)}; the bundle has {known}")
    return audit_log(bundle, graphs[0], request.log)


def audit_log(bundle: Bundle, graph: str, path: Path) -> AuditReport:
    """Audit the engine that a build log tells of: ``graph`` of ``bundle``, built by whoever wrote the log."""
    layers = read_report(path)
    rows = audit_graph(layers, expectation(bundle.manifest, graph), path.name, "of the log")
    engine = AuditedEngine(
        target=path.name,
        bucket="of the log",
        graph=graph,
        same=(graph,),
        kernels=kernel_count(layers),
        build_seconds=0.0,
        plan_bytes=0,
    )
    return _report(bundle, path.name, [engine], rows)
