"""How well chunks meet: the step from frame to frame where they do, beside the steps elsewhere."""

import math
from typing import NamedTuple

import numpy as np

from stiv_deploy.runtime.pipeline.timeline import Timeline


class Seam(NamedTuple):
    """Between ``frame`` - 1 and ``frame`` another chunk begins.

    ``ratio`` is the root mean square step of the latents there, by the median of all steps inside of chunks: 1 is no
    seam, 0 a video that stands still there. Where no chunk has a step of its own, all steps are the measure.
    """

    frame: int
    ratio: float


def measured(timeline: Timeline) -> list[Seam]:
    """The seams of ``timeline``, in order; one frame at a time is in memory."""
    steps = _steps(timeline)
    joints = [frame for frame in range(1, len(timeline)) if timeline.owner(frame) != timeline.owner(frame - 1)]
    apart = set(joints)
    inside = [step for frame, step in enumerate(steps, 1) if frame not in apart]
    usual = float(np.median(inside or steps)) if steps else math.nan
    return [Seam(frame, round(steps[frame - 1] / max(usual, 1e-12), 4)) for frame in joints]


def _steps(timeline: Timeline) -> list[float]:
    """Root mean square of the difference of each frame to the one before, from frame 1 on."""
    found, before = [], None
    for frame in range(len(timeline)):
        latents = timeline.read(frame)
        if before is not None:
            found.append(float(np.sqrt(np.mean((latents - before) ** 2, dtype=np.float64))))
        before = latents
    return found
