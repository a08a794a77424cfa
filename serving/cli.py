"""``stiv serve``: options in, a running service out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stiv_deploy.serving.settings import ServeSettings

GIB, HOUR = 2**30, 3600.0


NOT_WITH_DYNAMO = ("host", "port", "tokens", "ray")
"""What is its frontend's to say, or another way to serve."""
NOT_WITH_DEVICES = ("workers", "device", "ray")
"""What says otherwise who has which device."""


def serve(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, made by 'stiv export'.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen at; another than this machine's own needs --tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any that is free.")] = 8000,
    data: Annotated[
        Path | None, typer.Option(help="Folder for jobs and videos, on a local disk. Default: BUNDLE.jobs.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(metavar="URL", help="Jobs in PostgreSQL (postgresql://HOST/NAME), for many machines.")
    ] = None,
    results: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Videos elsewhere: s3://BUCKET/PREFIX, file:///FOLDER, ..."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the API. Default: the bundle's.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Let in only who has a token of this file; see --new-token.")
    ] = None,
    new_token: Annotated[
        str | None, typer.Option(metavar="NAME", help="Make a token for NAME, add it to --tokens, print it, and end.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Processes that make videos. Default: one; with --ray one for each GPU."),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve on Ray: on the cluster of RAY_ADDRESS, or on one of this machine.")
    ] = False,
    dynamo: Annotated[
        bool, typer.Option("--dynamo", help="Serve as a worker of NVIDIA Dynamo, whose frontend answers clients.")
    ] = False,
    max_workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="With --ray: up to so many workers while there is much to do.")
    ] = None,
    backlog: Annotated[
        float, typer.Option(min=1.0, help="With --max-workers: seconds of work that a worker may have before it.")
    ] = 60.0,
    backend: Annotated[str | None, typer.Option(help="Backend ('stiv doctor' lists them); default: the best.")] = None,
    device: Annotated[int, typer.Option(metavar="INDEX", min=0, help="First GPU, as CUDA counts them.")] = 0,
    devices: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="All of these, for a clip on each or for one clip together: 0,1 or cpu,cpu."),
    ] = None,
    parallel: Annotated[
        str | None, typer.Option(metavar="FORM", help="How --devices share a clip: cfg2, dsp4, cfg2xdsp2.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a worker; default: all cores.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a bundle that is not proven, or a best backend that is wrong.")
    ] = False,
    slots: Annotated[int, typer.Option(min=1, max=256, help="Most videos in one batch.")] = 8,
    queue: Annotated[int, typer.Option(min=1, max=100_000, help="Most jobs that wait.")] = 1_000,
    rate: Annotated[float, typer.Option(min=0.1, help="Most new jobs a minute from one client.")] = 600.0,
    keep_hours: Annotated[float, typer.Option(min=0.01, help="Hours that finished jobs are kept.")] = 24.0,
    keep_gib: Annotated[float, typer.Option(min=0.0, help="Most GiB of videos; then the oldest go.")] = 20.0,
    free_gib: Annotated[float, typer.Option(min=0.0, help="With less free GiB on the disk no job is taken.")] = 0.5,
    latents_every: Annotated[
        int, typer.Option(min=0, help="Steps after which a running job is saved, to go on from; 0: never.")
    ] = 10,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log lines of JSON, every job's way among them.")
    ] = False,
    spans: Annotated[
        bool, typer.Option("--spans", help="Send OpenTelemetry spans of every job to OTEL_EXPORTER_OTLP_ENDPOINT.")
    ] = False,
    grace: Annotated[float, typer.Option(min=0.0, max=600.0, help="Seconds to finish running jobs at the end.")] = 15.0,
) -> None:
    """Serve a bundle: an HTTP API in the format of OpenAI's videos, with jobs that outlive the server.

    It stops by Ctrl-C or SIGTERM: running jobs finish or are saved, waiting ones stay for the next time.

    stiv serve bundle --port 8000
    stiv serve bundle --host 0.0.0.0 --tokens tokens.txt
    stiv serve bundle --tokens tokens.txt --new-token alice
    stiv serve bundle --devices 0,1,2,3
    stiv serve bundle --ray --workers 2 --max-workers 8
    stiv serve bundle --dynamo
    """
    from stiv_deploy.runtime.bundle.bundle import Bundle
    from stiv_deploy.serving.api.guard import Tokens, add_token, read_tokens
    from stiv_deploy.serving.errors import ServeError
    from stiv_deploy.serving.logs import set_up
    from stiv_deploy.serving.server import Server, address, listen
    from stiv_deploy.serving.settings import ServeSettings
    from stiv_deploy.serving.store.opening import SCHEME
    from stiv_deploy.serving.workers.sharing import check_there, placement_of

    if new_token is not None:
        if tokens is None:
            raise ServeError("--new-token is given without --tokens FILE, where it would be written to")
        typer.echo(add_token(tokens, new_token))
        return
    if store is not None and not store.startswith(SCHEME):
        raise ServeError(f"--store {store}: want {SCHEME}HOST/NAME; without it jobs are in a file of --data")
    if results is not None and "://" not in results:
        raise ServeError(f"--results {results}: want a URL, such as s3://BUCKET/PREFIX or file:///FOLDER")
    if max_workers is not None and not ray:
        raise ServeError("--max-workers is for --ray, which starts and ends workers; give --workers")
    if dynamo:
        _check_alone(context)
    named = _devices(context, devices, parallel)
    known = Tokens() if tokens is None else read_tokens(tokens)
    opened = Bundle.open(bundle)
    settings = ServeSettings(
        bundle=bundle.absolute(),
        data=(data or bundle.absolute().with_name(f"{bundle.absolute().name}.jobs")).absolute(),
        store=store,
        results=results,
        name=name or opened.manifest.model.name,
        workers=workers or 1,
        backend=backend,
        device=device,
        devices=named,
        parallel=parallel,
        threads=threads,
        strict=strict,
        slots=slots,
        queue=queue,
        rate=rate,
        keep_seconds=keep_hours * HOUR,
        keep_bytes=int(keep_gib * GIB),
        free_bytes=int(free_gib * GIB),
        latents_every=latents_every,
        log_json=log_json,
        spans=spans,
        grace_seconds=grace,
    )
    placement_of(settings, opened)
    check_there(settings)
    set_up(as_json=log_json)
    if ray:
        from stiv_deploy.serving.cluster.running import run_on_ray
        from stiv_deploy.serving.cluster.scaling import Scale

        run_on_ray(settings, known, host, port, Scale(workers, max_workers, backlog), typer.echo)
        return
    if dynamo:
        _run_on_dynamo(settings)
        return
    with listen(host, port, known) as listening:
        server = Server(settings, known)
        typer.echo(f"serving {settings.name} at {address(listening)}, jobs in {settings.data}; Ctrl-C stops it")
        code = server.run(listening)
    if code:
        raise typer.Exit(code)


def _devices(context: typer.Context, devices: str | None, parallel: str | None) -> tuple[str, ...]:
    """The devices of the one worker that has several of them; none where each has one."""
    from stiv_deploy.runtime.sampling.parallel.placement import parse_devices
    from stiv_deploy.serving.errors import ServeError

    if devices is None:
        if parallel is not None:
            raise ServeError(f"--parallel {parallel} is given without --devices, which are to share a clip")
        return ()
    given = [name for name in NOT_WITH_DEVICES if _given(context, name)]
    if given:
        raise ServeError(f"--{given[0]} is of no use with --devices, which are all of one worker; leave one out")
    named = parse_devices(devices)
    if len(named) < 2:
        raise ServeError(f"--devices {devices}: one device shares nothing; name more, or give --device INDEX")
    return named


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_alone(context: typer.Context) -> None:
    from stiv_deploy.serving.errors import ServeError

    given = [f"--{name}" for name in NOT_WITH_DYNAMO if _given(context, name)]
    if given:
        raise ServeError(f"{given[0]} is of no use with --dynamo, whose frontend speaks to clients; leave it out")


def _run_on_dynamo(settings: "ServeSettings") -> None:
    from stiv_deploy.serving.errors import ServeError

    try:
        from stiv_deploy.serving.dynamo.worker import run_on_dynamo
    except ModuleNotFoundError as error:
        where = "docs/serving.md, 'In Dynamo', says how"
        raise ServeError(f"--dynamo: {error.name} is not installed; {where}") from None
    run_on_dynamo(settings)
