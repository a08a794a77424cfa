"""``stiv calibrate``: ranges for 8-bit layers, from the reference sampler."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stiv_deploy.calibration.run import CalibrationRequest, Progress
    from stiv_deploy.calibration.sweep_files import SweepReport


def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, as written by 'stiv train'.")],
    precision: Annotated[str, typer.Option(help="fp8 (E4M3) or int8.")],
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
) -> None:
    """Calibrate a checkpoint for 8 bits on what the sampler really feeds it.

    Writes the scale file for 'stiv export --scales' and a report (.report.json, .report.md). Stop it with Ctrl-C and
    give the same command again to go on: the ranges are the same. --sweep also writes how sensitive each layer is, as
    figures and a heat map (.sweep.json, .sweep.png), and a precision plan for 'stiv export --plan'.
    """
    started = time.monotonic()
    request = _request(
        checkpoint=checkpoint,
        quantization=precision,
        out=out,
        settings={
            "samples": samples,
            "steps": steps,
            "batch": batch,
            "seed": seed,
            "calibrator": calibrator or ("percentile" if precision == "int8" and smoothquant is None else "max"),
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
    from stiv_deploy.calibration.run import calibrate as run_calibration
    from stiv_deploy.calibration.run import finish

    with _progress(quiet) as progress, _kept(request):
        found = run_calibration(request, progress)
        lines = [f"{out}: {precision} scales"]
        if request.sweep:
            from stiv_deploy.calibration.sweep import run_sweep

            lines += _plan_lines(run_sweep(found, request, progress), request)
        finish(request)
    typer.echo("\n".join(lines) + f"\n{time.monotonic() - started:.0f} s")


def _plan_lines(report: "SweepReport", request: "CalibrationRequest") -> list[str]:
    """The whole plans that a sweep compared, and where the one to use is."""
    lines = ["relative L2 error    of the velocity (worst timestep band)   of the final latents"]
    lines += [f"{row.plan:20} {max(row.measured):37.4f} {row.latents:22.4f}" for row in report.plans]
    kept = report.plans[-1].high
    return [*lines, f"{request.plan_path}: the plan, {len(kept)} layers kept high beyond the default"]


def _request(*, quantization: str, settings: dict[str, Any], **rest: Any) -> "CalibrationRequest":
    """The checked request; one line for the first option that is wrong."""
    from stiv_deploy.calibration.errors import CalibrationError

    if quantization not in ("fp8", "int8"):
        raise CalibrationError(f"--precision {quantization}: cannot be calibrated; use fp8 or int8")

    from pydantic import ValidationError

    from stiv_deploy.calibration.collect import CalibrationSettings
    from stiv_deploy.calibration.run import CalibrationRequest, check_request

    try:
        checked = CalibrationSettings(**settings)
    except ValidationError as error:
        fault = error.errors()[0]
        raise CalibrationError(f"--{fault['loc'][0]} {fault['input']}: {fault['msg']}") from None
    request = CalibrationRequest(quantization=quantization, settings=checked, **rest)  # type: ignore[arg-type]
    check_request(request)
    return request


@contextmanager
def _kept(request: "CalibrationRequest") -> Iterator[None]:
    """Say, when interrupted, that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        if request.state.exists():
            typer.echo(f"stopped; the same command goes on from {request.state}", err=True)
        raise


@contextmanager
def _progress(quiet: bool) -> "Iterator[Progress]":
    """A progress bar for each kind of work, as a function."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(text: str, done: int, total: int) -> None:
            if text not in tasks:
                tasks[text] = bar.add_task(text, total=total)
            bar.update(tasks[text], completed=done, total=total)

        yield show
