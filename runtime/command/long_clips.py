"""``stiv extend``, ``stiv interpolate`` and ``stiv long``: videos longer than a clip."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stiv_deploy.runtime.command.generation import FIELDS, recorded_options, replaced
from stiv_deploy.runtime.command.terminal import JsonTarget, answer, check_json, progress_bar
from stiv_deploy.runtime.errors import RequestError

if TYPE_CHECKING:
    from stiv_deploy.runtime.pipeline.long_stage import LongReport, LongRequest, LongTask

UPSCALE_LIMIT = 2**14
SHOWN_SEAMS = 3
"""So many of the widest seams are told."""
Bundle = Annotated[Path, typer.Argument(help="Bundle folder, made by 'stiv export'.", show_default=False)]
Video = Annotated[
    Path,
    typer.Argument(
        metavar="VIDEO", help="A clip: a video file, a GIF, a WebP, or a folder of pictures.", show_default=False
    ),
]
Out = Annotated[
    Path, typer.Option(help="Output: .mp4, .gif, .webp, .png (one row of frames), or a folder of PNG frames.")
]
Prompt = Annotated[str | None, typer.Option(help="What to show.")]
OwnPrompt = Annotated[
    str | None,
    typer.Option("--prompt", help="What to show. Default: what the record says that VIDEO carries, or nothing."),
]
Request = Annotated[
    Path | None,
    typer.Option(
        "--request",
        metavar="FILE",
        help="Sample as the request in FILE says: JSON, or a clip made here. What is given as an option replaces it.",
    ),
]
Negative = Annotated[str | None, typer.Option(help="What to steer away from.")]
Fit = Annotated[
    Literal["exact", "stretch", "crop", "pad"] | None,
    typer.Option(help="How frames of another size become the video's. Default: they must have it."),
]
Height = Annotated[int | None, typer.Option(help="Height in pixels.")]
Width = Annotated[int | None, typer.Option(help="Width in pixels.")]
Fps = Annotated[float | None, typer.Option(help="Frames per second of what is written.")]
Stride = Annotated[int | None, typer.Option(help="Sampling stride: source frames from one frame to the next.")]
Clip = Annotated[int | None, typer.Option(metavar="FRAMES", help="Frames of each clip that is made.")]
Overlap = Annotated[
    int | None, typer.Option(help="Frames that each clip is given of what is there. Default: as trained.")
]
Upsample = Annotated[
    int | None, typer.Option(metavar="FACTOR", help="Then make the frames between, for 2 or 4 times the frame rate.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the first clip's noise. Default: a new one.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps of each clip.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.")]
Upscale = Annotated[
    int | None,
    typer.Option(
        min=1, max=UPSCALE_LIMIT, help="Repeat each pixel this many times, both ways. Default: as 'stiv generate' does."
    ),
]
Chunks = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where finished clips are kept, as latents; the same command goes on there. Default: beside the output, "
        "until that is written.",
    ),
]
BackendName = Annotated[str | None, typer.Option(help="Backend ('stiv doctor' lists them); default: the best.")]
Device = Annotated[int, typer.Option(metavar="INDEX", help="GPU, as CUDA counts them.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")]


def extend(
    context: typer.Context,
    bundle: Bundle,
    video: Video,
    out: Out,
    frames: Annotated[int, typer.Option(help="Frames of the whole, those of VIDEO among them.")],
    prompt: OwnPrompt = None,
    request: Request = None,
    negative_prompt: Negative = None,
    overlap: Overlap = None,
    upsample: Upsample = None,
    clip: Clip = None,
    fit: Fit = None,
    height: Height = None,
    width: Width = None,
    fps: Fps = None,
    stride: Stride = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    upscale: Upscale = None,
    chunks: Chunks = None,
    backend: BackendName = None,
    device: Device = 0,
    threads: Threads = None,
    json: JsonTarget = None,
) -> None:
    """Make what comes after a clip, clip by clip.

    Each is given the last frames before it, as latents: nothing is decoded in between. A run that was stopped goes on
    when the same command is given again.

    stiv extend bundle star.mp4 --frames 28 --prompt "a red star moving left" --out longer.mp4
    """
    _run("extend", context, {"video": video, "frames": frames, "overlap": overlap, "upsample": upsample})


def interpolate(
    context: typer.Context,
    bundle: Bundle,
    video: Video,
    out: Out,
    factor: Annotated[int, typer.Option(help="How many times the frames: 2 or 4.")] = 2,
    prompt: OwnPrompt = None,
    request: Request = None,
    negative_prompt: Negative = None,
    clip: Clip = None,
    fit: Fit = None,
    height: Height = None,
    width: Width = None,
    fps: Fps = None,
    stride: Stride = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    upscale: Upscale = None,
    chunks: Chunks = None,
    backend: BackendName = None,
    device: Device = 0,
    threads: Threads = None,
    json: JsonTarget = None,
) -> None:
    """Make the frames between those of a clip, for 2 or 4 times the frame rate.

    stiv interpolate bundle star.mp4 --factor 2 --prompt "a red star moving left" --out smooth.mp4
    """
    _run("interpolate", context, {"video": video, "factor": factor})


def long(
    context: typer.Context,
    bundle: Bundle,
    out: Out,
    frames: Annotated[int, typer.Option(help="Frames of the whole.")],
    prompt: Prompt = None,
    request: Request = None,
    negative_prompt: Negative = None,
    image: Annotated[Path | None, typer.Option(help="Picture to start from, the first frame.")] = None,
    spacing: Annotated[
        int | None, typer.Option(help="Frames from key frame to key frame. Default: by the strides that were trained.")
    ] = None,
    overlap: Overlap = None,
    upsample: Upsample = None,
    clip: Clip = None,
    fit: Fit = None,
    height: Height = None,
    width: Width = None,
    fps: Fps = None,
    stride: Stride = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    upscale: Upscale = None,
    chunks: Chunks = None,
    backend: BackendName = None,
    device: Device = 0,
    threads: Threads = None,
    json: JsonTarget = None,
) -> None:
    """Make a long video: key frames far apart, then the frames between neighbours.

    The model must have been trained for both: for clips at a large stride, and for clips that are given their ends.

    stiv long bundle --frames 61 --prompt "a red star moving left" --out long.mp4
    """
    _run(
        "long",
        context,
        {"frames": frames, "spacing": spacing, "overlap": overlap, "upsample": upsample, "image": image},
    )


def _run(task: "LongTask", context: typer.Context, arguments: dict[str, Any]) -> None:
    """Carry out a command: its own ``arguments``, and what all have alike from its parameters."""
    from stiv_deploy.runtime.bundle.manifest import MANIFEST
    from stiv_deploy.runtime.files import check_apart
    from stiv_deploy.runtime.pipeline.long_stage import LongRequest
    from stiv_deploy.runtime.pipeline.media import check_output

    given = context.params
    check_json(given["json"])
    alike = {name: given[name] for name in FIELDS if given.get(name) is not None and name != "frames"}
    options = recorded_options(given["request"], pictures=task == "long" and given["image"] is None)
    options = replaced(options, {FIELDS[name]: value for name, value in alike.items()})
    options |= {name: given[name] for name in ("prompt", "seed") if given[name] is not None}
    if task == "long" and "prompt" not in options:
        raise RequestError("no prompt given; give --prompt, or --request with a file that has one")
    if given["clip"] is not None:
        options["num_frames"] = given["clip"]
    request = LongRequest(
        bundle=given["bundle"],
        task=task,
        arguments=options | {name: value for name, value in arguments.items() if value is not None},
        out=given["out"],
        **{name: given[name] for name in ("chunks", "upscale", "backend", "device", "threads")},
    )
    check_output(request.out)
    read = [*(given.get(name) for name in ("video", "image", "request")), given["bundle"] / MANIFEST]
    check_apart([request.out, given["json"]], read)
    run_long(request, given["json"])


def run_long(request: "LongRequest", json: Path | None) -> None:
    """Make the video of ``request`` and tell of it, or, when it is interrupted, what is kept."""
    from stiv_deploy.runtime.pipeline.long_stage import kept_clips, make_long

    try:
        with progress_bar("step") as progress:
            report = make_long(request, progress)
    except KeyboardInterrupt:
        if kept := kept_clips(request):
            typer.echo(f"{kept} finished clips are kept in {request.folder}; the same command goes on", err=True)
        raise
    answer(json, report.to_json, lambda: print_long(report))


def print_long(report: "LongReport") -> None:
    """What was written, of how many clips, and where they meet worst."""
    chain, output = report.output.chain, report.output
    size = f"{chain.frames} frames of {chain.template.width}x{chain.template.height} at {chain.fps:g} a second"
    typer.echo(f"{report.written}: {size}, {chain.chunks} clips ({output.made} made now), seed {chain.template.seed}")
    worst = sorted(output.seams, key=lambda seam: -seam.ratio)[:SHOWN_SEAMS]
    if worst:
        told = ", ".join(f"{seam.ratio:.2f} at frame {seam.frame}" for seam in worst)
        typer.echo(f"seams (step there by the usual step, 1 is none): {told}")
