"""Views of an object from all around: one picture in, and a clip whose frames are the cameras.

They stand as in the training data, ``stiv_ref.data.views`` (arXiv 2412.07730, section 3.6).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import RequestError, briefly
from stiv_deploy.runtime.pipeline.call import requests_of_call
from stiv_deploy.runtime.pipeline.given import ImageLike
from stiv_deploy.runtime.pipeline.grid import grid, grid_upscale
from stiv_deploy.runtime.pipeline.media import write_video
from stiv_deploy.runtime.pipeline.output import StivOutput, as_frames
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.visible import upscale_for
from stiv_deploy.runtime.sampling.guidance import GuidanceMode, Unseen

TASK = "views"
"""The task that a model which makes views was trained for."""
ELEVATIONS = (30.0, -20.0)
"""Degrees, of the made views in turn."""
VIEWS = 7
"""Frames of a clip of views, the given one among them, where the checkpoint has several: the paper's."""
DEFAULTS: Mapping[str, Any] = {
    "guidance_mode": GuidanceMode.JIT,
    "guidance_scale": 3.5,
    "unseen": Unseen.ZERO,
    "stride": 1,
}
"""How the paper samples views, and the stride that they are trained at."""
SHEET = ".png"
NEAR = 0.5
"""Degrees by which an azimuth may be off that is asked for."""


class Camera(NamedTuple):
    """Where ``frame`` of the clip is seen from: degrees around, from the given view on, and above the object."""

    frame: int
    azimuth: float
    elevation: float

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.azimuth:g}°, elevation {self.elevation:g}°"


def cameras(frames: int) -> list[Camera]:
    """Those of the ``frames`` - 1 views that are made: evenly around, half a step beside the given one.

    Azimuths 30, 90, ... 330 with 7 frames.
    """
    step = 360 / max(1, frames - 1)
    return [Camera(number + 1, step * (number + 0.5), ELEVATIONS[number % 2]) for number in range(frames - 1)]


def chosen_cameras(frames: int, azimuths: Sequence[float] | None) -> list[Camera]:
    """The cameras at ``azimuths``, ascending, by default all; :class:`RequestError` for one that there is not."""
    there = cameras(frames)
    if azimuths is None:
        return there
    if not azimuths:
        raise RequestError("no azimuth given; give one or more, or none at all for every view")
    return sorted({_at(there, azimuth) for azimuth in azimuths})


def _at(there: Sequence[Camera], azimuth: float) -> Camera:
    number = isinstance(azimuth, int | float | np.number) and math.isfinite(azimuth)
    found = [each for each in there if number and abs(each.azimuth - azimuth % 360) <= NEAR]
    if not found:
        known = ", ".join(f"{each.azimuth:g}" for each in there)
        raise RequestError(f"no view has the azimuth {briefly(azimuth)}; those of {len(there) + 1} frames are {known}")
    return found[0]


def views_request(bundle: Bundle, image: ImageLike, options: Mapping[str, Any]) -> GenerationRequest:
    """The request of a clip of views, of which ``image`` is the first; ``options`` are those of a call.

    Raises :class:`RequestError`, also for a model that was not trained for views.
    """
    check_trained(bundle)
    given = {name: value for name, value in options.items() if value is not None}
    values = {**DEFAULTS, "num_frames": _frames(bundle), **given, "image": image}
    requests = requests_of_call("", values)
    if len(requests) != 1 or requests[0].count != 1:
        raise RequestError("views of one object are made at a time; leave the count out")
    if requests[0].num_frames == 1:
        raise RequestError("the given view is one frame, and 1 frame is asked for; ask for 2 or more")
    return requests[0]


def check_trained(bundle: Bundle) -> None:
    """:class:`RequestError` if the model of ``bundle`` makes no video, or is known not to have learnt views."""
    trained = bundle.manifest.trained
    if not bundle.manifest.model.temporal:
        raise RequestError("views are frames of a clip, and this bundle is of an image model")
    if trained is not None and TASK not in trained.tasks:
        tasks = ", ".join(trained.tasks)
        raise RequestError(
            f"this model was not trained for views of an object; its tasks are {tasks}; use a bundle of one that was"
        )


def _frames(bundle: Bundle) -> int:
    """Frames that the bundle takes, nearest to the paper's of those that were trained, if that is known."""
    trained, multiple = bundle.manifest.trained, bundle.manifest.model.frame_multiple
    known = [each for each in (trained.frames if trained else ()) if each > 1]
    return min(known or [-(-VIEWS // multiple) * multiple], key=lambda each: abs(each - VIEWS))


@dataclass(frozen=True, kw_only=True)
class ViewsOutput:
    """Views that were made: ``output`` is their clip, the given view first; ``cameras`` those that are shown of it."""

    output: StivOutput
    cameras: list[Camera]

    @property
    def frames(self) -> np.ndarray:
        """The given view and those of ``cameras``, uint8 [N, H, W, 3], by azimuth."""
        return as_frames(self.output.frames[0])[[0, *(each.frame for each in self.cameras)]]

    @property
    def labels(self) -> list[str]:
        """One for each of ``frames``."""
        return ["given", *(each.label for each in self.cameras)]

    def write(self, path: str | Path, upscale: int | None = None) -> Path:
        """Write a contact sheet (.png), every view above its angles, or else a turntable, a view a frame.

        Formats and ``upscale`` are those of :meth:`StivOutput.write`; the sheet is enlarged as a turntable is. The file
        carries the request of the clip. Raises :class:`~stiv_deploy.runtime.errors.OutputError`.
        """
        frames, (record,) = self.frames, self.output.records
        count, height, width, _ = frames.shape
        if Path(path).suffix.lower() == SHEET:
            sheet = grid(list(frames[:, None]), self.labels, grid_upscale(count, height, width, upscale))
            return write_video(path, sheet, self.output.fps, comment=record.embedded())
        return write_video(path, frames, self.output.fps, upscale_for(path, height, width, upscale), record.embedded())
