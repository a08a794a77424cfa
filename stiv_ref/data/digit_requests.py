"""What to ask of a model of moving digits: prompts with the truth behind them, and real clips that answer them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stiv_deploy.stiv_ref.data.moving_digits import DIGIT_WORDS, DIRECTIONS, MovingDigits, caption
from stiv_deploy.stiv_ref.digit_canvas import SIZE


@dataclass(frozen=True, kw_only=True)
class DigitRequests:
    """What to ask for: prompts with the truth behind them; direction ``None`` for still images."""

    prompts: list[str]
    digits: list[int]
    directions: list[str | None]

    def __len__(self) -> int:
        return len(self.prompts)


def balanced_requests(count: int, *, moving: bool) -> DigitRequests:
    """``count`` requests: digits 0..9 in turn, all (digit, direction) pairs equally often over multiples of 40."""
    names = list(DIRECTIONS)
    digits = [index % len(DIGIT_WORDS) for index in range(count)]
    directions = [names[(index + index // len(DIGIT_WORDS)) % len(names)] if moving else None for index in range(count)]
    prompts = [caption(digit, direction) for digit, direction in zip(digits, directions, strict=True)]
    return DigitRequests(prompts=prompts, digits=digits, directions=directions)


def real_clips(requests: DigitRequests, frames: int, *, split: str = "test", seed: int = 0, size: int = SIZE) -> Tensor:
    """A real clip for every request, fp32 [B, frames, 3, size, size], drawn from ``split`` until all are found."""
    data, generator = MovingDigits(split, size), torch.Generator().manual_seed(seed)
    found: dict[int, Tensor] = {}
    while len(found) < len(requests):
        clips = data.draw(100, frames, generator)
        waiting = {index for index in range(len(requests)) if index not in found}
        for video, digit, direction in zip(clips.video, clips.digits, clips.directions, strict=True):
            wanted = {(requests.digits[index], requests.directions[index]): index for index in sorted(waiting)}
            index = wanted.get((digit, direction), wanted.get((digit, None)))
            if index is not None:
                found[index] = video
                waiting.discard(index)
    return torch.stack([found[index] for index in range(len(requests))])
