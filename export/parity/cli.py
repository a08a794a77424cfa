"""``stiv parity``: measure a bundle against the reference, and fail when a gate does."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stiv_deploy.export.parity.ladder import ParityReport

CHECKPOINTS = Path("checkpoints")


def parity(
    bundle: Annotated[Path, typer.Argument(help="Folder written by 'stiv export'.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here as JSON.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="What the bundle was exported from; by default the one below checkpoints/ with its hash."),
    ] = None,
    scales: Annotated[
        Path | None,
        typer.Option(
            help="Scales of an fp8 or int8 bundle; by default the file with its hash in or beside the bundle."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Backend to measure (repeatable); by default all that run here.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps of the trajectories.")] = 10,
    record: Annotated[bool, typer.Option(help="Keep the rows in the bundle's manifest.")] = True,
) -> None:
    """Compare every graph, every step and whole runs with the reference; exit 1 if a gate fails.

    The truth is the reference in float64; gates derive from what plain PyTorch loses in the bundle's precision. For a
    bundle with 8-bit layers that is the fake-quantized reference, and direct_ rows compare with it.
    """
    from rich.console import Console

    from stiv_deploy.export.parity.files import (
        check_json_target,
        opened_pair,
        opened_scales,
        record_rows,
        runnable,
        write_json,
    )
    from stiv_deploy.export.parity.ladder import run_parity

    if json_file is not None:
        check_json_target(json_file)
    opened, loaded = opened_pair(bundle, checkpoint, CHECKPOINTS)
    ranges = opened_scales(opened, scales)
    backends = runnable(opened, backend)
    console = Console()
    with console.status("parity") as status:
        report = run_parity(opened, loaded, backends, steps, status.update, ranges)
    if record:
        record_rows(opened, report)
    if json_file is not None:
        write_json(json_file, report)
    for name in backends:
        console.print(parity_table(report, name))
    console.print(video_table(report))
    failed = [f"{row.level} {row.name} on {row.backend}" for row in report.rows if not row.passed]
    failed += [f"{gate.name} on {gate.backend}" for gate in report.video if not gate.passed]
    if failed:
        console.print(f"parity FAILED: {'; '.join(failed)}")
        raise typer.Exit(1)
    console.print(f"parity passed: {len(report.rows)} rows, {len(report.video)} video gates")


def parity_table(report: "ParityReport", backend: str) -> Any:
    """The rows of one backend as a table that fits a terminal of 80 columns."""
    from rich.box import SIMPLE
    from rich.table import Table

    pairs = [pair for pair in zip(report.rows, report.yardsticks, strict=True) if pair[0].backend == backend]
    table = Table(
        title=f"{backend}, {pairs[0][0].precision}: relative L2 error against the float64 reference",
        caption="direct: against the fake-quantized reference" if any(_direct(row.level) for row, _ in pairs) else None,
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("level", "name"):
        table.add_column(name, no_wrap=True)
    for name in ("error", "torch", "gate", "pass"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, yardstick in pairs:
        numbers = (f"{value:.1e}" for value in (row.rel_l2, yardstick, row.gate))
        table.add_row(
            "  direct" if _direct(row.level) else row.level, row.name, *numbers, "yes" if row.passed else "NO"
        )
    return table


def _direct(level: str) -> bool:
    from stiv_deploy.export.parity.ladder import DIRECT

    return level.startswith(DIRECT)


def video_table(report: "ParityReport") -> Any:
    """The video gates as a table for a terminal."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("video gate", "backend", "value", "at least", "pass", box=SIMPLE)
    for gate in report.video:
        passed = "yes" if gate.passed else "NO"
        table.add_row(gate.name, gate.backend, f"{gate.value:.4f}", f"{gate.gate:.2f}", passed)
    return table
