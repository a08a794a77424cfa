"""``stiv demo``, which ``make demo`` runs: from the shipped checkpoint to videos and a report with pictures.

Export, RTX engines for one GPU architecture, the parity ladder, one text-to-video and one image-to-video clip; all of
it lands in one folder, and the report says what was run and what came out. With ``--precision`` the same in 8 bits.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stiv_deploy.export.demo.shared import Demo, Stage
    from stiv_deploy.export.parity.ladder import ParityReport
    from stiv_deploy.runtime.bundle.contract import Format

CHECKPOINT = Path("checkpoints/tiny")
SM = "89"


def plain_stages(demo: "Demo", sm: str) -> "list[Stage]":
    """Checkpoint -> bundle -> engines, where the builder is installed -> parity -> clips."""
    from stiv_deploy.export.demo.shared import Stage, build_stage, clip_stages
    from stiv_deploy.export.parity.stage import ParityRequest
    from stiv_deploy.export.request import ExportRequest

    return [
        Stage(
            title="Export to ONNX, each graph checked against the reference",
            words=(demo.checkpoint, "--out", demo.bundle),
            request=ExportRequest(checkpoint=demo.checkpoint, out=demo.bundle),
        ),
        *([] if demo.builder_missing("engines were built") else [build_stage(demo, sm)]),
        Stage(
            title="Parity with the float64 reference",
            words=(demo.bundle, "--checkpoint", demo.checkpoint),
            request=ParityRequest(bundle=demo.bundle, checkpoint=demo.checkpoint),
            json=demo.out / "parity.json",
        ),
        *clip_stages(demo),
    ]


def parity_lines(report: "ParityReport") -> list[str]:
    """The rows and the video gates as tables."""
    rows = [
        f"| {row.level} | {row.name} | {row.backend} | {row.rel_l2:.1e} | {plain:.1e} | {row.gate:.1e} | "
        f"{'yes' if row.passed else '**NO**'} |"
        for row, plain in zip(report.rows, report.yardsticks, strict=True)
    ]
    video = [
        f"| {gate.name} | {gate.backend} | {gate.value:.4f} | {gate.gate:.2f} | {'yes' if gate.passed else '**NO**'} |"
        for gate in report.video
    ]
    return [
        f"## Parity: {'passed' if report.passed else 'FAILED'}",
        "Relative L2 error against the float64 reference; *plain torch* is the reference in the bundle's precision.",
        "",
        "| level | name | backend | rel L2 | plain torch | gate | passed |",
        "|---|---|---|---:|---:|---:|---|",
        *rows,
        "",
        "| video gate | backend | value | at least | passed |",
        "|---|---|---:|---:|---|",
        *video,
        "",
    ]


def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for everything. [default: out/demo, out/demo-fp8]")] = None,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")] = CHECKPOINT,
    sm: Annotated[str, typer.Option(help="Compute capability of the engines, without the dot.")] = SM,
    precision: Annotated[str | None, typer.Option(help="fp8 or int8: the chain of a quantized bundle.")] = None,
) -> None:
    """Run the whole chain: export, build, parity, generate, report; with --precision also calibrate and audit.

    stiv demo --out out/demo
    """
    chosen = None if precision is None else _format(precision)

    from rich.console import Console

    from stiv_deploy.export.demo.quantized import LEGEND, quantized_stages
    from stiv_deploy.export.demo.shared import Demo, finish, report_lines, write_first_frame
    from stiv_deploy.runtime.files import make_folder
    from stiv_deploy.stiv_ref.checkpoint import open_checkpoint

    folder = out or Path("out/demo" if chosen is None else f"out/demo-{chosen}")
    open_checkpoint(checkpoint)
    make_folder(folder, "choose another --out")
    run = Demo(folder, checkpoint, Console())
    write_first_frame(folder)
    run.run(plain_stages(run, sm) if chosen is None else quantized_stages(run, sm, chosen))
    lines = report_lines(run, "STIV demo" if chosen is None else f"STIV demo, {chosen}")
    finish(run, [*lines, *(parity_lines(run.reports["parity"]) if chosen is None else LEGEND)])
    if run.failed:
        raise typer.Exit(1)


def _format(text: str) -> "Format":
    from stiv_deploy.export.errors import ExportError
    from stiv_deploy.export.precision import FORMATS

    for name in FORMATS:
        if text == name:
            return name
    raise ExportError(f"--precision {text}: the demo has {' and '.join(FORMATS)}; leave it out for float32")
