"""A job on its way through a worker: from the stored request to latents, and to files."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from stiv_deploy.runtime.pipeline.media import contact_sheet, write_video
from stiv_deploy.runtime.pipeline.output import StivOutput
from stiv_deploy.runtime.pipeline.plan import GenerationPlan, PlannedVideo
from stiv_deploy.runtime.sampling.engine import Pause
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.skipping import KNOWN
from stiv_deploy.runtime.sampling.solvers import evaluations, most_rows
from stiv_deploy.serving.store.files import SPRITESHEET, THUMBNAIL, VIDEO
from stiv_deploy.serving.store.jobs import Job

POSITION, LATENTS, INPUTS, VELOCITY, BUNDLE = "position", "latents", "inputs", "velocity", "bundle"
RESIDUALS = "residuals"
"""Names of the arrays of a :class:`Pause` in a file, and of the hash of the bundle that made it."""


@dataclass(eq=False)
class Decoding:
    """A clip whose ``latents`` fp32 [T, C, h, w] become frames, the ``parts`` to come, and seconds so far."""

    clip: "Clip"
    latents: np.ndarray
    parts: Iterator[np.ndarray]
    frames: np.ndarray | None = None
    seconds: float = 0.0

    def go_on(self) -> bool:
        """Decode a part; whether there may be more."""
        start = time.perf_counter()
        frames = next(self.parts, None)
        self.seconds += time.perf_counter() - start
        self.frames = self.frames if frames is None else frames
        return frames is not None


@dataclass(eq=False)
class Clip:
    """A claimed job, planned: its sample for the engine, and what it goes on from if it has run before."""

    job: Job
    plan: GenerationPlan
    sample: Sample
    lost: dict[str, str] = field(default_factory=dict)
    pause: Pause | None = None
    step: int = 0
    since: float = field(default_factory=time.perf_counter)

    @property
    def video(self) -> PlannedVideo:
        """The one video of its plan."""
        return self.plan.videos[0]

    def steps_before(self, position: int) -> int:
        """Steps that so many evaluations complete."""
        return sum(not each.hold for each in evaluations(self.sample.settings)[:position])

    @property
    def rows(self) -> int:
        """The most rows of the model that it takes."""
        return most_rows(self.sample.settings)


def pause_arrays(pause: Pause, clip: Clip) -> dict[str, np.ndarray]:
    """The ``pause`` of ``clip`` as arrays by name, see :func:`pause_of`."""
    position, bundle = np.array(pause.position), np.array(clip.plan.bundle)
    arrays = {POSITION: position, LATENTS: pause.latents, INPUTS: pause.inputs, BUNDLE: bundle}
    more = {VELOCITY: pause.velocity, RESIDUALS: pause.residuals}
    return arrays | {name: array for name, array in more.items() if array is not None}


def pause_of(arrays: dict[str, np.ndarray], clip: Clip) -> Pause | None:
    """The pause that ``arrays`` are, if it is one of ``clip`` with the same bundle; else ``None``."""
    shape = clip.sample.noise.shape
    shapes = {POSITION: (), LATENTS: shape, INPUTS: (clip.rows, *shape), BUNDLE: ()}
    shapes |= {VELOCITY: shape} if VELOCITY in arrays else {}
    if RESIDUALS in arrays:  # as many bytes as a row of the same bundle has
        shapes |= {RESIDUALS: (clip.rows, KNOWN, *(arrays[RESIDUALS].shape[2:3] or (0,)))}
    if {name: array.shape for name, array in arrays.items()} != shapes or str(arrays[BUNDLE]) != clip.plan.bundle:
        return None
    return Pause(
        position=int(arrays[POSITION]),
        latents=arrays[LATENTS],
        inputs=arrays[INPUTS],
        velocity=arrays.get(VELOCITY),
        residuals=arrays.get(RESIDUALS),
    )


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
