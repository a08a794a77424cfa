"""``stiv generate``, ``stiv inspect`` and ``stiv doctor``: arguments in, words and files out."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stiv_deploy.runtime.command.generation import check_places, default_rows, requests_from_options, upsampled_request
from stiv_deploy.runtime.command.long_clips import UPSCALE_LIMIT, Upsample, run_long
from stiv_deploy.runtime.command.terminal import JsonTarget, answer, check_json, json_text, progress_bar, table
from stiv_deploy.runtime.errors import RequestError, few

if TYPE_CHECKING:
    from rich.console import Console

    from stiv_deploy.runtime.bundle.contract import ModelFacts
    from stiv_deploy.runtime.bundle.manifest import Bucket, Range, TrainedOn
    from stiv_deploy.runtime.bundle.tuned import Tuned, TunedGrid
    from stiv_deploy.runtime.command.doctor import Report as DoctorReport
    from stiv_deploy.runtime.command.inspection import BundleReport, EngineReport, OnnxReport
    from stiv_deploy.runtime.pipeline.stage import ClipsReport

MIB = 2**20


def generate(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, made by 'stiv export'.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="Output: .mp4, .gif, .webp, .png (one row of frames), or a folder of PNG frames.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to show; repeat it for several videos at once.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text file of more prompts, one a line; empty lines are none.")
    ] = None,
    request: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Request, or a list of them, as JSON; or a clip made by 'stiv generate', to make it again. Other "
            "options replace what it says.",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="Picture to start from, the first frame: a PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF file of at most 50 "
            "million pixels."
        ),
    ] = None,
    frame: Annotated[
        list[str] | None,
        typer.Option(metavar="INDEX=FILE", help="Picture of any frame (0 first, -1 last); repeatable."),
    ] = None,
    fit: Annotated[
        Literal["exact", "stretch", "crop", "pad"] | None,
        typer.Option(help="How pictures get the video's size. Default: exact, other sizes are refused."),
    ] = None,
    resize: Annotated[bool, typer.Option("--resize", help="The same as --fit crop.")] = False,
    background: Annotated[
        str | None,
        typer.Option(metavar="COLOR", help="Behind transparent pictures and around padded ones. Default: black."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    count: Annotated[int | None, typer.Option(help="Videos of each prompt. Default: 1.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames. Default: the bundle's.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels. Default: the bundle's.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels. Default: the bundle's.")] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of what is written. Default: the bundle's.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Sampling stride: source frames from one frame to the next. Default: the bundle's."),
    ] = None,
    original_height: Annotated[
        int | None, typer.Option(help="Height of the source that the video is to look like. Default: its own.")
    ] = None,
    original_width: Annotated[
        int | None, typer.Option(help="Width of the source that the video is to look like. Default: its own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. Default: the bundle's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale (of the text, in mode sit). Default: the bundle's.")
    ] = None,
    image_guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of the image, in mode sit. Default: the bundle's.")
    ] = None,
    guidance_mode: Annotated[
        Literal["jit", "sit", "none"] | None,
        typer.Option(help="Text and image together, separately, or no guidance. Default: the bundle's."),
    ] = None,
    renorm: Annotated[
        bool | None,
        typer.Option("--renorm/--no-renorm", help="Keep the norm of the conditional velocity. Default: the bundle's."),
    ] = None,
    guidance_from: Annotated[
        float | None, typer.Option(help="Time, 0 noise to 1 data, before which nothing guides. Default: 0.")
    ] = None,
    guidance_until: Annotated[
        float | None, typer.Option(help="Time after which nothing guides: fewer rows of the model. Default: 1.")
    ] = None,
    unseen: Annotated[
        Literal["noised", "zero"] | None,
        typer.Option(help="What the branch without pictures gets at given frames. Default: noised."),
    ] = None,
    solver: Annotated[
        Literal["euler", "heun", "ab2"] | None, typer.Option(help="Solver of the sampling ODE. Default: the bundle's.")
    ] = None,
    time_shift: Annotated[
        float | None, typer.Option(help="Above 1 spends more steps near the noise. Default: the bundle's.")
    ] = None,
    late_stretch: Annotated[
        float | None,
        typer.Option(help="Steps so many times longer once the clip is decided. Default: the bundle's."),
    ] = None,
    skip_blocks: Annotated[
        bool | None,
        typer.Option(
            help="Skip the blocks in those of --steps that 'stiv tune' found; the bundle says for which numbers."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the noise; video i of several takes seed + i. Default: a new one.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Backend ('stiv doctor' lists them); default: the best.")] = None,
    device: Annotated[int, typer.Option(metavar="INDEX", help="GPU, as CUDA counts them.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Several devices to make a clip together: GPUs, as 0,1,2,3, or cpu,cpu for parts of it.",
        ),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="How they share it: cfg2xdsp4 is 2 groups for guidance branches, of 4 that share frames and "
            "positions. Default: guidance first.",
        ),
    ] = None,
    processes: Annotated[
        bool, typer.Option("--processes", help="A process for each of --devices; default: a thread.")
    ] = False,
    nccl: Annotated[
        bool, typer.Option("--nccl", help="A process for each of --devices, which exchange by NCCL between their GPUs.")
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SCALE]",
            help="LoRA to merge into the weights for this call, by default whole; repeatable. The bundle stays as it "
            "is.",
        ),
    ] = None,
    decode_tile: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="PIXELS",
            help="Decode (and encode) frames larger than this in overlapping tiles of this height and width: less "
            "memory, more time. 0: never. Default: tiles of 512 where a frame has more than a million pixels.",
        ),
    ] = None,
    upscale: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=UPSCALE_LIMIT,
            help="Repeat each pixel this many times, both ways; 1: as the model made it. Default: clips below 128 "
            "pixels get at least 256, but for PNG, whose frames may be given again.",
        ),
    ] = None,
    upsample: Upsample = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Write all videos into one, side by side, each above its prompt.")
    ] = False,
    timings: Annotated[
        bool, typer.Option("--timings", help="Print how long each phase took; --json tells it anyway.")
    ] = False,
    json: JsonTarget = None,
) -> None:
    """Generate video from text, or from text and pictures, with a bundle.

    'stiv inspect BUNDLE' lists the bundle's defaults, which its checkpoint recommends. A clip
    carries its request, and --request makes it again: on the same backend bit by bit if it was made alone, else but for
    rounding. The report of --json makes all clips of a call again as they were made, together.

    stiv generate bundle --prompt "a red star moving left" --out star.mp4
    stiv generate bundle --request star.mp4 --out again.mp4
    stiv generate bundle --prompt "a red star moving left" --out star.mp4 --devices 0,1,2,3
    """
    from stiv_deploy.runtime.pipeline.media import check_output
    from stiv_deploy.runtime.pipeline.stage import ClipsRequest, make_clips

    check_json(json)
    requests, made_with = requests_from_options(context.params)
    if upsample is not None:
        if devices is not None:
            raise RequestError("--upsample makes its clips on one device; leave out --devices")
        check_places(context.params, check_output(out))
        run_long(upsampled_request(requests, context.params), json)
        return
    asked = ClipsRequest(
        bundle=bundle,
        requests=tuple(requests),
        out=out,
        upscale=upscale,
        grid=grid,
        backend=backend,
        device=device,
        threads=threads,
        devices=devices_of(devices, device),
        parallel=parallel,
        processes=processes,
        nccl=nccl,
        loras=tuple(lora or ()),
    )
    check_places(context.params, check_output(out, asked.files))
    with progress_bar("step") as progress:
        report = make_clips(asked, progress)
    for other in made_with - {report.output.bundle}:
        typer.echo(f"note: made with another bundle ({other[:12]}), this is {report.output.bundle[:12]}", err=True)
    answer(json, report.to_json, lambda: print_clips(report, timings))


def devices_of(text: str | None, device: int) -> tuple[str, ...]:
    """The devices of ``--devices``, which is not to be given with ``--device``."""
    if text is None:
        return ()
    if device:
        raise RequestError(f"--device {device} and --devices {text} are both given; give one of them")
    from stiv_deploy.runtime.sampling.parallel.placement import parse_devices

    return parse_devices(text)


def print_clips(report: "ClipsReport", timings: bool = False) -> None:
    """What was written, and how long it took; with ``timings`` phase by phase."""
    for target, request in zip(report.written, report.output.requests, strict=True):
        size = f"{request.num_frames} frames of {request.width}x{request.height}"
        typer.echo(f"{target}: {size}, seed {request.seed}")
    seconds = report.output.timings
    typer.echo(f"generated in {seconds['total']:.1f} s on {report.output.backend}")
    if timings:
        from rich.console import Console

        columns = ("phase", "seconds", "share")
        rows = [(name, f"{value:.3f}", f"{value / seconds['total']:.1%}") for name, value in seconds.items()]
        Console().print(table("Timings", columns, rows, numbers=columns[1:]))


def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="Bundle folder, .onnx or .engine file.", metavar="BUNDLE|ONNX|ENGINE", show_default=False),
    ],
    json: JsonTarget = None,
) -> None:
    """Show what is in a bundle, an ONNX graph or an engine.

    stiv inspect bundle
    """
    from rich.console import Console

    from stiv_deploy.runtime.bundle.manifest import MANIFEST
    from stiv_deploy.runtime.command.inspection import BundleReport, OnnxReport, inspect_path

    check_json(json, path, path / MANIFEST)
    report = inspect_path(path)

    def show() -> None:
        if isinstance(report, BundleReport):
            print_bundle(report, Console())
        elif isinstance(report, OnnxReport):
            print_onnx(report, Console())
        else:
            print_engine(report, Console())

    answer(json, lambda: json_text(report), show)


def doctor(json: JsonTarget = None) -> None:
    """Show what is installed, which backends work here, and why the others do not.

    Exit code 0 if this machine can generate; optional parts may be missing.

    stiv doctor
    stiv doctor --json doctor.json
    """
    from rich.console import Console

    from stiv_deploy.runtime.command.doctor import examine

    check_json(json)
    with progress_bar("doctor") as progress:
        report = examine(progress)
    answer(json, lambda: json_text(report), lambda: print_doctor(report, Console()))
    if not report.healthy:
        raise typer.Exit(1)


def print_table(console: "Console", title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a :func:`table`."""
    console.print(table(title, columns, rows))


def _tensors(tensors: Any) -> str:
    return "".join(f"  {each.name} {each.dtype}[{', '.join(map(str, each.shape))}]\n" for each in tensors)


def _names(tensors: Any) -> str:
    return ", ".join(each.name for each in tensors)


def _size(count: int) -> str:
    return f"{count / MIB:.2f} MiB"


def print_bundle(report: "BundleReport", console: "Console") -> None:
    """Bundle as text: facts, defaults, buckets, graphs, their forms with plugins, layers in 8 bits, engines, parity."""
    from stiv_deploy.runtime.bundle.contract import block_of
    from stiv_deploy.runtime.command.inspection import plan_rows, plugin_rows, precision_text

    manifest = report.manifest
    model = manifest.model
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    console.print(
        f"{report.path}: model {model.name}, {precision_text(manifest)}, opset {manifest.opset}, "
        f"{_size(report.bytes)}\n"
        f"{model.blocks} blocks of width {model.width}, {model.heads} heads, patch {model.patch[0]}x{model.patch[1]}, "
        f"VAE {vae_text(model)}\n"
        f"trained on: {trained_text(manifest.trained)}\n"
        f"{student_text(model)}"
        f"checkpoint {manifest.checkpoint[:12]}; made with {tools}\n",
        markup=False,
    )
    print_table(console, "Defaults of 'stiv generate'", ("option", "default"), default_rows(manifest.recommended()))
    if manifest.tuned is not None:
        print_tuned(manifest.tuned, console, skips=manifest.skips)
    print_table(
        console,
        "Buckets (min, typical, max)",
        ("name", "batch", "frames", "height", "width"),
        (
            (each.name, *(f"{size.min}, {size.typical}, {size.max}" for size in _ranges(each)))
            for each in manifest.buckets
        ),
    )
    print_table(
        console,
        "Graphs",
        ("name", "size", "topology", "inputs", "outputs"),
        (
            (
                name,
                _size(graph.file.bytes + (graph.data.bytes if graph.data and block_of(name) == name else 0)),
                graph.topology[:8],
                _names(graph.spec.inputs),
                _names(graph.spec.outputs),
            )
            for name, graph in manifest.graphs.items()
        ),
    )
    rows = plugin_rows(manifest)
    if rows:
        print_table(console, "Forms with plugins ('stiv build --attention plugin')", ("plugins", "graphs"), rows)
    if manifest.quantization is not None:
        title = f"Precision plan (scales {manifest.quantization.scales[:12]})"
        print_table(console, title, ("layer", "layers", "precision"), plan_rows(manifest.quantization))
    print_engine_records(report, console)
    print_parity(report, console)


def print_tuned(tuned: "Tuned", console: "Console", *, skips: bool) -> None:
    """What other numbers of steps get in place of the default solver and times, and what it was measured on.

    With ``skips`` also what they get that ask for skipped blocks.
    """
    rows = (
        (
            f"{each.steps}{' --skip-blocks' if each.skipped_steps else ''}",
            each.solver,
            f"{each.time_shift:.3g}",
            f"{each.late_stretch:g}",
            each.weights,
            f"{each.error:.2e}",
        )
        for each in (*tuned.best(), *(sorted(tuned.skipping(), key=_steps) if skips else ()))
    )
    columns = ("steps", "solver", "time shift", "late stretch", "weights", "error")
    title = f"Defaults by steps ('stiv tune', {tuned.clips} clips; the reference errs by {tuned.reference_error:.1e})"
    console.print(table(title, columns, rows, ("steps", "time shift", "late stretch", "error")))


def _steps(grid: "TunedGrid") -> int:
    return grid.steps


def trained_text(trained: "TrainedOn | None") -> str:
    """What the model has seen, in words."""
    if trained is None:
        return "the checkpoint does not tell"
    sizes = [f"{width}x{height}" for height, width in trained.sizes]
    lists = (trained.tasks, trained.givings, trained.strides, sizes, trained.frames)
    tasks, givings, strides, shown, frames = (", ".join(map(str, each)) for each in lists)
    return f"{tasks} (given: {givings}), stride {strides}, {frames} frames of {shown}"


def student_text(model: "ModelFacts") -> str:
    """A line on what a student is; nothing of another model."""
    if model.student is None:
        return ""
    kind = "a flow map" if model.student.flow_map else "a student"
    return f"{kind}: one row of the model a step, at guidance scales {model.student.scales}\n"


def vae_text(model: "ModelFacts") -> str:
    """The VAE in words: ``8x8 pixels a latent``, or ``8 frames of 32x32 pixels a latent, first frame alone``."""
    frames = f"{model.temporal_factor} frames of " if model.temporal_factor > 1 else ""
    alone = ", first frame alone" if model.causal_vae else ""
    return f"{frames}{model.spatial_factor}x{model.spatial_factor} pixels a latent{alone}"


def _ranges(bucket: "Bucket") -> tuple["Range", ...]:
    return bucket.batch, bucket.frames, bucket.height, bucket.width


def print_engine_records(report: "BundleReport", console: "Console") -> None:
    """Engines of a bundle, or how to build some."""
    from stiv_deploy.runtime.bundle.engine_files import attention_form
    from stiv_deploy.runtime.command.inspection import attention_text, weights_text

    engines = report.manifest.engines
    if not engines:
        message = f"No engines; 'stiv build {report.path} --backend tensorrt-rtx --sm 89' compiles some.\n"
        console.print(message, markup=False)
        return
    rows = (
        (
            each.graph,
            each.bucket,
            each.backend,
            each.backend_version,
            each.sm,
            attention_text(each, attention_form(each, report.manifest)),
            weights_text(each),
            _size(each.file.bytes),
            f"{each.build_seconds:.1f} s",
        )
        for each in engines
    )
    columns = ("graph", "bucket", "backend", "version", "SM", "attention", "weights", "size", "built in")
    print_table(console, "Engines", columns, rows)


def print_parity(report: "BundleReport", console: "Console") -> None:
    """Parity results of a bundle, or how to get some."""
    if not report.manifest.parity:
        console.print(f"No parity results; 'stiv parity {report.path}' measures them.", markup=False)
        return
    rows = (
        (
            row.level,
            row.name,
            row.backend,
            *(f"{number:.2e}" for number in (row.rel_l2, row.max_abs, row.gate)),
            "yes" if row.passed else "NO",
        )
        for row in report.manifest.parity
    )
    columns = ("level", "name", "backend", "rel L2", "max abs", "gate", "passed")
    print_table(console, "Parity with the reference", columns, rows)


def print_onnx(report: "OnnxReport", console: "Console") -> None:
    """ONNX graph as text: facts, inputs and outputs, operators."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in report.opsets.items())
    console.print(
        f"{report.path}: {report.nodes} nodes, opset {opsets}, by {report.producer or 'unknown'}\n"
        f"{report.initializers} initializers, {_size(report.weight_bytes)} of weights\n"
        f"inputs\n{_tensors(report.inputs)}outputs\n{_tensors(report.outputs)}",
        markup=False,
    )
    rows = ((name, str(count)) for name, count in report.operators.items())
    print_table(console, "Operators", ("operator", "count"), rows)
    if report.functions:
        bodies = ((name, str(count)) for name, count in report.functions.items())
        print_table(console, "Functions", ("function", "nodes"), bodies)


def print_engine(report: "EngineReport", console: "Console") -> None:
    """Engine as text: its file, its record in the bundle, and what cannot be told here."""
    from stiv_deploy.runtime.command.inspection import attention_text, weights_text

    lines = [f"{report.path}: {_size(report.bytes)}, SHA-256 {report.sha256[:12]}"]
    if report.record is not None:
        record = report.record
        lines.append(
            f"graph{'s' if len(report.graphs) > 1 else ''} {few(report.graphs, 6)}, bucket {record.bucket}, "
            f"{record.backend} {record.backend_version}, SM {record.sm}, "
            f"attention {attention_text(record, report.attention)}, weights: {weights_text(record)}, "
            f"built in {record.build_seconds:.1f} s, of the bundle {report.bundle}"
        )
    console.print("\n".join([*lines, report.note]), markup=False)


def print_doctor(report: "DoctorReport", console: "Console") -> None:
    """Doctor's report as text."""
    memory = "unknown" if report.memory_gib is None else f"{report.memory_gib} GiB"
    gpus = "; ".join(report.gpus) or f"none ({report.gpu_problem})"
    console.print(
        f"stiv-deploy {report.stiv_deploy} on Python {report.python}, {report.platform}\n"
        f"CPU: {report.cpu}, {report.cores} cores; memory {memory}; {report.disk_free_gib} GiB free on disk here\n"
        f"GPU: {gpus}\nCUDA driver: {report.cuda_driver or f'none ({report.cuda_problem})'}\n"
        f"Devices, as --device counts them: {'; '.join(report.devices) or 'none'}\n"
        f"mp4 (libx264): {'yes' if report.mp4 else f'no ({report.mp4_problem})'}\n",
        highlight=False,
        markup=False,
    )
    packages = (
        (each.name, each.extra or "base", each.version or "-", each.problem or "ok") for each in report.packages
    )
    print_table(console, "Packages", ("package", "extra", "version", "state"), packages)
    backends = ((each.name, "yes" if each.works else "no", each.reason, each.cuda_graphs) for each in report.backends)
    print_table(console, "Backends", ("backend", "works", "reason", "CUDA graphs"), backends)
    libraries = ((each.name, "yes" if each.works else "no", each.state) for each in report.libraries)
    print_table(console, "Libraries of 'make plugins' (optional)", ("library", "works", "state"), libraries)
