"""What generates clips, for a measurement of them: settings in, video out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Video = NDArray[np.float32]
"""[B, F, 3, H, W] in [-1, 1]."""
Given = Mapping[int, Video]
"""Pictures [B, 3, H, W] in [-1, 1] of given frames, by their number."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One sampling setting, for either kind of source; ``None`` is the checkpoint's own."""

    steps: int
    scale: float
    mode: str = "jit"
    renorm: bool = True
    image_scale: float = 1.5
    time_shift: float | None = None
    late_stretch: float | None = None
    frames: int | None = None
    stride: int | None = None
    unseen: str = "noised"
    solver: str = "euler"


class Source(Protocol):
    """Generates clips and says what it is."""

    frames: int
    side: int
    """Height of the clips in pixels."""
    stride: int
    """Frame stride that clips have unless another is asked for."""

    def describe(self) -> dict[str, str]:
        """What was measured, for the result file."""
        ...

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, given: Given | None) -> Video:
        """One clip for each prompt and seed; ``given`` frame 0 makes it image-to-video."""
        ...

    def reconstruct(self, video: Video) -> Video | None:
        """``video`` through the VAE and back, ``None`` where the source cannot."""
        ...


def digest(path: Path) -> str:
    """First 16 hexadecimal digits of the file's SHA-256."""
    return sha256(path.read_bytes()).hexdigest()[:16]
