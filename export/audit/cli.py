"""``stiv audit``: what the builder fused, checked against what the plan promises, as a table and as JSON."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stiv_deploy.export.engines.cli import MIB, listed, sm_name
from stiv_deploy.runtime.command.terminal import JsonTarget, answer, check_json, progress_bar, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from stiv_deploy.export.audit.audit import AuditReport
    from stiv_deploy.export.audit.fusion_audit import AuditRow


def audit(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, made by 'stiv export'.", show_default=False)],
    backend: Annotated[str, typer.Option(help="tensorrt-rtx (needs no GPU) or tensorrt.")] = "tensorrt-rtx",
    sm: Annotated[
        list[str] | None,
        typer.Option(help="GPUs to build for, as for 'stiv build'; repeatable. [default: 89,120; nvfp4: 120,121]"),
    ] = None,
    graphs: Annotated[
        list[str] | None,
        typer.Option(
            help="Graphs to audit; 'blocks' is all blocks, 'halves' all halves of them. "
            "[default: both, text_kv, embed, head, step, 16-bit VAE]"
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="Audit this build log, or trtexec's layer-information JSON, instead of building; "
            "it is of the graph that --graphs names (block_00 if not given)."
        ),
    ] = None,
    json: JsonTarget = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Builders at a time.", show_default=False)] = None,
    shared_plan: Annotated[
        bool,
        typer.Option(
            "--shared-plan",
            help="Of engines with weights as inputs, and note what that loses. [default: where the bundle has such]",
        ),
    ] = False,
) -> None:
    """Check which kernels an engine has: products in the planned 8 or 4-bit types, attention fused; exit 1 if not.

    Each distinct graph is built in a builder process of its own, without a GPU; nothing is written into the bundle.

    stiv audit bundle --sm 89
    """
    from stiv_deploy.export.audit.audit import AuditRequest, audit_bundle
    from stiv_deploy.runtime.bundle.manifest import MANIFEST
    from stiv_deploy.runtime.tensorrt_library import parse_flavour

    check_json(json, bundle / MANIFEST, log)
    request = AuditRequest(
        bundle=bundle,
        backend=parse_flavour(backend),
        sms=tuple(map(sm_name, listed(sm, "--sm"))),
        graphs=listed(graphs, "--graphs"),
        log=log,
        jobs=jobs,
        shared_plan=shared_plan,
    )
    with progress_bar("audit") as progress:
        report = audit_bundle(request, progress)
    answer(json, report.to_json, lambda: show(report))
    if not report.passed:
        raise typer.Exit(1)


def show(report: "AuditReport") -> None:
    """Print the checks, the engines, and every check that failed."""
    from rich.console import Console

    from stiv_deploy.export.audit.fusion_audit import failures

    console = Console()
    console.print(check_table(report), engine_table(report))
    for note in report.notes:
        line = f"note: {note.graph}: {note.text} ({note.target}, bucket {note.bucket})"
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if report.passed:
        console.print(f"audit passed: {len(report.rows)} checks on {len(report.engines)} engines")
    else:
        lines = failures(report.rows)
        console.print("audit FAILED:", *lines, sep="\n  ", soft_wrap=True, markup=False, highlight=False)


def check_table(report: "AuditReport") -> "Table":
    """The checks of one kind of engine after another; products that passed with equal types share a row."""
    same = {engine.graph: engine.same for engine in report.engines}
    targets = {row.target for row in report.rows}
    lines = []
    for (graph, expected, found, passed, _), rows in grouped(report.rows).items():
        names = list(dict.fromkeys(row.name for row in rows))
        check = names[0] if len(names) == 1 else f"{len(names)} GEMMs"
        where = {row.target for row in rows}
        others = f" (x{len(same[graph])})" if len(same[graph]) > 1 else ""
        place = "" if where == targets else f" ({', '.join(sorted(where))})"
        lines.append((graph + others, check, expected, found + place, "yes" if passed else "NO"))
    return table(report.builder, ("graph", "check", "expected", "found", "pass"), lines)


def grouped(rows: "Sequence[AuditRow]") -> "dict[tuple[str, str, str, bool, str], list[AuditRow]]":
    """Rows that one line of the table can tell: same graph, expectation, finding and verdict.

    Products that passed go together; whatever else there is keeps its name.
    """
    groups: dict[tuple[str, str, str, bool, str], list[AuditRow]] = {}
    for row in rows:
        name = "" if row.passed and row.name.endswith(" GEMM") else row.name
        groups.setdefault((row.graph, row.expected, row.found, row.passed, name), []).append(row)
    return groups


def engine_table(report: "AuditReport") -> "Table":
    """The engines as a table: kernels, size, build time."""
    numbers = ("kernels", "MiB", "build s")
    rows = [
        (
            engine.graph,
            engine.target,
            engine.bucket,
            str(engine.kernels),
            f"{engine.plan_bytes / MIB:.1f}" if engine.plan_bytes else "",
            f"{engine.build_seconds:.1f}" if engine.plan_bytes else "",
        )
        for engine in report.engines
    ]
    return table("Engines", ("engine", "target", "bucket", *numbers), rows, numbers)
