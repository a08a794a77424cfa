"""``stiv calibrate``: ranges for layers in 8 or 4 bits, from the reference sampler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stiv_deploy.stiv_ref.commands.terminal import JsonTarget, answer, check_json, progress_bar

if TYPE_CHECKING:
    from stiv_deploy.calibration.request import CalibrationRequest
    from stiv_deploy.calibration.stage import CalibrationReport


def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, as written by 'stiv train'.")],
    precision: Annotated[
        str, typer.Option(help="fp8 (E4M3), int8, or nvfp4 (W4A4; its engines were never run by us).")
    ],
    out: Annotated[Path, typer.Option(help="Scale file to write (.safetensors), with its report beside it.")],
    samples: Annotated[int, typer.Option(help="Clips to sample, text-to-video and image-to-video in turn.")] = 40,
    steps: Annotated[int, typer.Option(help="Sampling steps of each.")] = 15,
    batch: Annotated[int, typer.Option(help="Clips sampled at once.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the first clip.")] = 0,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one a line.", show_default="the training captions")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of first frames (PNG, JPEG).", show_default="from the training data")
    ] = None,
    calibrator: Annotated[
        str | None,
        typer.Option(help="max, or percentile: clip the largest values.", show_default="percentile for int8, else max"),
    ] = None,
    percentile: Annotated[float, typer.Option(help="Percent of values kept by --calibrator percentile.")] = 99.99,
    per_channel: Annotated[bool, typer.Option("--per-channel", help="fp8: a range per output channel.")] = False,
    smoothquant: Annotated[
        float | None, typer.Option(metavar="ALPHA", help="int8: move outliers into the weights; 0.75 is good.")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Measure what quantizing each layer does; write a plan.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(help="With --sweep: keep layers high until the velocity's relative L2 error is below."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan to write with --sweep.", show_default="beside the scales, .plan.json")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    json: JsonTarget = None,
) -> None:
    """Calibrate a checkpoint for 8 or 4 bits on what the sampler really feeds it.

    Writes the scale file for 'stiv export --scales' and a report (.report.json, .report.md). Stop it with Ctrl-C and
    give the same command again to go on: the ranges are the same. --sweep also writes how sensitive each layer is, as
    figures and a heat map (.sweep.json, .sweep.png), and a precision plan for 'stiv export --plan'.

    stiv calibrate checkpoints/world --precision fp8 --out fp8.safetensors
    """
    check_json(json)
    request = _request(
        checkpoint=checkpoint,
        quantization=precision,
        out=out,
        settings={
            "samples": samples,
            "steps": steps,
            "batch": batch,
            "seed": seed,
            "calibrator": calibrator,
            "percentile": percentile,
        },
        prompts=prompts,
        images=images,
        per_channel=per_channel,
        smooth=smoothquant,
        sweep=sweep,
        budget=budget,
        plan=plan,
    )
    from stiv_deploy.calibration import stage

    with progress_bar("calibrate", quiet) as progress, _kept(request):
        report = stage.calibrate(request, progress)
    answer(json, lambda: report.model_dump_json(indent=1), lambda: typer.echo(summary(report)))


def summary(report: "CalibrationReport") -> str:
    """What was written, and the whole plans that a sweep compared."""
    lines = [f"{report.scales}: {report.quantization} scales"]
    if report.sweep is not None:
        lines += ["relative L2 error    of the velocity (worst timestep band)   of the final latents"]
        lines += [f"{row.plan:20} {max(row.measured):37.4f} {row.latents:22.4f}" for row in report.sweep.plans]
        lines += [f"{report.plan}: the plan, {len(report.sweep.plans[-1].high)} layers kept high beyond the default"]
    return "\n".join([*lines, f"{report.seconds:.0f} s"])


def _request(*, quantization: Any, settings: dict[str, Any], **rest: Any) -> "CalibrationRequest":
    """The checked request; one line for the first option that is wrong."""
    from pydantic import ValidationError

    from stiv_deploy.calibration.collect import CalibrationSettings
    from stiv_deploy.calibration.errors import CalibrationError
    from stiv_deploy.calibration.request import CalibrationRequest, usual_calibrator

    calibrator = settings["calibrator"] or usual_calibrator(quantization, rest["smooth"])
    try:
        checked = CalibrationSettings(**{**settings, "calibrator": calibrator})
    except ValidationError as error:
        fault = error.errors()[0]
        raise CalibrationError(f"--{fault['loc'][0]} {fault['input']}: {fault['msg']}") from None
    return CalibrationRequest(quantization=quantization, settings=checked, **rest)


@contextmanager
def _kept(request: "CalibrationRequest") -> Iterator[None]:
    """Say, when interrupted, that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        if request.state.exists():
            typer.echo(f"stopped; the same command goes on from {request.state}", err=True)
        raise
