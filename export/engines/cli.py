"""``stiv build``: arguments in, a progress bar, and a table of the engines made."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stiv_deploy.export.engines.build import BuiltEngine, EngineBuild

MIB = 2**20


def listed(values: list[str] | None) -> tuple[str, ...]:
    """Options given repeatedly or as comma-separated lists, as one tuple without repeats."""
    names = [name.strip() for value in values or [] for name in value.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


def expanded(names: tuple[str, ...], known: "Sequence[str]") -> tuple[str, ...]:
    """Replace the word ``blocks`` by the names of all blocks."""
    from stiv_deploy.runtime.bundle.contract import is_block

    blocks = [name for name in known if is_block(name)]
    return tuple(dict.fromkeys(each for name in names for each in (blocks if name == "blocks" else [name])))


def _with_progress(job: "EngineBuild") -> "list[BuiltEngine]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("engines", total=len(job.graphs))

        def report(engine: "BuiltEngine") -> None:
            progress.update(task, advance=1, description=f"engines ({engine.graph})")

        return job.run(report)


def _print_table(job: "EngineBuild", engines: "list[BuiltEngine]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("graph", "attention", title=f"{job.request.backend} {job.version}, SM {job.sm}")
    for column in ("MiB", "build s", "from"):
        table.add_column(column, justify="right")
    for engine in engines:
        source = "cache" if engine.cached else "builder"
        form = "native" if job.packaging_of(engine.graph) is None else job.request.attention
        table.add_row(engine.graph, form, f"{engine.plan.bytes / MIB:.1f}", f"{engine.plan.build_seconds:.1f}", source)
    total = sum(engine.plan.bytes for engine in engines) / MIB
    table.add_row("[bold]all", "", f"{total:.1f}", "", "", end_section=True)
    Console().print(table)


def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, made by 'stiv export'.", show_default=False)],
    backend: Annotated[str, typer.Option(help="tensorrt-rtx (needs no GPU to build) or tensorrt.")] = "tensorrt-rtx",
    sm: Annotated[
        str,
        typer.Option(
            help="GPU to build for: compute capability such as 89 or 120, 'portable', or 'auto' (the one here)."
        ),
    ] = "auto",
    bucket: Annotated[
        list[str] | None, typer.Option(help="Only this size bucket, in an engine of its own; repeatable.")
    ] = None,
    graphs: Annotated[
        list[str] | None, typer.Option(help="Only these graphs: names with commas between; 'blocks' is all blocks.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Builders at a time (RTX: one per core, at most 4; TensorRT: 1).", show_default=False),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Plan cache folder (~/.cache/stiv-deploy if not given).")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build even what the cache has.")] = False,
    optimization_level: Annotated[
        int | None,
        typer.Option(help="The builder's effort, 0 to 5 (the builder's default if not given).", min=0, max=5),
    ] = None,
    attention: Annotated[
        Literal["native", "plugin", "quick"],
        typer.Option(
            help="TensorRT's own, or our plugins (backend tensorrt, 'make plugins'): 'plugin' takes all, from a "
            "library that the engines need too, 'quick' temporal attention only, into the engines (16-bit bundles)."
        ),
    ] = "native",
) -> None:
    """Compile a bundle's graphs into engines for one kind of GPU.

    TensorRT-RTX needs no GPU for it. The engines go into the bundle, all or none; equal plans are taken from the cache.
    """
    from stiv_deploy.export.engines.build import BuildRequest, EngineBuild
    from stiv_deploy.export.engines.plan_cache import default_cache
    from stiv_deploy.runtime.bundle.bundle import Bundle
    from stiv_deploy.runtime.errors import EngineError
    from stiv_deploy.runtime.tensorrt_library import parse_flavour

    if jobs is not None and jobs < 1:
        raise EngineError(f"--jobs must be at least 1, got {jobs}")
    flavour = parse_flavour(backend)
    opened = Bundle.open(bundle)
    request = BuildRequest(
        backend=flavour,
        sm=sm.lower().removeprefix("sm"),
        buckets=listed(bucket),
        graphs=expanded(listed(graphs), list(opened.manifest.graphs)),
        jobs=jobs or 0,
        cache=default_cache() if cache is None else cache,
        rebuild=rebuild,
        optimization_level=optimization_level,
        attention=attention,
    )
    job = EngineBuild(opened, request)
    _print_table(job, _with_progress(job))
