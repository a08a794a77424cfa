"""``stiv demo``, which ``make demo`` runs: from the shipped checkpoint to videos and a report with pictures.

Export, RTX engines for one GPU architecture, the parity ladder, one text-to-video and one image-to-video clip; all of
it lands in one folder, and the report says what was run and what came out. With ``--precision`` the same in 8 bits.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stiv_deploy.export.demo.shared import Demo, Stage
    from stiv_deploy.runtime.bundle.contract import Format

CHECKPOINT = Path("checkpoints/world")
SM = "89"


def plain_stages(demo: "Demo", sm: str) -> "list[Stage]":
    """Checkpoint -> bundle -> engines, where the builder is installed -> parity -> clips."""
    from stiv_deploy.export.demo.clips import clip_stages
    from stiv_deploy.export.demo.shared import Stage, build_stage
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


def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for everything. [default: out/demo, out/demo-fp8]")] = None,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")] = CHECKPOINT,
    sm: Annotated[str, typer.Option(help="Compute capability of the engines, without the dot.")] = SM,
    precision: Annotated[
        str | None, typer.Option(help="fp8, int8, or nvfp4 (--sm 120): the chain of a quantized bundle.")
    ] = None,
) -> None:
    """Run the whole chain: export, build, parity, generate, report; with --precision also calibrate and audit.

    stiv demo --out out/demo
    """
    chosen = None if precision is None else _format(precision)

    from rich.console import Console

    from stiv_deploy.export.demo.clips import write_given
    from stiv_deploy.export.demo.finish import finish
    from stiv_deploy.export.demo.quantized import quantized_stages
    from stiv_deploy.export.demo.shared import Demo, check_sm
    from stiv_deploy.runtime.files import make_folder
    from stiv_deploy.stiv_ref.checkpoint import open_checkpoint

    sm = check_sm(sm, chosen)
    folder = out or Path("out/demo" if chosen is None else f"out/demo-{chosen}")
    open_checkpoint(checkpoint)
    make_folder(folder, "choose another --out")
    run = Demo(folder, checkpoint, Console())
    write_given(run)
    run.run(plain_stages(run, sm) if chosen is None else quantized_stages(run, sm, chosen))
    finish(run, "STIV demo" if chosen is None else f"STIV demo, {chosen}")
    if run.failed:
        raise typer.Exit(1)


def _format(text: str) -> "Format":
    from stiv_deploy.export.errors import ExportError
    from stiv_deploy.runtime.bundle.contract import FORMATS

    for name in FORMATS:
        if text == name:
            return name
    raise ExportError(f"--precision {text}: the demo has {', '.join(FORMATS)}; leave it out for float32")
