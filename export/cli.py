"""``stiv export``: a bundle from a checkpoint."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self, cast, get_args

import typer

from stiv_deploy.export.precision import FORMATS
from stiv_deploy.runtime.bundle.contract import Format, Precision

if TYPE_CHECKING:
    from stiv_deploy.export.graphs.quantization import Quantization
    from stiv_deploy.runtime.bundle.engine_files import Attention

PRECISIONS: dict[str, Precision] = {
    **{name: name for name in get_args(Precision)},
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
"""Precisions by name and alias."""
ACTIVATIONS = "float16"
RANGE = "MIN:TYPICAL:MAX"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, as written by 'stiv train'.")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write; an existing bundle is replaced.")],
    precision: Annotated[
        str, typer.Option(help="float32, float16, bfloat16 (fp32, fp16, bf16), or 8 bits: fp8, int8.")
    ] = "float32",
    scales: Annotated[Path | None, typer.Option(help="Scale file of 'stiv calibrate', for fp8 and int8.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Precision plan for fp8 and int8. [default: the usual]")] = None,
    activations: Annotated[
        str | None, typer.Option(help="Type of what is not 8 bits, for fp8 and int8. [default: float16]")
    ] = None,
    batch: Annotated[str | None, typer.Option(metavar=RANGE, help="Requests in one call. [default: 1:1:4]")] = None,
    frames: Annotated[str | None, typer.Option(metavar=RANGE, help="Frames. [default: from the checkpoint]")] = None,
    height: Annotated[str | None, typer.Option(metavar=RANGE, help="Height in pixels, likewise.")] = None,
    width: Annotated[str | None, typer.Option(metavar=RANGE, help="Width in pixels, likewise.")] = None,
    attention: Annotated[
        str, typer.Option(help="native, or plugin: the blocks also in a form with nodes for the attention plugins.")
    ] = "native",
    no_check: Annotated[bool, typer.Option("--no-check", help="Skip the comparison with the reference.")] = False,
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs, each checked against the reference.

    Sizes are ranges: what requests may ask for, and what engines are tuned for.
    """
    from stiv_deploy.runtime.bundle.manifest import MANIFEST, Manifest
    from stiv_deploy.runtime.command.inspection import precision_text

    started = time.monotonic()
    request = ExportRequest.parse(checkpoint, precision, scales, plan, activations)
    form = parse_attention(attention)
    ranges = {"batch": batch, "frames": frames, "height": height, "width": width}
    given = {name: parse_range(name, text) for name, text in ranges.items() if text is not None}
    bundle = _export_with_progress(request, out, given, not no_check, form)
    manifest = Manifest.model_validate_json((bundle / MANIFEST).read_text(encoding="utf-8"))
    plugins = [graph.plugin for graph in manifest.graphs.values() if graph.plugin]
    files = [file for graph in manifest.graphs.values() for file in (graph.file, graph.data) if file]
    megabytes = sum(file.bytes for file in [*files, *(plugin.file for plugin in plugins)]) / 1e6
    graphs = f"{len(manifest.graphs)} graphs" + (f" ({len(plugins)} also with plugin nodes)" if plugins else "")
    checked = "not compared with the reference" if no_check else _checked(manifest.precision)
    typer.echo(
        f"{bundle}: {graphs}, {megabytes:.1f} MB, {precision_text(manifest)}, {checked}, "
        f"{time.monotonic() - started:.0f} s"
    )


def _checked(precision: str) -> str:
    if precision == "bfloat16":
        return "float32 graphs checked (bfloat16 not executed: ONNX Runtime has no such kernels on CPUs)"
    return "all checked against the reference"


def _export_with_progress(
    request: "ExportRequest", out: Path, given: dict, check: bool, attention: "Attention"
) -> Path:
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

        buckets = buckets_for(request.checkpoint, given) if given else None
        quantization = request.quantization()
        return export_bundle(request.checkpoint, out, request.precision, buckets, check, show, quantization, attention)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What the options ask for: ``precision`` is the type of the bundle's tensors, ``format`` the 8-bit one, if any."""

    checkpoint: Path
    precision: Precision
    format: Format | None = None
    scales: Path | None = None
    plan: Path | None = None

    @classmethod
    def parse(
        cls, checkpoint: Path, precision: str, scales: Path | None, plan: Path | None, activations: str | None
    ) -> Self:
        """Check the options against each other; :class:`ExportError` if they do not go together."""
        from stiv_deploy.export.errors import ExportError

        if precision.lower() not in FORMATS:
            for option, value in (("scales", scales), ("plan", plan), ("activations", activations)):
                if value is not None:
                    raise ExportError(f"--{option} is for --precision {' and '.join(FORMATS)}, not for {precision}")
            return cls(checkpoint=checkpoint, precision=parse_precision(precision))
        kind = cast(Format, precision.lower())
        if scales is None:
            raise ExportError(
                f"--precision {kind} needs --scales FILE; make it with: "
                f"stiv calibrate {checkpoint} --precision {kind} --out {kind}.safetensors"
            )
        high = parse_precision(activations or ACTIVATIONS, "activations")
        return cls(checkpoint=checkpoint, precision=high, format=kind, scales=scales, plan=plan)

    def quantization(self) -> "Quantization | None":
        """Scales and plan, read and checked against the checkpoint."""
        if self.format is None or self.scales is None:
            return None
        from stiv_deploy.export.graphs.quantization import load_quantization

        return load_quantization(self.checkpoint, self.format, self.scales, self.plan)


def parse_precision(text: str, option: str = "precision") -> Precision:
    """The type of a bundle's tensors by its name or alias; :class:`ExportError` names ``option`` if there is none."""
    from stiv_deploy.export.errors import ExportError

    try:
        return PRECISIONS[text.lower()]
    except KeyError:
        more = f", {' or '.join(FORMATS)}" if option == "precision" else ""
        wanted = f"float32, float16{',' if more else ' or'} bfloat16{more}"
        raise ExportError(f"--{option} {text}: no such precision; use {wanted}") from None


def parse_attention(text: str) -> "Attention":
    """The form of attention by its name; :class:`ExportError` if there is none."""
    from stiv_deploy.export.errors import ExportError
    from stiv_deploy.runtime.bundle.engine_files import Attention

    forms = get_args(Attention)
    if text not in forms:
        raise ExportError(f"--attention {text}: no such form of attention; use {' or '.join(forms)}")
    return cast(Attention, text)


def parse_range(name: str, text: str) -> object:
    """``MIN:TYPICAL:MAX``, or one number for all three, as a :class:`Range`; :class:`ExportError` if it is not one."""
    from pydantic import ValidationError

    from stiv_deploy.export.errors import ExportError
    from stiv_deploy.runtime.bundle.manifest import Range

    parts = text.split(":")
    try:
        low, typical, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
        return Range(min=low, typical=typical, max=high)
    except (ValueError, ValidationError):
        raise ExportError(
            f"--{name} {text}: not a range; give MIN:TYPICAL:MAX, positive and not decreasing, such as 1:8:16"
        ) from None
