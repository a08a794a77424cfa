"""What generates clips, for a measurement of them: settings in, video out."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Video = NDArray[np.float32]
"""[B, F, 3, H, W] in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One sampling setting, for either kind of source; ``time_shift`` ``None`` is the checkpoint's own."""

    steps: int
    scale: float
    mode: str = "jit"
    renorm: bool = True
    image_scale: float = 1.5
    time_shift: float | None = None


class Source(Protocol):
    """Generates clips and says what it is."""

    frames: int

    def describe(self) -> dict[str, str]:
        """What was measured, for the result file."""
        ...

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, first_frames: Video | None
    ) -> Video:
        """One clip for each prompt and seed; ``first_frames`` [B, 3, H, W] makes it image-to-video."""
        ...

    def reconstruct(self, video: Video) -> Video | None:
        """``video`` through the VAE and back, ``None`` where the source cannot."""
        ...


def digest(path: Path) -> str:
    """First 16 hexadecimal digits of the file's SHA-256."""
    return sha256(path.read_bytes()).hexdigest()[:16]
