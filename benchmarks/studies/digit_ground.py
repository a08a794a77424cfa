"""Moving digits as a study's ground.

A clip's *motion* is how fast its digit moves, in percent of the speed of real clips: 100 is right, 0 is a still. Clips
larger than 32 pixels are shrunk to 32 for the scorers, which know that size.
"""

from functools import cache

import above  # noqa: F401  # isort: split
import numpy as np
import torch
import torch.nn.functional as F
from fidelity import fidelity
from ground import CHECKPOINTS, FRAMES, STALE, Result, Shape, Video
from numpy.typing import NDArray
from scorers import THRESHOLD, Judgement, brightness, centre_of_mass, judge, percentages

from stiv_deploy.stiv_ref.data import moving_digits
from stiv_deploy.stiv_ref.data.moving_digits import DIGIT_WORDS, DIRECTIONS, MovingDigits, caption
from stiv_deploy.stiv_ref.digit_canvas import SIZE, speed_of

digits_of = cache(MovingDigits)
"""The digits of a split and a size, drawn from again and again."""


def at_scorer_size(video: Video) -> Video:
    """``video`` [B, F, 3, H, W] with 32 x 32 pixels, by area."""
    if video.shape[-1] == SIZE:
        return video
    frames = torch.from_numpy(video).flatten(0, 1)
    small = F.interpolate(frames, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return small.unflatten(0, video.shape[:2]).numpy()


def speed(clip: NDArray[np.float32]) -> float:
    """Speed in pixels a frame of the brightness [F, H, W]: slope of the centre of mass; 0 if nothing is seen."""
    places = [(frame, place) for frame, image in enumerate(clip) if (place := centre_of_mass(image)) is not None]
    if len(places) < 2:
        return 0.0
    slope = np.polyfit([frame for frame, _ in places], np.array([place for _, place in places]), 1)[0]
    return float(np.hypot(*slope))


def motion(clips: NDArray[np.float32]) -> list[float]:
    """Percent of the real speed, for brightness [B, F, 32, 32]."""
    return [100 * speed(clip) / speed_of(SIZE) for clip in clips]


class DigitClips:
    """Clips of moving digits, judged by a classifier and the way of the centre of mass."""

    def __init__(self, clips: moving_digits.Clips) -> None:
        self.video, self.captions = clips.video, clips.captions
        self.digits, self.directions = clips.digits, clips.directions

    def scores(self, video: Video, *, image: bool) -> Result:
        """As :class:`ground.Clips` says; ``empty``: percent of clips with a frame that shows nothing."""
        bright = brightness(at_scorer_size(video))
        moved = motion(bright)
        result: Result = percentages(self._judged(bright))
        result |= {"motion": float(np.mean(moved)), "stale": 100 * float(np.mean(np.array(moved) < STALE))}
        result["empty"] = 100 * float(np.mean((bright > THRESHOLD).sum(axis=(2, 3)).min(axis=1) == 0))
        return result | (fidelity(video, self.video.numpy()) if image else {})

    def right(self, video: Video) -> list[bool]:
        """As :class:`ground.Clips` says."""
        return [one.digit_right and one.direction_right for one in self._judged(brightness(at_scorer_size(video)))]

    def _judged(self, bright: NDArray[np.float32]) -> list[Judgement]:
        return judge(bright, self.digits, self.directions)


class DigitGround:
    """As :class:`ground.Ground` says."""

    name, place = "digits", ""
    checkpoint = CHECKPOINTS / "tiny"
    shape = shipped = Shape(FRAMES, SIZE)
    steps = 20
    caption_tokens = 5
    columns = {one: one for one in ("digit", "direction", "both", "motion")}
    whole, speed = "both", "motion"
    continuation = " Image and caption fix it."

    def captions(self) -> list[str]:
        """All captions, still and moving, and the empty one."""
        ways: list[str | None] = [None, *DIRECTIONS]
        return ["", *(caption(digit, way) for digit in range(len(DIGIT_WORDS)) for way in ways)]

    def draw(self, count: int, shape: Shape, generator: torch.Generator) -> DigitClips:
        """As :class:`ground.Ground` says."""
        return DigitClips(digits_of("train", shape.size).draw(count, shape.frames, generator))

    def clips(self, count: int, seed: int, shape: Shape) -> DigitClips:
        """As :class:`ground.Ground` says."""
        generator = torch.Generator().manual_seed(90_000 + seed)
        return DigitClips(digits_of("test", shape.size).draw(count, shape.frames, generator))

    def conflicts(self, count: int, seed: int, shape: Shape) -> None:
        """None: a first frame of handwriting leaves open which digit it is."""
