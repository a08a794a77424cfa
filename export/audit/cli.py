"""``stiv audit``: what the builder fused, checked against what the plan promises, as a table and as JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stiv_deploy.export.engines.cli import MIB, expanded, listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stiv_deploy.export.audit.audit import Audit, AuditReport
    from stiv_deploy.export.audit.fusion_audit import AuditRow
    from stiv_deploy.runtime.bundle.bundle import Bundle

DEFAULT_SMS = ("89", "120")


def audit(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, made by 'stiv export'.", show_default=False)],
    backend: Annotated[str, typer.Option(help="tensorrt-rtx (needs no GPU) or tensorrt.")] = "tensorrt-rtx",
    sm: Annotated[
        list[str] | None, typer.Option(help="GPUs to build for, as for 'stiv build'; repeatable. [default: 89,120]")
    ] = None,
    graphs: Annotated[
        list[str] | None,
        typer.Option(help="Graphs to audit; 'blocks' is all blocks. [default: blocks, text_kv, embed, head, step]"),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="Audit this build log, or trtexec's layer-information JSON, instead of building; "
            "it is of the graph that --graphs names (block_00 if not given)."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every check here as JSON.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Builders at a time.", show_default=False)] = None,
) -> None:
    """Check which kernels an engine has: products in the planned 8-bit types, attention fused; exit 1 if not.

    Each distinct graph is built in a builder process of its own, without a GPU; nothing is written into the bundle.
    """
    from rich.console import Console

    from stiv_deploy.export.audit.fusion_audit import failures
    from stiv_deploy.runtime.bundle.bundle import Bundle

    if json_file is not None:
        check_target(json_file)
    opened = Bundle.open(bundle)
    names = expanded(listed(graphs), list(opened.manifest.graphs))
    if log is None:
        title, report = _built(opened, backend, listed(sm) or DEFAULT_SMS, names, jobs)
    else:
        title, report = log.name, _logged(opened, names, log)
    if json_file is not None:
        _write(json_file, opened, title, report)
    console = Console()
    for table in (check_table(report, title), engine_table(report)):
        console.print(table)
    failed = failures(report.rows)
    if failed:
        console.print("audit FAILED:", *failed, sep="\n  ", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(1)
    console.print(f"audit passed: {len(report.rows)} checks on {len(report.engines)} engines")


def _built(
    bundle: "Bundle", backend: str, sms: tuple[str, ...], graphs: tuple[str, ...], jobs: int | None
) -> "tuple[str, AuditReport]":
    from stiv_deploy.export.audit.audit import Audit
    from stiv_deploy.export.engines.build import default_jobs
    from stiv_deploy.runtime.tensorrt_library import parse_flavour

    flavour = parse_flavour(backend)
    targets = [name.lower().removeprefix("sm") for name in sms]
    run = Audit(bundle, flavour, targets, graphs, jobs or default_jobs(flavour))
    return run.title, _with_progress(run)


def _with_progress(run: "Audit") -> "AuditReport":
    from rich.console import Console

    with Console(stderr=True).status("audit") as status:
        return run.run(lambda text, done, total: status.update(f"audit: {done} of {total} engines ({text})"))


def _logged(bundle: "Bundle", graphs: tuple[str, ...], log: Path) -> "AuditReport":
    from stiv_deploy.export.audit.audit import audit_log
    from stiv_deploy.runtime.errors import EngineError

    chosen = graphs or ("block_00",)
    if len(chosen) != 1 or chosen[0] not in bundle.manifest.graphs:
        known = ", ".join(bundle.manifest.graphs)
        raise EngineError(f"--log is of one graph, got --graphs {','.join(chosen)}; the bundle has {known}")
    return audit_log(bundle, chosen[0], log)


def check_target(path: Path) -> None:
    """:class:`OutputError` if ``path`` cannot become a file."""
    from stiv_deploy.runtime.errors import OutputError

    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: cannot be written; name a file in a folder that exists")


def _write(path: Path, bundle: "Bundle", title: str, report: "AuditReport") -> None:
    from stiv_deploy.export.audit.fusion_audit import audit_json
    from stiv_deploy.runtime.files import write_text

    quantization = bundle.manifest.quantization
    facts = {
        "model": bundle.manifest.model.name,
        "precision": bundle.manifest.precision,
        "quantization": quantization.format if quantization else None,
        "builder": title,
        "engines": [asdict(engine) for engine in report.engines],
    }
    write_text(path, audit_json(facts, report.rows))


def check_table(report: "AuditReport", title: str) -> Any:
    """The checks of one kind of engine after another; products that passed with equal types share a row."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("graph", "check", "expected", "found", "pass", title=title, box=SIMPLE)
    same = {engine.graph: engine.same for engine in report.engines}
    targets = {row.target for row in report.rows}
    for (graph, expected, found, passed, _), rows in grouped(report.rows).items():
        names = list(dict.fromkeys(row.name for row in rows))
        check = names[0] if len(names) == 1 else f"{len(names)} GEMMs"
        where = {row.target for row in rows}
        others = f" (x{len(same[graph])})" if len(same[graph]) > 1 else ""
        place = "" if where == targets else f" ({', '.join(sorted(where))})"
        table.add_row(graph + others, check, expected, found + place, "yes" if passed else "NO")
    return table


def grouped(rows: "Sequence[AuditRow]") -> "dict[tuple[str, str, str, bool, str], list[AuditRow]]":
    """Rows that one line of the table can tell: same graph, expectation, finding and verdict.

    Products that passed go together; whatever else there is keeps its name.
    """
    groups: dict[tuple[str, str, str, bool, str], list[AuditRow]] = {}
    for row in rows:
        name = "" if row.passed and row.name.endswith(" GEMM") else row.name
        groups.setdefault((row.graph, row.expected, row.found, row.passed, name), []).append(row)
    return groups


def engine_table(report: "AuditReport") -> Any:
    """The engines as a table: kernels, size, build time."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("engine", "target", "bucket", box=SIMPLE)
    for column in ("kernels", "MiB", "build s"):
        table.add_column(column, justify="right")
    for engine in report.engines:
        built = (f"{engine.plan_bytes / MIB:.1f}", f"{engine.build_seconds:.1f}") if engine.plan_bytes else ("", "")
        table.add_row(engine.graph, engine.target, engine.bucket, str(engine.kernels), *built)
    return table
