"""The stage of ``stiv parity --explain``: from the first graph that fails to the first of its modules that does.

Only the graphs' own levels of the ladder are climbed, op and block, and one graph is in memory at a time. A graph whose
modules all pass alone is wrong as a whole: a fusion, or an engine. Engines cannot be cut; where one fails, the modules
of its graph run in ONNX Runtime, which tells a wrong graph from a wrong engine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stiv_deploy.export.parity.cuts import CutGraph
from stiv_deploy.export.parity.explanation import Explanation, description
from stiv_deploy.export.parity.files import Sources, open_subject
from stiv_deploy.export.parity.ladder import DIRECT, Ladder, News, Sides, Subject, sides_of
from stiv_deploy.export.parity.modules import Measured, Modules, alone, as_array
from stiv_deploy.export.parity.oracle import Tensors
from stiv_deploy.export.parity.pieces import Pieces
from stiv_deploy.export.parity.reproduction import FILES, Wrong, require_polygraphy, write_reproduction
from stiv_deploy.export.parity.requests import parity_requests
from stiv_deploy.export.parity.runs import probe
from stiv_deploy.export.parity.stage import LEAST_STEPS
from stiv_deploy.runtime.backends import open_backend, runnable
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.bundle.manifest import ParityRow
from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.files import check_apart, check_folder, check_no_bundle, replaced_folder
from stiv_deploy.runtime.progress import Progress, unheard

ANOTHER = "choose another folder for --explain"


@dataclass(frozen=True, kw_only=True)
class ExplainRequest(Sources):
    """An explanation of what fails in the bundle in the folder ``bundle``, its reproduction to be the folder ``out``.

    The rest is as in :class:`~stiv_deploy.export.parity.stage.ParityRequest`.
    """

    bundle: Path
    out: Path
    backends: tuple[str, ...] = ()


class ExplainReport(Frozen):
    """Rows up to and with the first graph that failed, and why it did; None if none did."""

    rows: tuple[ParityRow, ...]
    explanation: Explanation | None

    @property
    def passed(self) -> bool:
        """Whether no graph failed."""
        return self.explanation is None


class Failure(NamedTuple):
    """A graph that failed on ``backend``: its rows, and its inputs in the contract's types."""

    backend: str
    graph: str
    rows: list[ParityRow]
    given: Tensors

    @property
    def row(self) -> ParityRow:
        """The first row that failed."""
        return next(row for row in self.rows if not row.passed)


def explain(request: ExplainRequest, progress: Progress = unheard) -> ExplainReport:
    """Find the first graph that fails, explain it, and write its reproduction; nothing is written where none fails.

    Raises what :func:`~stiv_deploy.export.parity.stage.run_parity` does, and before anything expensive
    :class:`OutputError` (a folder that cannot be replaced) and :class:`~stiv_deploy.export.errors.ExportError`
    (Polygraphy is missing).
    """
    check_target(request)
    require_polygraphy()
    bundle = Bundle.open(request.bundle)
    backends = runnable(bundle, request.backends)
    progress("loading the checkpoint", 0, 1)
    subject = open_subject(bundle, request)
    sides = sides_of(subject, lean=True)
    rows: list[ParityRow] = []
    for failure in failures(subject, backends, sides, rows, progress):
        explanation = _explained(failure, bundle, sides, request.out, progress)
        return ExplainReport(rows=tuple(rows), explanation=explanation)
    return ExplainReport(rows=tuple(rows), explanation=None)


def check_target(request: ExplainRequest) -> None:
    """:class:`OutputError` if the reproduction cannot be written, or something that is none would be lost."""
    out = request.out
    check_folder(out, ANOTHER)
    check_apart([out], [request.bundle, request.checkpoint, request.scales, *request.loras])
    check_no_bundle(out)
    if out.is_dir() and not {each.name for each in out.iterdir()} <= FILES:
        raise OutputError(f"{out}: this folder has other files than those of a reproduction; {ANOTHER}, or remove it")


def failures(
    subject: Subject, backends: Sequence[str], sides: Sides, rows: list[ParityRow], progress: Progress
) -> Iterator[Failure]:
    """Graphs that fail, in running order, backend by backend; ``rows`` gets all that was measured on the way."""
    bundle = subject.bundle
    request = parity_requests(bundle.manifest, subject.checkpoint, LEAST_STEPS)[-1]
    news = News(progress, len(backends) * len(bundle.manifest.graphs))
    for name in backends:
        with open_backend(name, bundle, quarantined=True) as backend:
            ladder = Ladder(backend, bundle, sides, news)
            for graph, inputs in probe(sides.truth, request, bundle.manifest):
                news.next(f"{name}: {graph}")
                given = ladder.as_given(graph, inputs)
                found = ladder.graph(graph, given, ladder.dims(request))
                rows += found
                if not all(row.passed for row in found):
                    yield Failure(name, graph, found, given)


def _explained(failure: Failure, bundle: Bundle, sides: Sides, out: Path, progress: Progress) -> Explanation:
    """Measure the modules of the graph that failed, and write the reproduction of what is wrong."""
    manifest, graph = bundle.manifest, failure.graph
    cut = CutGraph(bundle.graph_file(graph), {name: value.shape for name, value in failure.given.items()})
    modules = Modules(cut, graph, failure.given, sides, manifest.precision)
    quantization = manifest.quantization.format if manifest.quantization else None
    pieces = Pieces(failure.backend, quantization, manifest.precision)
    found: list[Measured] = []
    for measured in modules.measure(pieces):
        found.append(measured)
        progress(f"{graph}: its modules, each alone", len(found), len(modules.cut.pieces(modules.cuts)))
    first = next((index for index, each in enumerate(found) if not each.row.passed), None)
    explanation = Explanation(
        row=failure.row,
        graph=graph,
        measured_on=pieces.where,
        modules=tuple(each.row for each in found),
        first=first,
        reproduction=out,
    )
    wrong = whole_of(failure, cut, sides) if first is None else piece_of(found[first], modules)
    with replaced_folder(out, ANOTHER) as folder:
        write_reproduction(folder, pieces.reproduction(wrong, description(explanation, bundle)))
    return explanation


def piece_of(measured: Measured, modules: Modules) -> Wrong:
    """One piece of a graph."""
    piece, _, judge = measured
    expected, bounds = {piece.value: judge.truth.numpy()}, {piece.value: judge.bound}
    return Wrong(modules.cut.model_of(piece), modules.feed(piece), expected, bounds)


def whole_of(failure: Failure, cut: CutGraph, sides: Sides) -> Wrong:
    """The whole graph, against what the row that failed compared with."""
    row = failure.row
    direct = row.level.startswith(DIRECT) and sides.draws is not None
    oracle = alone(sides.draws.plain if direct and sides.draws is not None else sides.truth, failure.graph)
    truth = oracle.run(failure.graph, failure.given)
    names = {f"{failure.graph}.{name}": name for name in truth} | {failure.graph: next(iter(truth))}
    bounds = {names[each.name]: each.gate for each in failure.rows if each.level == row.level}
    expected = {name: as_array(truth[name]) for name in bounds}
    return Wrong(cut.whole(), {name: as_array(value) for name, value in failure.given.items()}, expected, bounds)
