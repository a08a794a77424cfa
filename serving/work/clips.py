"""A job on its way through a worker: from the stored request to latents, and to files."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from stiv_deploy.runtime.pipeline.media import contact_sheet, write_video
from stiv_deploy.runtime.pipeline.output import StivOutput
from stiv_deploy.runtime.pipeline.plan import GenerationPlan, PlannedVideo
from stiv_deploy.runtime.sampling.engine import Pause
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.serving.store.jobs import Job
from stiv_deploy.serving.store.results import SPRITESHEET, THUMBNAIL, VIDEO

POSITION, LATENTS, INPUTS = "position", "latents", "inputs"
"""Names of the arrays of a :class:`Pause` in a file."""


@dataclass(eq=False)
class Clip:
    """A claimed job, planned: its sample for the engine, and what it goes on from if it has run before."""

    job: Job
    plan: GenerationPlan
    sample: Sample
    lost: dict[str, str] = field(default_factory=dict)
    pause: Pause | None = None
    step: int = 0

    @property
    def video(self) -> PlannedVideo:
        """The one video of its plan."""
        return self.plan.videos[0]

    @property
    def rows(self) -> int:
        """Rows of the model that it takes."""
        return len(self.sample.settings.rows())


def pause_arrays(pause: Pause) -> dict[str, np.ndarray]:
    """``pause`` as arrays by name, see :func:`pause_of`."""
    return {POSITION: np.array(pause.position), LATENTS: pause.latents, INPUTS: pause.inputs}


def pause_of(arrays: dict[str, np.ndarray], clip: Clip) -> Pause | None:
    """The pause that ``arrays`` are, if it is one of ``clip``; else ``None``."""
    shape = clip.sample.noise.shape
    shapes = {POSITION: (), LATENTS: shape, INPUTS: (clip.rows, *shape)}
    if {name: array.shape for name, array in arrays.items()} != shapes:
        return None
    return Pause(position=int(arrays[POSITION]), latents=arrays[LATENTS], inputs=arrays[INPUTS])


def write_files(clip: Clip, frames: np.ndarray, latents: np.ndarray, backend: str, folder: Path) -> None:
    """Write the video of ``clip``, uint8 [F, H, W, 3], with its record, its first frame and its contact sheet."""
    request = clip.video.request
    output = StivOutput(
        frames=frames[None],
        latents=latents[None],
        requests=[request],
        bundle=clip.plan.bundle,
        backend=backend,
        timings={},
        lost=clip.lost,
        warnings=[clip.video.warnings],
    )
    (record,) = output.records
    write_video(folder / VIDEO, frames, request.fps or 0, comment=record.embedded())
    Image.fromarray(frames[0]).save(folder / THUMBNAIL, "WEBP")
    contact_sheet([frames]).save(folder / SPRITESHEET, "PNG")
