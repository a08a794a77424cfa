"""``stiv build``: arguments in, a progress bar, and a table of the engines made."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stiv_deploy.runtime.command.terminal import JsonTarget, answer, check_json, json_text, progress_bar, table
from stiv_deploy.runtime.errors import RequestError

if TYPE_CHECKING:
    from stiv_deploy.export.engines.build import BuildReport, BuiltEngine

MIB = 2**20


def listed(values: list[str] | None, option: str) -> tuple[str, ...]:
    """``option``, given repeatedly or as comma-separated lists, as one tuple without repeats; empty if not given.

    Raises :class:`RequestError` if it is given and names nothing, which must not mean all.
    """
    given = ",".join(values or [])
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if values and not names:
        raise RequestError(f"{option} {given!r}: names nothing; give names with commas between, or leave it out")
    return names


def sm_name(text: str) -> str:
    """A compute capability as the request has it: ``89`` of ``SM89``."""
    return text.lower().removeprefix("sm")


def target(sm: str | None, gpu: str | None) -> str:
    """What ``--sm`` or ``--for`` names, as the request has it; :class:`RequestError` if both do, or no GPU is meant."""
    from stiv_deploy.export.engines.build import AUTO
    from stiv_deploy.export.engines.gpus import sm_of_gpu

    if gpu is None:
        return sm_name(sm or AUTO)
    if sm is not None:
        raise RequestError(f"--sm {sm} and --for {gpu!r} both name what to build for; give one of them")
    return sm_of_gpu(gpu)


def show(report: "BuildReport") -> None:
    """Print a table of the engines made."""
    from rich.console import Console

    files: dict[str, BuiltEngine] = {}
    rows = [_row(engine, files.setdefault(engine.file, engine)) for engine in report.engines]
    total = ("all", "", f"{sum(engine.plan.bytes for engine in files.values()) / MIB:.1f}", "", "")
    title = f"{report.backend} {report.version}, SM {report.sm}"
    columns, numbers = ("graph", "attention", "MiB", "build s", "from"), ("MiB", "build s")
    Console().print(table(title, columns, [*rows, total], numbers))


def _row(engine: "BuiltEngine", first: "BuiltEngine") -> tuple[str, str, str, str, str]:
    """Of one graph, whose engine is also that of ``first`` where that is another one."""
    if first is not engine:
        return engine.graph, engine.attention, "", "", f"that of {first.graph}"
    size, seconds = f"{engine.plan.bytes / MIB:.1f}", f"{engine.plan.build_seconds:.1f}"
    return engine.graph, engine.attention, size, seconds, "cache" if engine.cached else "builder"


def proven(report: "BuildReport") -> bool:
    """Verify the new engines where they can run, and say on standard error what came of it; else true."""
    from stiv_deploy.runtime.backends import unavailable_reason
    from stiv_deploy.runtime.bundle.bundle import Bundle
    from stiv_deploy.runtime.command.verification import verdict
    from stiv_deploy.runtime.errors import EngineError
    from stiv_deploy.runtime.pipeline.verification import VerifyRequest, verify

    golden = Bundle.open(report.bundle).manifest.golden
    if golden is None or unavailable_reason(report.backend) is not None:
        return True
    try:
        with progress_bar("verify") as progress:
            found = verify(VerifyRequest(bundle=report.bundle, backends=(report.backend,)), progress)
    except EngineError as error:  # they are for another GPU, or not all are there yet
        typer.echo(f"not verified here: {error}", err=True)
        return True
    for proof in found.proofs:
        typer.echo(verdict(proof), err=True)
    return found.passed


def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, made by 'stiv export'.", show_default=False)],
    backend: Annotated[str, typer.Option(help="tensorrt-rtx (needs no GPU to build) or tensorrt.")] = "tensorrt-rtx",
    sm: Annotated[
        str | None,
        typer.Option(
            help="GPU to build for: compute capability such as 89 or 120, 'portable', or 'auto' (the one here). "
            "[default: auto]"
        ),
    ] = None,
    gpu: Annotated[str | None, typer.Option("--for", help="The same by the GPU's name: 'RTX 5090', L40S.")] = None,
    bucket: Annotated[
        list[str] | None, typer.Option(help="Only this size bucket, in an engine of its own; repeatable.")
    ] = None,
    graphs: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these: names with commas between; 'blocks' is all blocks, 'halves' all halves of them."
        ),
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
    shared_plan: Annotated[
        bool,
        typer.Option(
            "--shared-plan",
            help="One engine for all blocks, weights as its inputs; --lora works on it. Not for 8 or 4 bits.",
        ),
    ] = False,
    json: JsonTarget = None,
) -> None:
    """Compile a bundle's graphs into engines for one kind of GPU.

    TensorRT-RTX needs no GPU for it. The engines go into the bundle, all or none; equal plans are taken from the cache.

    stiv build bundle --backend tensorrt-rtx --sm 89
    """
    from stiv_deploy.export.engines.build import BuildRequest, build_engines
    from stiv_deploy.export.engines.plan_cache import default_cache
    from stiv_deploy.runtime.bundle.manifest import MANIFEST
    from stiv_deploy.runtime.tensorrt_library import parse_flavour

    check_json(json, bundle / MANIFEST)
    request = BuildRequest(
        bundle=bundle,
        backend=parse_flavour(backend),
        sm=target(sm, gpu),
        buckets=listed(bucket, "--bucket"),
        graphs=listed(graphs, "--graphs"),
        jobs=jobs,
        cache=cache or default_cache(),
        rebuild=rebuild,
        optimization_level=optimization_level,
        attention=attention,
        shared_plan=shared_plan,
    )
    with progress_bar("build") as progress:
        report = build_engines(request, progress)
    answer(json, lambda: json_text(report, 1), lambda: show(report))
    if not proven(report):
        raise typer.Exit(1)
