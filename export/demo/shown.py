"""What a report shows of clips, whichever command made them, and their pictures beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from stiv_deploy.runtime.pipeline.chained import Chain
from stiv_deploy.runtime.pipeline.films import open_film
from stiv_deploy.runtime.pipeline.long_stage import LongReport
from stiv_deploy.runtime.pipeline.media import contact_sheet, write_video
from stiv_deploy.runtime.pipeline.output import as_frames
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.stage import ClipsReport
from stiv_deploy.runtime.pipeline.views_stage import ViewsReport
from stiv_deploy.runtime.pipeline.visible import upscale_for

EDGE, GIVEN, MADE = 2, (0, 120, 212), (32, 32, 32)
"""Pixels around each frame of a sheet, and their colour by what the frame is."""
LONG_TITLES = {"extend": "What comes after", "interpolate": "The frames between", "long": "A long video"}


@dataclass(frozen=True, kw_only=True)
class ShownClip:
    """A clip, uint8 [F, H, W, 3], what it was made of, which of its frames were given, and what each is called."""

    title: str
    prompt: str
    frames: np.ndarray
    fps: float
    facts: str
    given: frozenset[int] = frozenset()
    labels: tuple[str, ...] = ()

    def label(self, index: int) -> str:
        """The name of frame ``index``: its number, if it has no other."""
        name = self.labels[index] if self.labels else str(index)
        return f"{name}, given" if index in self.given and name != "given" else name


def shown_clip(report: Any) -> ShownClip | None:
    """The one clip of ``report``, or ``None`` if it is of no clip."""
    make = _SHOWN.get(type(report))
    return None if make is None else make(report)


def write_pictures(clip: ShownClip, path: Path) -> None:
    """Beside the file ``path`` of ``clip``: a GIF, and its frames in a labelled row."""
    factor = upscale_for(path, *clip.frames.shape[1:3])
    write_video(path.with_suffix(".gif"), clip.frames, clip.fps, factor)
    contact_sheet([clip.frames], [clip.prompt], max(1, factor // 2)).save(path.with_suffix(".png"))


def tasks_sheet(clips: Sequence[ShownClip]) -> np.ndarray | None:
    """One picture, uint8 [H, W, 3], of ``clips``: a row each under its title, the given frames with a blue edge.

    Nothing is enlarged; ``None`` without clips.
    """
    if not clips:
        return None
    labels = [f"{clip.title}: {clip.prompt}" for clip in clips]
    return np.asarray(contact_sheet([_edged(clip) for clip in clips], labels))


def _edged(clip: ShownClip) -> np.ndarray:
    """Its frames within edges that hide nothing of them."""
    count, height, width, _ = clip.frames.shape
    made = np.empty((count, height + 2 * EDGE, width + 2 * EDGE, 3), np.uint8)
    for index, frame in enumerate(made):
        frame[:] = GIVEN if index in clip.given else MADE
    made[:, EDGE:-EDGE, EDGE:-EDGE] = clip.frames
    return made


def _generated(report: ClipsReport) -> ShownClip:
    (request,), (frames,) = report.output.requests, report.output.frames
    return ShownClip(
        title="Text and image to video" if request.frames else "Text to video",
        prompt=request.prompt,
        frames=as_frames(frames),
        fps=request.fps or 1.0,
        facts=_facts(request, len(frames), request.fps or 1.0),
        given=frozenset(request.frames),
    )


def _views(report: ViewsReport) -> ShownClip:
    (request,) = report.views.output.requests
    frames = report.views.frames
    return ShownClip(
        title="Views of an object",
        prompt="from one picture",
        frames=frames,
        fps=report.views.output.fps,
        facts=_facts(request, len(frames), report.views.output.fps),
        given=frozenset({0}),
        labels=("given", *(f"{camera.azimuth:g}°" for camera in report.views.cameras)),
    )


def _long(report: LongReport) -> ShownClip:
    """Read from its file, as a long video is nowhere else once it is written."""
    chain = report.output.chain
    height, width = chain.template.height or 1, chain.template.width or 1
    (frames,) = open_film(report.written).windows(chain.frames, height, width)
    widest = max((seam.ratio for seam in report.output.seams), default=1.0)
    clips = (
        f"{chain.chunks} clip{'s' if chain.chunks > 1 else ''} joined in latents, widest seam {widest:.2f} (1 is none)"
    )
    return ShownClip(
        title=LONG_TITLES[chain.task],
        prompt=chain.template.prompt,
        frames=frames,
        fps=report.output.fps,
        facts=f"{_facts(chain.template, chain.frames, report.output.fps)}; {clips}",
        given=frozenset(known_frames(chain)),
    )


def known_frames(chain: Chain) -> range:
    """Where the frames of the source of ``chain`` are in what was made of it."""
    apart = prod(one.spacing for one in chain.passes)
    return range(0, chain.known * apart, apart)


def _facts(request: GenerationRequest, frames: int, fps: float) -> str:
    steps, guidance = f"{request.num_inference_steps} {request.solver} steps", f"guidance {request.guidance_mode}"
    return (
        f"seed {request.seed}, {frames} frames of {request.width}x{request.height} at {fps:g} a second, {steps}, "
        f"{guidance} {request.guidance_scale:g}"
    )


_SHOWN: dict[type, Callable[[Any], ShownClip]] = {ClipsReport: _generated, LongReport: _long, ViewsReport: _views}
