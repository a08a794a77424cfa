"""``stiv export``: a bundle from a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from stiv_deploy.runtime.bundle.contract import FORMATS, Format, Precision
from stiv_deploy.runtime.command.terminal import JsonTarget, answer, check_json, json_text, progress_bar

if TYPE_CHECKING:
    from stiv_deploy.export.request import ExportRequest
    from stiv_deploy.runtime.bundle.engine_files import Attention
    from stiv_deploy.runtime.bundle.manifest import Range

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
        str,
        typer.Option(
            help="float32, float16, bfloat16 (fp32, fp16, bf16); 8 bits: fp8, int8; 4 bits: nvfp4 (never run by us)."
        ),
    ] = "float32",
    scales: Annotated[
        Path | None, typer.Option(help="Scale file of 'stiv calibrate', for fp8, int8 and nvfp4.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Precision plan for fp8, int8 and nvfp4. [default: the usual]")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="Type of what is not 8 or 4 bits, for fp8, int8 and nvfp4. [default: float16]")
    ] = None,
    batch: Annotated[str | None, typer.Option(metavar=RANGE, help="Requests in one call. [default: 1:1:4]")] = None,
    frames: Annotated[str | None, typer.Option(metavar=RANGE, help="Frames. [default: from the checkpoint]")] = None,
    height: Annotated[str | None, typer.Option(metavar=RANGE, help="Height in pixels, likewise.")] = None,
    width: Annotated[str | None, typer.Option(metavar=RANGE, help="Width in pixels, likewise.")] = None,
    attention: Annotated[
        str, typer.Option(help="native, or plugin: the blocks also in a form with nodes for the attention plugins.")
    ] = "native",
    vae_precision: Annotated[
        str | None,
        typer.Option(
            help="What engines compute the VAE in: float32, bfloat16 or float16. "
            "[default: bfloat16, float32 of a float32 bundle]"
        ),
    ] = None,
    halves: Annotated[
        bool, typer.Option("--halves", help="The blocks also in two halves, for one clip on several devices.")
    ] = False,
    skips: Annotated[
        bool, typer.Option("--skips", help="Graphs also for steps that skip the blocks, which 'stiv tune' tries then.")
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:SCALE]", help="LoRA to merge into the weights, by default whole; repeatable."),
    ] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Skip the comparison with the reference.")] = False,
    json: JsonTarget = None,
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs, each checked against the reference.

    Sizes are ranges: what requests may ask for, and what engines are tuned for.

    stiv export checkpoints/world --out bundle
    stiv export checkpoints/world --out bundle --precision bfloat16 --frames 1:16:32
    stiv export checkpoints/world --out bundle --lora look.safetensors:0.8
    """
    check_json(json, checkpoint, scales, plan, *lora_files(lora))
    sizes = {"batch": batch, "frames": frames, "height": height, "width": width}
    request = request_of(
        checkpoint,
        precision,
        scales,
        plan,
        activations,
        out=out,
        sizes={name: parse_range(name, text) for name, text in sizes.items() if text is not None},
        attention=parse_attention(attention),
        vae_precision=None if vae_precision is None else parse_precision(vae_precision, "vae-precision"),
        halves=halves,
        skips=skips,
        loras=tuple(lora or ()),
        check=not no_check,
    )
    with progress_bar("export") as progress:
        progress("loading", 0, 1)
        from stiv_deploy.export.bundle_from_checkpoint import export_bundle

        report = export_bundle(request, progress)
    answer(json, lambda: json_text(report), lambda: typer.echo(report))


def lora_files(options: list[str] | None) -> list[Path]:
    """The files of --lora; raises :class:`~stiv_deploy.runtime.errors.LoraError`."""
    from stiv_deploy.runtime.bundle.lora import parse_lora

    return [parse_lora(option)[0] for option in options or ()]


def request_of(
    checkpoint: Path, precision: str, scales: Path | None, plan: Path | None, activations: str | None, **rest: Any
) -> "ExportRequest":
    """The request that the options make, with the ``rest`` of its fields; :class:`ExportError` if they do not fit."""
    from stiv_deploy.export.errors import ExportError
    from stiv_deploy.export.request import ExportRequest

    given = {"checkpoint": checkpoint, "scales": scales, "plan": plan, **rest}
    if precision.lower() in FORMATS:
        high = parse_precision(activations or ACTIVATIONS, "activations")
        return ExportRequest(precision=high, format=cast(Format, precision.lower()), **given)
    if activations is not None:
        raise ExportError(f"--activations is for --precision {', '.join(FORMATS)}, not for {precision}")
    return ExportRequest(precision=parse_precision(precision), **given)


def parse_precision(text: str, option: str = "precision") -> Precision:
    """The type of a bundle's tensors by its name or alias; :class:`ExportError` names ``option`` if there is none."""
    from stiv_deploy.export.errors import ExportError

    try:
        return PRECISIONS[text.lower()]
    except KeyError:
        names = [*get_args(Precision), *(FORMATS if option == "precision" else ())]
        wanted = f"{', '.join(names[:-1])} or {names[-1]}"
        raise ExportError(f"--{option} {text}: no such precision; use {wanted}") from None


def parse_attention(text: str) -> "Attention":
    """The form of attention by its name; :class:`ExportError` if there is none."""
    from stiv_deploy.export.errors import ExportError
    from stiv_deploy.runtime.bundle.engine_files import Attention

    forms = get_args(Attention)
    if text not in forms:
        raise ExportError(f"--attention {text}: no such form of attention; use {' or '.join(forms)}")
    return cast(Attention, text)


def parse_range(name: str, text: str) -> "Range":
    """``MIN:TYPICAL:MAX``, or one number for all three, as a :class:`Range`; :class:`ExportError` if it is not one."""
    from pydantic import ValidationError

    from stiv_deploy.export.errors import ExportError
    from stiv_deploy.runtime.bundle.bounds import SIZE_LIMIT
    from stiv_deploy.runtime.bundle.manifest import Range
    from stiv_deploy.runtime.errors import one_line

    parts = text.split(":")
    try:
        low, typical, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
        return Range(min=low, typical=typical, max=high)
    except (ValueError, ValidationError):
        raise ExportError(
            f"--{name} {one_line(text, 80)}: not a range; give MIN:TYPICAL:MAX, from 1 to {SIZE_LIMIT} and not "
            "decreasing, such as 1:8:16"
        ) from None
