"""``stiv export``: a bundle from a checkpoint."""

import time
from pathlib import Path
from typing import Annotated

import typer

PRECISIONS = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}
RANGE = "MIN:TYPICAL:MAX"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, as written by 'stiv train'.")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write; an existing bundle is replaced.")],
    precision: Annotated[str, typer.Option(help="float32, float16 or bfloat16 (fp32, fp16, bf16).")] = "float32",
    batch: Annotated[str | None, typer.Option(metavar=RANGE, help="Requests in one call. [default: 1:1:4]")] = None,
    frames: Annotated[str | None, typer.Option(metavar=RANGE, help="Frames. [default: from the checkpoint]")] = None,
    height: Annotated[str | None, typer.Option(metavar=RANGE, help="Height in pixels, likewise.")] = None,
    width: Annotated[str | None, typer.Option(metavar=RANGE, help="Width in pixels, likewise.")] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Skip the comparison with the reference.")] = False,
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs, each checked against the reference.

    Sizes are ranges: what requests may ask for, and what engines are tuned for.
    """
    from stiv_deploy.runtime.manifest import MANIFEST, Manifest

    started = time.monotonic()
    kind = parse_precision(precision)
    ranges = {"batch": batch, "frames": frames, "height": height, "width": width}
    given = {name: parse_range(name, text) for name, text in ranges.items() if text is not None}
    bundle = _export_with_progress(checkpoint, out, kind, given, not no_check)
    manifest = Manifest.model_validate_json((bundle / MANIFEST).read_text(encoding="utf-8"))
    files = [file for graph in manifest.graphs.values() for file in (graph.file, graph.data) if file]
    megabytes = sum(file.bytes for file in files) / 1e6
    checked = "not compared with the reference" if no_check else _checked(kind)
    typer.echo(
        f"{bundle}: {len(manifest.graphs)} graphs, {megabytes:.1f} MB, {kind}, {checked}, "
        f"{time.monotonic() - started:.0f} s"
    )


def _checked(precision: str) -> str:
    if precision == "bfloat16":
        return "float32 graphs checked (bfloat16 not executed: ONNX Runtime has no such kernels on CPUs)"
    return "all checked against the reference"


def _export_with_progress(checkpoint: Path, out: Path, precision: str, given: dict, check: bool) -> Path:
    """Run the export under a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("export"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)

        def show(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        from stiv_deploy.export.bundle_from_checkpoint import buckets_for, export_bundle

        buckets = buckets_for(checkpoint, given) if given else None
        return export_bundle(checkpoint, out, precision, buckets, check, show)  # type: ignore[arg-type]


def parse_precision(text: str) -> str:
    """A precision by its name or alias; :class:`ExportError` if there is none."""
    from stiv_deploy.export.errors import ExportError

    try:
        return PRECISIONS[text.lower()]
    except KeyError:
        raise ExportError(f"--precision {text}: no such precision; use float32, float16 or bfloat16") from None


def parse_range(name: str, text: str) -> object:
    """``MIN:TYPICAL:MAX``, or one number for all three, as a :class:`Range`; :class:`ExportError` if it is not one."""
    from pydantic import ValidationError

    from stiv_deploy.export.errors import ExportError
    from stiv_deploy.runtime.manifest import Range

    parts = text.split(":")
    try:
        low, typical, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
        return Range(min=low, typical=typical, max=high)
    except (ValueError, ValidationError):
        raise ExportError(
            f"--{name} {text}: not a range; give MIN:TYPICAL:MAX, positive and not decreasing, such as 1:8:16"
        ) from None
