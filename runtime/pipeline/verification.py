"""The stage of ``stiv verify``: a bundle held against its golden answers, where it runs, and the result kept."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from stiv_deploy.runtime.backends import open_backend, other_engines, quarantine, runnable
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Frozen, block_names
from stiv_deploy.runtime.bundle.engine_files import buckets_holding
from stiv_deploy.runtime.bundle.golden import Golden, GraphAnswer, Sizes, read_golden
from stiv_deploy.runtime.bundle.verified import VerifyResult, keep_result, read_result, results_file
from stiv_deploy.runtime.errors import EngineError, OutputError, Quarantined, few
from stiv_deploy.runtime.files import check_file
from stiv_deploy.runtime.progress import Progress, unheard
from stiv_deploy.runtime.sampling.golden_player import SUBJECT, run_rows
from stiv_deploy.runtime.sampling.golden_run import VerifyRow, graph_rows
from stiv_deploy.runtime.tensorrt_library import FLAVOURS

OTHERWISE = "give --no-record, or copy the bundle to a folder you own"


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """A proof of the bundle in the folder ``bundle`` on each of ``backends``, by default all that can run it here.

    ``quick`` takes one size of each graph, and the runs. With ``record`` the result is kept beside the bundle.
    """

    bundle: Path
    backends: tuple[str, ...] = ()
    device: int = 0
    threads: int | None = None
    quick: bool = False
    record: bool = True


class BackendProof(Frozen):
    """What one backend gave: the result that is kept, its rows, and the wall seconds."""

    result: VerifyResult
    rows: tuple[VerifyRow, ...]
    seconds: float


class VerifyReport(Frozen):
    """A run of ``stiv verify``: the proof of each backend, and what has no golden answers."""

    bundle: Path
    proofs: tuple[BackendProof, ...]
    unanswered: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every backend gave what is right."""
        return all(proof.result.passed for proof in self.proofs)


def verify(request: VerifyRequest, progress: Progress = unheard) -> VerifyReport:
    """Hold the bundle against its golden answers; what is wrong is in the report.

    Graphs run one after another, each with a backend of its own, so that memory holds one of them; the runs of the
    sampling loop, after them, take the whole model's, as a generation does. Raises
    :class:`~stiv_deploy.runtime.errors.BundleError` (damaged, or without answers),
    :class:`~stiv_deploy.runtime.errors.BackendError`, :class:`~stiv_deploy.runtime.errors.EngineError` or
    :class:`~stiv_deploy.runtime.errors.OutputError` before the first graph runs.
    """
    bundle = Bundle.open(request.bundle)
    golden = read_golden(bundle)
    if request.record:
        check_file(results_file(bundle.folder), OTHERWISE)
    names = runnable(bundle, request.backends, request.device)
    answered = {each.graph for each in golden.graphs}
    proofs = tuple(proof for name in names for proof in _proofs(bundle, golden, name, request, progress))
    if request.record:
        for proof in proofs:
            keep_result(bundle.folder, proof.result)
    absent = (SUBJECT,) if golden.sampling is None else ()
    unanswered = (*(name for name in bundle.manifest.graphs if name not in answered), *absent)
    return VerifyReport(bundle=request.bundle, proofs=proofs, unanswered=unanswered)


def _proofs(
    bundle: Bundle, golden: Golden, name: str, request: VerifyRequest, progress: Progress
) -> Iterator[BackendProof]:
    """Of the backend ``name``; where its engines are wrong also of the next that it would take."""
    proof, rest = _proof(bundle, golden, name, request, progress)
    yield proof
    while rest is not None and not proof.result.passed:
        try:
            proof, rest = _proof(rest, golden, name, request, progress)
        except EngineError:
            return
        yield proof


def _proof(
    bundle: Bundle, golden: Golden, name: str, request: VerifyRequest, progress: Progress
) -> tuple[BackendProof, Bundle | None]:
    """A proof, and the bundle without the engines that it is of, where there are others."""
    started = monotonic()
    with open_backend(name, bundle, request.threads, request.device, quarantined=True) as backend:
        machine, rest = backend.machine, other_engines(bundle, backend)
    rows = _rows(bundle, golden, name, request, progress)
    result = VerifyResult(
        bundle=bundle.hash,
        answers=bundle.manifest.golden.sha256 if bundle.manifest.golden else "",
        machine=machine,
        quick=request.quick,
        compared=len(rows),
        failed=tuple(dict.fromkeys(row.subject for row in rows if not row.passed)),
        finished=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    return BackendProof(result=result, rows=tuple(rows), seconds=monotonic() - started), rest


def _rows(bundle: Bundle, golden: Golden, name: str, request: VerifyRequest, progress: Progress) -> list[VerifyRow]:
    """Of all graphs, and of the runs where there are engines for their size."""
    rows: list[VerifyRow] = []
    groups = _by_graph(chosen([case for case in golden.graphs if runs(bundle, name, case)], request.quick))
    for done, (graph, cases) in enumerate(groups.items()):
        progress(f"{name}: {graph}", done, len(groups) + 1)
        with open_backend(name, bundle, request.threads, request.device, quarantined=True) as backend:
            rows += graph_rows(backend, bundle, golden, cases)
    if golden.sampling is not None and samples(bundle, name, golden.sampling.sizes):
        progress(f"{name}: sampling", len(groups), len(groups) + 1)
        with open_backend(name, bundle, request.threads, request.device, quarantined=True) as backend:
            rows += run_rows(backend, bundle, golden)
    return rows


def proven_backend(
    bundle: Bundle, name: str | None, threads: int | None = None, device: int = 0, *, strict: bool = False
) -> Backend:
    """Open a backend as ``open_backend`` does, and only one that gives right results.

    One that has no result as it is now is verified first, at one size of each graph. Instead of engines that are wrong
    others of the same backend are taken, and where no backend is named, the next one instead of one that is wrong; with
    ``strict`` that is refused, and so is a bundle without answers. Raises
    :class:`~stiv_deploy.runtime.errors.Quarantined`, and what ``open_backend`` and :func:`verify` do.
    """
    if bundle.manifest.golden is None:
        if strict:
            read_golden(bundle)
        return open_backend(name, bundle, threads, device)
    while True:
        backend = open_backend(name, bundle, threads, device, quarantined=strict)
        if read_result(bundle, backend.machine).state != "not verified":
            break
        backend.close()
        if _proves(bundle, backend.name, threads, device):
            return open_backend(backend.name, bundle, threads, device)
    reason = quarantine(bundle, backend)
    if reason is None:
        return backend
    backend.close()
    raise Quarantined(f"backend {backend.name} is quarantined: {reason}; without --strict another one is taken")


def _proves(bundle: Bundle, name: str, threads: int | None, device: int) -> bool:
    """Verify the backend ``name`` at one size of each graph, and keep the result.

    Where the place beside the bundle takes no files, nothing is kept, and a wrong backend is
    :class:`~stiv_deploy.runtime.errors.Quarantined`.
    """
    request = VerifyRequest(bundle=bundle.folder, backends=(name,), device=device, threads=threads, quick=True)
    try:
        return verify(request).passed
    except OutputError as error:
        report = verify(replace(request, record=False))
        if report.passed:
            return True
        failed = few([each for proof in report.proofs for each in proof.result.failed])
        raise Quarantined(f"backend {name}: {failed} gave wrong results; {error}, or name another backend") from None


def runs(bundle: Bundle, backend: str, case: GraphAnswer) -> bool:
    """Whether ``backend`` is to run ``case``: engines need not have been built for every bucket."""
    return _takes(bundle, backend, case.graph, case.sizes)


def samples(bundle: Bundle, backend: str, sizes: Sizes) -> bool:
    """Whether ``backend`` is to sample at ``sizes``."""
    graphs = (*block_names(bundle.manifest.model.blocks), "embed", "head", "step")
    return all(_takes(bundle, backend, graph, sizes) for graph in graphs)


def _takes(bundle: Bundle, backend: str, graph: str, sizes: Sizes) -> bool:
    manifest = bundle.manifest
    built = {(each.graph, each.bucket) for each in manifest.engines if each.backend == backend}
    dims = sizes.dims(manifest.model)
    shapes = {tensor.name: tensor.sized(dims) for tensor in manifest.graphs[graph].spec.inputs}
    held = buckets_holding(manifest, graph, shapes)
    return backend not in FLAVOURS or any((graph, bucket) in built for bucket in held)


def chosen(cases: Sequence[GraphAnswer], quick: bool) -> list[GraphAnswer]:
    """The cases to run: all, or the first of each graph."""
    firsts = {case.graph: case for case in reversed(cases)}
    return [case for case in cases if not quick or firsts[case.graph] is case]


def _by_graph(cases: Iterable[GraphAnswer]) -> dict[str, list[GraphAnswer]]:
    groups: dict[str, list[GraphAnswer]] = {}
    for case in cases:
        groups.setdefault(case.graph, []).append(case)
    return groups
