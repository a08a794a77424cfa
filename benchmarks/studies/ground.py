"""What a study stands on: data with held-out clips that judge what is made of them, and a checkpoint that knows it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Generator, Tensor

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
FRAMES = 8
"""Of the clips that mini models learn."""
STALE = 50.0
"""Percent of the real speed below which a clip is stale."""
Result = dict[str, Any]
Video = NDArray[np.float32]
"""[B, F, 3, H, W] in [-1, 1]."""


class Shape(NamedTuple):
    """Frames and pixels (height and width) of a clip."""

    frames: int
    size: int


class Asked(Protocol):
    """Clips that something is asked about: their video fp32 [B, F, 3, H, W] in [-1, 1], and a caption each."""

    video: Tensor
    captions: list[str]


class Clips(Asked, Protocol):
    """Clips whose truth is known."""

    def scores(self, video: Video, *, image: bool) -> Result:
        """Measurements of ``video`` that was asked for by the captions, and if ``image`` by the first frames.

        In percent, every one of :attr:`Ground.columns` and ``stale``; with ``image`` also ``psnr`` and
        ``psnr_to_first``, in dB by frame.
        """
        ...

    def right(self, video: Video) -> list[bool]:
        """Whether each clip of ``video``, made from the caption and the first frame, is all that was asked."""
        ...


class Conflicts(Asked, Protocol):
    """Clips under captions that their first frame contradicts."""

    def followed(self, video: Video) -> dict[str, float]:
        """Percent of clips of ``video`` that follow the ``picture``, the ``words``, or ``neither``."""
        ...


class Ground(Protocol):
    """Data, scorers, and the checkpoint whose text encoder and VAE are frozen in all studies."""

    name: str
    place: str
    """Ends the title of a report."""
    checkpoint: Path
    shape: Shape
    """Of clips that mini models learn and are tried with."""
    shipped: Shape
    """Of the checkpoint's own clips."""
    steps: int
    """Sampling steps of a trial."""
    caption_tokens: int
    """Of the longest caption."""
    columns: Mapping[str, str]
    """What tables show: key of a score in percent -> words."""
    whole: str
    """Which of the columns is all that was asked together."""
    speed: str
    """Which of the columns is the speed, in percent of that of real clips; a clip of less than half of it is stale."""
    continuation: str
    """How far the true continuation of a first frame is fixed by it and the caption."""

    def captions(self) -> list[str]:
        """Captions that are encoded at once, the empty one among them; all there are, where they are few."""
        ...

    def draw(self, count: int, shape: Shape, generator: Generator) -> Asked:
        """Clips to learn from; stills under captions of stills if ``shape`` has one frame."""
        ...

    def clips(self, count: int, seed: int, shape: Shape) -> Clips:
        """Held-out clips; other ones for every seed."""
        ...

    def conflicts(self, count: int, seed: int, shape: Shape) -> Conflicts | None:
        """Held-out clips under captions that contradict them; ``None`` where there are no such captions."""
        ...
