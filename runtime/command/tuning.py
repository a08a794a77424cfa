"""``stiv tune``: the best solver and times of a bundle or checkpoint for every number of steps."""

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from stiv_deploy.runtime.command.generation import requests_from_options
from stiv_deploy.runtime.command.terminal import JsonTarget, answer, check_json, json_text, progress_bar, table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from stiv_deploy.runtime.pipeline.tuning import TuneReport, TuneRequest
    from stiv_deploy.runtime.progress import Progress
    from stiv_deploy.runtime.sampling.tuning import Interval, Point, Skip

SUFFIX = ".svg"
OF_CHECKPOINTS = "stiv_deploy.of_checkpoints"
"""Group of entry points: stages that take a checkpoint where the runtime's take a bundle."""


def tune(
    context: typer.Context,
    bundle: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE|CHECKPOINT", help="Folder of 'stiv export', or of 'stiv train'.", show_default=False
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="What to try on; repeat it for several clips.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text file of more prompts, one a line; empty lines are none.")
    ] = None,
    request: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Request, or a list of them, as JSON, with all that 'stiv generate --request' reads."
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(help="Clips of each prompt. Default: 1.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first clip's noise.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the bundle's.")] = None,
    guidance_mode: Annotated[
        Literal["jit", "sit", "none"] | None,
        typer.Option(help="Text and image together, separately, or no guidance. Default: the bundle's."),
    ] = None,
    evaluations: Annotated[
        list[int] | None,
        typer.Option(help="Evaluations of the model to make the best of (repeatable). Default: 9 numbers, 4 to 30."),
    ] = None,
    solver: Annotated[
        list[str] | None, typer.Option(metavar="[euler|heun|ab2]", help="Solver to try (repeatable). Default: all.")
    ] = None,
    time_shift: Annotated[
        list[float] | None,
        typer.Option(help="Time shift to try (repeatable), besides the bundle's own. Default: 0.5, 1, 2, 4, 8."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="How well the exact flow has to be known, as a relative L2 error of latents.")
    ] = 2e-3,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Picture of all that was tried: evaluations against error.")
    ] = None,
    record: Annotated[
        bool, typer.Option(help="Keep the best in the bundle's manifest, as what its requests get by default.")
    ] = True,
    backend: Annotated[str | None, typer.Option(help="Backend ('stiv doctor' lists them); default: the best.")] = None,
    device: Annotated[int, typer.Option(metavar="INDEX", help="GPU, as CUDA counts them.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    json: JsonTarget = None,
) -> None:
    """Find the solver and times that make the best of few evaluations of the model.

    Each is compared with the exact flow of the same bundle, sampled with so many steps that twice as many change
    little. Half of the clips choose, the others judge. Of three clips or more AB2's weights are then fitted to those
    that choose, over its best times and with longer late steps. From then on 'stiv generate --steps 10' uses the best
    for 10 steps; --solver, --time-shift and --late-stretch win over that. 'stiv inspect' lists it. Guidance that ends
    early (--guidance-until) is tried on the best, and told where it comes nearer than fewer steps that cost as much; it
    stays yours to ask for.

    A checkpoint is tried in a float32 bundle that is then thrown away, and the best are kept beside it: each bundle
    that 'stiv export' makes of it has them.

    stiv tune bundle --prompts prompts.txt --out tuning.svg
    """
    from stiv_deploy.runtime.pipeline import tuning

    check_json(json, bundle, request, prompts)
    _check_picture(out, json, [bundle, request, prompts])
    requests, _ = requests_from_options(context.params | {"solver": None, "time_shift": None, "late_stretch": None})
    asked = tuning.TuneRequest(
        bundle=bundle,
        requests=tuple(requests),
        tolerance=tolerance,
        record=record,
        backend=backend,
        device=device,
        threads=threads,
        **_search_options(evaluations, solver, time_shift),
    )
    with progress_bar("tune") as progress:
        report = _stage_of(bundle)(asked, progress)
    if out is not None:
        _draw(out, report)
    answer(json, lambda: json_text(report), lambda: _show(report, asked, out))


def _stage_of(folder: Path) -> "Callable[[TuneRequest, Progress], TuneReport]":
    """The stage that tunes what is in ``folder``; that of checkpoints takes torch, and is found by its entry point."""
    from stiv_deploy.runtime.errors import RequestError
    from stiv_deploy.runtime.pipeline.tuning import tune as of_bundle

    if not _is_checkpoint(folder):
        return of_bundle
    found = tuple(entry_points(group=OF_CHECKPOINTS, name="tune"))
    if not found:
        raise RequestError(f"{folder}: is a checkpoint, which this installation cannot tune; export it first")
    return cast("Callable[[TuneRequest, Progress], TuneReport]", found[0].load())


def _is_checkpoint(folder: Path) -> bool:
    """Whether the config of ``folder`` says that it is one."""
    from stiv_deploy.runtime.files import read_json

    try:
        values = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("format") == "stiv-checkpoint"


def _search_options(
    evaluations: list[int] | None, solvers: list[str] | None, shifts: list[float] | None
) -> dict[str, Any]:
    """What was given, ascending and once each; :class:`~stiv_deploy.runtime.errors.RequestError` for other solvers."""
    from stiv_deploy.runtime.pipeline.limits import named
    from stiv_deploy.runtime.sampling.settings import Solver

    chosen = [named(Solver, "solver", each) for each in solvers or ()]
    values: dict[str, list[Any]] = {
        "budgets": sorted(set(evaluations or ())),
        "solvers": [each for each in Solver if each in chosen],
        "shifts": sorted(set(shifts or ())),
    }
    return {name: tuple(each) for name, each in values.items() if each}


def _check_picture(out: Path | None, json: Path | None, inputs: list[Path | None]) -> None:
    """Raise :class:`~stiv_deploy.runtime.errors.OutputError` if ``--out`` names what cannot become a picture."""
    from stiv_deploy.runtime.errors import OutputError
    from stiv_deploy.runtime.files import check_apart, check_file, check_no_bundle

    if out is None:
        return
    if out.suffix != SUFFIX:
        raise OutputError(f"{out}: the picture is an SVG file; give a name that ends in {SUFFIX}")
    if json is not None and json.absolute() == out.absolute():
        raise OutputError(f"{out}: named by both --out and --json; choose two names")
    check_file(out)
    check_apart([out], inputs)
    check_no_bundle(out)


def _draw(out: Path, report: "TuneReport") -> None:
    from stiv_deploy.runtime.command.tuning_plot import pareto_svg
    from stiv_deploy.runtime.files import write_text

    write_text(out, pareto_svg(report), "choose another --out")


def _show(report: "TuneReport", asked: "TuneRequest", out: Path | None) -> None:
    """The best, what was, and where all is kept."""
    from rich.console import Console

    Console().print(tuning_table(report))
    if report.intervals:
        _show_intervals(report)
    if report.skips:
        _show_skips(report)
    if out is not None:
        typer.echo(f"{out}: evaluations against error")
    if asked.record:
        typer.echo(f"{asked.bundle}: the best are its defaults now, by the number of steps")
    typer.echo(f"{report.seconds:.0f} s")


def _show_intervals(report: "TuneReport") -> None:
    """Where guidance that ends early beats fewer steps, if it does anywhere."""
    from rich.console import Console

    worthwhile = [each for each in report.intervals if each.worthwhile]
    if worthwhile:
        Console().print(interval_table(worthwhile))
    else:
        count = len(report.intervals)
        typer.echo(f"guidance that ends early ({count} tried) is nowhere nearer than fewer steps of as many rows")


def _show_skips(report: "TuneReport") -> None:
    """Where steps that skip the blocks beat fewer steps, if they do anywhere."""
    from rich.console import Console

    from stiv_deploy.runtime.sampling.tuning import nearest

    if best := nearest(each for each in report.skips if each.worthwhile):
        Console().print(skip_table(best))
    else:
        typer.echo(f"skipped blocks ({len(report.skips)} tried) are nowhere nearer than as many evaluations without")


def skip_table(found: "Sequence[Skip]") -> "Table":
    """What to gain from steps that skip the blocks, against as many evaluations without."""
    columns = ("evaluations", "--skip-blocks --steps", "skipped", "time shift", "late stretch", "error", "without")
    rows = [_skip_row(each) for each in found]
    return table("every second late step skips the blocks", columns, rows, columns)


def _skip_row(found: "Skip") -> tuple[str, ...]:
    evaluations, _, steps, *times, _weights, error = _row(found.point, "")
    skipped = len(found.point.grid.skipped_steps)
    return (evaluations, steps, str(skipped), *times, error, f"{found.fewer.error:.2e}")


def interval_table(found: "Sequence[Interval]") -> "Table":
    """What to gain from guidance that ends early, against fewer steps that take as many rows of the model."""
    grid = ("solver", "steps", "time shift", "late stretch")
    columns = ("--guidance-until", "rows of a clip", *grid, "error", "with fewer steps")
    rows = [_interval_row(each) for each in found]
    return table("guidance that ends early", columns, rows, tuple(each for each in columns if each != "solver"))


def _interval_row(found: "Interval") -> tuple[str, ...]:
    _, *grid, _weights, error = _row(found.point, "")  # a request gets those by itself
    return (f"{found.point.grid.guidance_until:g}", f"{found.rows:.3g}", *grid, error, f"{found.fewer.error:.2e}")


def tuning_table(report: "TuneReport") -> "Table":
    """The best for each number of evaluations, and the requests' own, as a table."""
    columns = ("evaluations", "solver", "steps", "time shift", "late stretch", "weights", "error")
    rows = [_row(each, "") for each in report.best] + [_row(report.own, " (before)")]
    title = f"{report.bundle[:12]}: relative L2 error of latents against the exact flow, {report.clips} clips"
    caption = f"the exact flow is known to {report.reference_error:.1e} ({report.reference.steps} steps)"
    return table(title, columns, rows, ("evaluations", "steps", "time shift", "late stretch", "error"), caption)


def _row(point: "Point", words: str) -> tuple[str, ...]:
    grid = point.grid
    return (
        str(point.evaluations),
        f"{grid.solver}{words}",
        str(grid.steps),
        f"{grid.time_shift:.3g}",
        f"{grid.late_stretch:g}",
        grid.weights,
        f"{point.error:.2e}",
    )
