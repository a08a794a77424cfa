"""``stiv verify``: a bundle held against its golden answers, on the machine that will run it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stiv_deploy.runtime.command.terminal import JsonTarget, answer, check_json, json_text, progress_bar, table

if TYPE_CHECKING:
    from rich.table import Table

    from stiv_deploy.runtime.pipeline.verification import BackendProof, VerifyReport
    from stiv_deploy.runtime.sampling.golden_run import VerifyRow


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, made by 'stiv export'.", show_default=False)],
    backend: Annotated[
        list[str] | None, typer.Option(help="Backend to verify (repeatable); by default all that run here.")
    ] = None,
    device: Annotated[int, typer.Option(metavar="INDEX", help="GPU, as CUDA counts them.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One size of each graph only.")] = False,
    record: Annotated[bool, typer.Option(help="Keep the result beside the bundle.")] = True,
    json: JsonTarget = None,
) -> None:
    """Hold every graph of a bundle against answers that it was exported with; exit 1 if one is wrong.

    Neither checkpoint nor torch is needed. The result holds for this device, driver, library and these engines. A
    backend that gave wrong results is passed over from then on, where none is named.

    stiv verify bundle --json verify.json
    """
    from stiv_deploy.runtime.pipeline.verification import VerifyRequest
    from stiv_deploy.runtime.pipeline.verification import verify as run

    check_json(json, bundle)
    request = VerifyRequest(
        bundle=bundle,
        backends=tuple(dict.fromkeys(backend or ())),
        device=device,
        threads=threads,
        quick=quick,
        record=record,
    )
    with progress_bar("verify") as progress:
        report = run(request, progress)
    answer(json, lambda: json_text(report), lambda: show(report))
    if not report.passed:
        raise typer.Exit(1)


def show(report: "VerifyReport") -> None:
    """Print the table of each backend, and in a line what failed."""
    from rich.console import Console

    console = Console()
    for proof in report.proofs:
        console.print(proof_table(proof))
        for fault in dict.fromkeys(row.fault for row in proof.rows if row.fault):
            console.print(fault, markup=False, soft_wrap=True)
        console.print(verdict(proof), markup=False, soft_wrap=True)
    if report.unanswered:
        console.print(f"no golden answers: {', '.join(report.unanswered)}", markup=False, soft_wrap=True)


def proof_table(proof: "BackendProof") -> "Table":
    """The output of each graph that comes nearest to its gate."""
    machine = proof.result.machine
    rows = [_cells(row) for row in nearest(proof.rows)]
    columns = ("graph", "outputs", "nearest to its gate", "error", "gate", "")
    title = f"{machine.backend}: {machine.device}, {machine.library}"
    return table(title, columns, rows, columns[3:5])


def nearest(rows: "tuple[VerifyRow, ...]") -> "list[tuple[VerifyRow, int]]":
    """For each subject the row with the largest share of its gate, and how many it has."""
    groups: dict[str, list[VerifyRow]] = {}
    for row in rows:
        groups.setdefault(row.subject, []).append(row)
    return [(max(group, key=lambda row: row.error / row.gate), len(group)) for group in groups.values()]


def _cells(found: "tuple[VerifyRow, int]") -> tuple[str, ...]:
    row, count = found
    where = "it does not run" if row.fault else f"{row.output}, {row.size}"
    return row.subject, str(count), where, f"{row.error:.1e}", f"{row.gate:.1e}", "" if row.passed else "WRONG"


def verdict(proof: "BackendProof") -> str:
    """The result in one line."""
    from stiv_deploy.runtime.errors import few

    result, name = proof.result, proof.result.machine.backend
    if result.passed:
        return f"{name}: verified, {result.compared} outputs in {proof.seconds:.1f} s"
    wrong = len(result.failed)
    return f"{name}: WRONG results in {wrong} of {len({row.subject for row in proof.rows})}: {few(result.failed)}"
