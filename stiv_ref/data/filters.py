"""What clips are measured by, motion and sharpness, and the thresholds that drop them.

Motion is dense optical flow (DIS), not the difference of frames: that grows with contrast, noise and flickering light
while nothing moves. Both are measured on frames shrunk to a shorter side of at most ``SHORT_SIDE`` pixels, so that they
do not depend on the resolution of the file, and so that what counts is what remains at training size.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from stiv_deploy.stiv_ref.bounds import SIZE_LIMIT, Measure
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.data.clips import Clip

SHORT_SIDE = 256
SMALLEST = 32  # pixels: the flow's patches do not fit into less
SAMPLES_PER_SECOND = 8

Pixels = NDArray[np.uint8]


class Meter:
    """Measures one video of ``fps`` frames per second; takes its frames in order, at most ``SHORT_SIDE`` large."""

    def __init__(self, fps: float) -> None:
        import cv2

        cv2.setNumThreads(1)  # videos are measured in parallel, not their pixels
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._fps, self._frames = fps, 0
        self._every = max(1, round(fps / SAMPLES_PER_SECOND))
        self._previous: Pixels | None = None
        self._motion: dict[int, float] = {}
        self._sharpness: dict[int, float] = {}

    def add(self, image: Pixels) -> None:
        """Take the next frame, RGB uint8 [H, W, 3]."""
        sampled = self._frames % self._every == 0
        before = self._every == 1 or (self._frames + 1) % self._every == 0
        grey = _grey(image) if sampled or before else None
        if sampled and grey is not None:
            self._sharpness[self._frames] = sharpness(grey)
            if self._previous is not None and self._previous.shape == grey.shape:
                self._motion[self._frames] = motion(self._previous, grey, self._flow) * self._fps
        self._previous = grey
        self._frames += 1

    def of_scene(self, start: int, end: int) -> tuple[float, float]:
        """Mean motion and median sharpness of the frames ``start`` to ``end`` (exclusive).

        The motion of a frame is the one since the frame before, so that of the first belongs to the cut, not to the
        scene. A scene too short to hold a sample has motion 0.
        """
        moved = [self._motion[at] for at in range(start + 1, end) if at in self._motion]
        sharp = [self._sharpness[at] for at in range(start, end) if at in self._sharpness]
        return float(np.mean(moved)) if moved else 0.0, float(np.median(sharp)) if sharp else 0.0


def _grey(image: Pixels) -> Pixels:
    import cv2

    grey: Pixels = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    return grey


def sharpness(grey: Pixels) -> float:
    """Variance of the Laplacian of an 8-bit picture [H, W]: 0 for an even one, and less the more it is blurred."""
    import cv2

    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def motion(previous: Pixels, grey: Pixels, flow: Any) -> float:
    """Mean length of the optical flow between two 8-bit pictures [H, W], in percent of their shorter side.

    ``flow`` is a ``cv2.DISOpticalFlow``.
    """
    import cv2

    short = min(grey.shape)
    if short < SMALLEST:
        size = tuple(max(SMALLEST, round(side * SMALLEST / short)) for side in reversed(grey.shape))
        previous, grey = (np.asarray(cv2.resize(each, size), np.uint8) for each in (previous, grey))
        short = SMALLEST
    field = flow.calc(previous, grey, None)
    return float(np.linalg.norm(field, axis=-1).mean() / short * 100)


Side = Annotated[int, Field(ge=0, le=SIZE_LIMIT)]


class Thresholds(FrozenConfig):
    """What a clip must have to be kept; None does not ask. Interlaced and HDR ones are kept only if that is said.

    Seconds of duration, shorter side in pixels, motion in percent of the shorter side per second, sharpness as the
    variance of the Laplacian.
    """

    min_seconds: Measure | None = None
    max_seconds: Measure | None = None
    min_side: Side | None = None
    max_side: Side | None = None
    min_motion: Measure | None = None
    max_motion: Measure | None = None
    min_sharpness: Measure | None = None
    keep_interlaced: bool = False
    keep_hdr: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Thresholds":
        for name in ("seconds", "side", "motion"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{name} {least} is greater than max_{name} {most}: nothing would be kept")
        return self

    def reasons(self, clip: Clip) -> tuple[str, ...]:
        """Why ``clip`` is dropped, in a few words each; none if it is kept."""
        faults: Sequence[tuple[str, float | None, float | None, float]] = (
            ("too short", self.min_seconds, None, clip.seconds),
            ("too long", None, self.max_seconds, clip.seconds),
            ("too small", self.min_side, None, min(clip.width, clip.height)),
            ("too large", None, self.max_side, min(clip.width, clip.height)),
            ("too little motion", self.min_motion, None, clip.motion),
            ("too much motion", None, self.max_motion, clip.motion),
            ("too blurred", self.min_sharpness, None, clip.sharpness),
        )
        marks = (("interlaced", clip.interlaced, self.keep_interlaced), ("HDR", clip.hdr, self.keep_hdr))
        return (
            *(name for name, marked, kept in marks if marked and not kept),
            *(
                name
                for name, least, most, value in faults
                if (least is not None and value < least) or (most is not None and value > most)
            ),
        )
