"""``stiv parity``: measure a bundle against the reference, and fail when a gate does."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stiv_deploy.runtime.command.terminal import JsonTarget, answer, check_json, progress_bar, table

if TYPE_CHECKING:
    from rich.table import Table

    from stiv_deploy.export.parity.explain import ExplainReport
    from stiv_deploy.export.parity.ladder import ParityReport


def parity(
    bundle: Annotated[Path, typer.Argument(help="Folder written by 'stiv export'.")],
    json: JsonTarget = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="What the bundle was exported from; by default the one below checkpoints/ with its hash."),
    ] = None,
    scales: Annotated[
        Path | None,
        typer.Option(
            help="Scales of an fp8, int8 or nvfp4 bundle; by default the file with its hash in or beside the bundle."
        ),
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option(
            help="LoRA that was merged (repeatable); by default the file with its hash in or beside the bundle."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Backend to measure (repeatable); by default all that run here.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps of the trajectories.")] = 10,
    record: Annotated[bool, typer.Option(help="Keep the rows in the bundle's manifest.")] = True,
    explain: Annotated[
        Path | None,
        typer.Option(
            help="Look at graphs alone; of the first that fails name the module, and write it here to reproduce."
        ),
    ] = None,
) -> None:
    """Compare every graph, every step and whole runs with the reference; exit 1 if a gate fails.

    The truth is the reference in float64; gates derive from what plain PyTorch loses in the bundle's precision. For a
    bundle with 8-bit layers that is the fake-quantized reference, and direct_ rows compare with it.

    stiv parity bundle --json parity.json
    stiv parity bundle --explain out/why
    """
    if explain is not None:
        explain_failure(bundle, explain, json, checkpoint, scales, lora, backend)
        return
    from stiv_deploy.export.parity.files import report_json
    from stiv_deploy.export.parity.stage import ParityRequest, run_parity
    from stiv_deploy.runtime.bundle.manifest import MANIFEST

    check_json(json, bundle / MANIFEST, checkpoint, scales, *(lora or ()))
    request = ParityRequest(
        bundle=bundle,
        checkpoint=checkpoint,
        scales=scales,
        loras=tuple(lora or ()),
        backends=tuple(dict.fromkeys(backend or ())),
        steps=steps,
        record=record,
    )
    with progress_bar("parity") as progress:
        report = run_parity(request, progress)
    answer(json, lambda: report_json(report), lambda: show(report))
    if not report.passed:
        raise typer.Exit(1)


def explain_failure(
    bundle: Path,
    out: Path,
    json: Path | None,
    checkpoint: Path | None,
    scales: Path | None,
    lora: list[Path] | None,
    backend: list[str] | None,
) -> None:
    """Print the modules of the first graph that fails; exit 1 if one does."""
    from stiv_deploy.export.parity.explain import ExplainRequest, explain
    from stiv_deploy.runtime.bundle.manifest import MANIFEST
    from stiv_deploy.runtime.command.terminal import json_text

    check_json(json, bundle / MANIFEST, checkpoint, scales, *(lora or ()))
    request = ExplainRequest(
        bundle=bundle,
        out=out,
        checkpoint=checkpoint,
        scales=scales,
        loras=tuple(lora or ()),
        backends=tuple(dict.fromkeys(backend or ())),
    )
    with progress_bar("parity") as progress:
        report = explain(request, progress)
    answer(json, lambda: json_text(report), lambda: show_explanation(report))
    if not report.passed:
        raise typer.Exit(1)


def show_explanation(report: "ExplainReport") -> None:
    """Print the row that failed, the errors of its graph's modules, and where the reproduction is."""
    from rich.console import Console

    from stiv_deploy.export.parity.explanation import COLUMNS, NUMBERS

    console, found = Console(), report.explanation
    if found is None:
        console.print(f"nothing to explain: {len(report.rows)} rows passed, every graph alone is right")
        return
    row = found.row
    title = f"{row.level} {row.name} on {row.backend}, {row.precision}: error {row.rel_l2:.1e}, gate {row.gate:.1e}"
    caption = f"each module alone, on {found.measured_on}, on what the reference feeds it"
    console.print(table(title, COLUMNS, found.lines(), NUMBERS, caption))
    console.print(found.verdict, markup=False, highlight=False, soft_wrap=True)
    console.print(f"to reproduce: python {found.reproduction / 'reproduce.py'}", markup=False, soft_wrap=True)


def show(report: "ParityReport") -> None:
    """Print the rows of each backend, the video gates, and what failed."""
    from rich.console import Console

    console = Console()
    for name in dict.fromkeys(row.backend for row in report.rows):
        console.print(parity_table(report, name))
    console.print(video_table(report))
    failed = [f"{row.level} {row.name} on {row.backend}" for row in report.rows if not row.passed]
    failed += [f"{gate.name} on {gate.backend}" for gate in report.video if not gate.passed]
    counts = f"{len(report.rows)} rows, {len(report.video)} video gates"
    console.print(f"parity FAILED: {'; '.join(failed)}" if failed else f"parity passed: {counts}")


def parity_table(report: "ParityReport", backend: str) -> "Table":
    """The rows of one backend as a table that fits a terminal of 80 columns."""
    pairs = [pair for pair in zip(report.rows, report.yardsticks, strict=True) if pair[0].backend == backend]
    rows = [
        (
            "  direct" if _direct(row.level) else row.level,
            row.name,
            *(f"{value:.1e}" for value in (row.rel_l2, yardstick, row.gate)),
            "yes" if row.passed else "NO",
        )
        for row, yardstick in pairs
    ]
    numbers = ("error", "torch", "gate", "pass")
    title = f"{backend}, {pairs[0][0].precision}: relative L2 error against the float64 reference"
    caption = "direct: against the fake-quantized reference" if any(_direct(row.level) for row, _ in pairs) else None
    return table(title, ("level", "name", *numbers), rows, numbers, caption)


def _direct(level: str) -> bool:
    from stiv_deploy.export.parity.ladder import DIRECT

    return level.startswith(DIRECT)


def video_table(report: "ParityReport") -> "Table":
    """The video gates as a table for a terminal."""
    numbers = ("value", "at least")
    rows = [
        (gate.name, gate.backend, f"{gate.value:.4f}", f"{gate.gate:.2f}", "yes" if gate.passed else "NO")
        for gate in report.video
    ]
    return table("Video gates", ("video gate", "backend", *numbers, "pass"), rows, numbers)
