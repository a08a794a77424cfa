"""Moving digits: scikit-learn's real handwritten digits, sliding left, right, up or down, with captions.

Small enough to learn on two CPU cores, real enough to fail visibly: a model is right when the caption's digit moves
the caption's way.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stiv_deploy.stiv_ref.digit_canvas import SIZE, check_frames, speed_of

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Direction -> sign of the movement along (rows, columns)."""
WORDS = ("digit", "moving", *DIGIT_WORDS, *DIRECTIONS)
DIGIT = SIZE // 2
SPEED = SIZE // 16  # pixels a frame
TEST_SHARE = 6  # every sixth handwriting sample is held out


@dataclass(frozen=True, kw_only=True)
class Clips:
    """A batch: video fp32 [B, F, 3, size, size] in [-1, 1], one caption each, and the truth behind the captions."""

    video: Tensor
    captions: list[str]
    digits: list[int]
    directions: list[str]


def caption(digit: int, direction: str | None) -> str:
    """The caption of a clip, or of a still image where ``direction`` is None."""
    still = f"digit {DIGIT_WORDS[digit]}"
    return still if direction is None else f"{still} moving {direction}"


def micro_conditions(count: int, frames: int, size: int = SIZE) -> Tensor:
    """Micro-conditions fp32 [count, 6] of these clips: resolution, crop origin, frame stride 1, frames."""
    return torch.tensor([[size, size, 0, 0, 1, frames]], dtype=torch.float32).repeat(count, 1)


def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's pictures of digits fp64 [N, 64], 8x8 in shades from 0 to 16, and which digits they are [N].

    Its file is read without it, as importing it takes seconds of every process that draws digits.
    """
    spec = find_spec("sklearn")
    places = [Path(place) / "datasets/data/digits.csv.gz" for place in (spec and spec.submodule_search_locations) or ()]
    found = [place for place in places if place.is_file()]
    if not found:  # elsewhere in another version; or there is none, as the import says
        from sklearn.datasets import load_digits

        return load_digits(return_X_y=True)
    table = np.loadtxt(found[0], delimiter=",")
    return table[:, :-1], table[:, -1].astype(int)


class MovingDigits:
    """Draws clips of one split ('train' or 'test') of the handwriting samples, on a canvas of ``size`` pixels."""

    def __init__(self, split: str, size: int = SIZE) -> None:
        self.size, self.digit, self.speed = size, size // 2, speed_of(size)
        images, labels = handwriting()
        held_out = np.arange(len(labels)) % TEST_SHARE == 0
        chosen = held_out if split == "test" else ~held_out
        self.labels = labels[chosen]
        small = torch.from_numpy(images[chosen].astype(np.float32) / 16).reshape(-1, 1, 8, 8)
        shape = (self.digit, self.digit)
        self.images = F.interpolate(small, size=shape, mode="bicubic", align_corners=False).clamp(0, 1)[:, 0]

    def draw(self, count: int, frames: int, generator: torch.Generator) -> Clips:
        """Draw ``count`` clips of ``frames`` frames; with one frame, still images with still captions."""

        def integers(high: int) -> list[int]:
            return torch.randint(high, (count,), generator=generator).tolist()

        check_frames(frames, self.size)
        travel, room = self.speed * (frames - 1), self.size - self.digit
        names = list(DIRECTIONS)
        indices, turns = integers(len(self.labels)), integers(len(names))
        along, across = integers(room - travel + 1), integers(room + 1)
        video = torch.zeros(count, frames, self.size, self.size)
        for clip in range(count):
            image = self.images[indices[clip]]
            rows, columns = DIRECTIONS[names[turns[clip]]]
            for frame in range(frames):
                moved = along[clip] + self.speed * frame
                place = moved if rows + columns > 0 else room - moved
                top, left = (place, across[clip]) if rows else (across[clip], place)
                video[clip, frame, top : top + self.digit, left : left + self.digit] = image
        digits = [int(self.labels[index]) for index in indices]
        directions = [names[turn] for turn in turns]
        shown = directions if frames > 1 else [None] * count
        return Clips(
            video=(2 * video - 1).unsqueeze(2).repeat(1, 1, 3, 1, 1),
            captions=[caption(digit, direction) for digit, direction in zip(digits, shown, strict=True)],
            digits=digits,
            directions=directions,
        )
