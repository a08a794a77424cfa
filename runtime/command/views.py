"""``stiv views``: an object from all around, of one picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stiv_deploy.runtime.command.generation import FIELDS, recorded_options, replaced
from stiv_deploy.runtime.command.long_clips import (
    BackendName,
    Bundle,
    Device,
    Fit,
    Fps,
    Height,
    Request,
    Steps,
    Threads,
    Upscale,
    Width,
)
from stiv_deploy.runtime.command.terminal import JsonTarget, answer, check_json, progress_bar
from stiv_deploy.runtime.errors import RequestError, briefly

if TYPE_CHECKING:
    from stiv_deploy.runtime.pipeline.views_stage import ViewsReport


def views(
    context: typer.Context,
    bundle: Bundle,
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="Picture of an object, the view at azimuth 0.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Output: .png (a contact sheet with the angles), or a turntable: .mp4, .gif, .webp, a folder."
        ),
    ],
    azimuths: Annotated[
        str | None,
        typer.Option(metavar="DEGREES", help="Which views to show, as in 30,90,150. Default: all that are made."),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames of the clip, the given view among them. Default: as trained.")
    ] = None,
    request: Request = None,
    fit: Fit = None,
    background: Annotated[
        str | None, typer.Option(metavar="COLOR", help="Behind a transparent or padded picture. Default: black.")
    ] = None,
    height: Height = None,
    width: Width = None,
    fps: Fps = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise. Default: a new one.")] = None,
    steps: Steps = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: 3.5.")] = None,
    upscale: Upscale = None,
    backend: BackendName = None,
    device: Device = 0,
    threads: Threads = None,
    json: JsonTarget = None,
) -> None:
    """Show an object from all around, of one picture of it.

    The model must have been trained for views: it makes those of that training, evenly around the object from above and
    below in turn, in one clip whose first frame is the picture.

    stiv views bundle three.png --out around.png
    """
    from stiv_deploy.runtime.bundle.manifest import MANIFEST
    from stiv_deploy.runtime.files import check_apart
    from stiv_deploy.runtime.pipeline.media import check_output
    from stiv_deploy.runtime.pipeline.views_stage import ViewsRequest, make_views

    check_json(json)
    given = {name: value for name, value in context.params.items() if value is not None}
    options = recorded_options(request, pictures=False)
    options.pop("prompt", None)
    options = replaced(options, {field: given[name] for name, field in FIELDS.items() if name in given})
    asked = ViewsRequest(
        bundle=bundle,
        image=image,
        out=out,
        azimuths=None if azimuths is None else parse_azimuths(azimuths),
        options=options | ({"seed": seed} if seed is not None else {}),
        upscale=upscale,
        backend=backend,
        device=device,
        threads=threads,
    )
    check_output(out)
    check_apart([out, json], [image, request, bundle / MANIFEST])
    with progress_bar("step") as progress:
        report = make_views(asked, progress)
    answer(json, report.to_json, lambda: print_views(report))


def parse_azimuths(text: str) -> list[float]:
    """Degrees of ``30,90``; :class:`RequestError`."""
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise RequestError(f"--azimuths {briefly(text)}: want degrees with commas between, as in 30,90") from None


def print_views(report: "ViewsReport") -> None:
    """What was written, and from where it is seen."""
    (request,) = report.views.output.requests
    shown = ", ".join(f"{each.azimuth:g}" for each in report.views.cameras)
    typer.echo(f"{report.written}: views of {request.width}x{request.height} at azimuths {shown}, seed {request.seed}")
