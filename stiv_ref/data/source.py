"""What training data looks like to the trainer, whatever it is read from; and moving digits in that form.

A source is a pure function of the step: the samples of step s are the same whatever the number of processes, the size
of the micro-batches, or where a run was resumed. Sample ``index`` of a step's global batch is drawn by
``sample_generator(seed, stage, step, index)``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stiv_deploy.stiv_ref.data.moving_digits import WORDS, MovingDigits, micro_conditions
from stiv_deploy.stiv_ref.objective import sample_generator
from stiv_deploy.stiv_ref.tasks import TaskName
from stiv_deploy.stiv_ref.text import TextStates


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch. Either ``video`` fp32 [B, F, 3, H, W] in [-1, 1] or standardized ``latents`` [B, T, C, h, w].

    ``captions`` (one each) and, where they were pre-computed, their ``text`` states; ``micro`` fp32 [B, 6]: original
    height and width, crop top and left, frame stride, frames. ``names`` say which samples these are, for messages.
    ``tasks`` are the samples' own, where these are not the stage's.
    """

    video: Tensor | None = None
    latents: Tensor | None = None
    captions: list[str]
    text: TextStates | None = None
    micro: Tensor
    names: list[str]
    tasks: list[TaskName | None] | None = None


class Source(Protocol):
    """Training data of one stage."""

    def words(self) -> Sequence[str]:
        """All words of the captions, for the vocabulary of a small text encoder; sorted or in a fixed order."""

    def batches(self, steps: range, parts: Sequence[range]) -> Iterator[list[Batch]]:
        """Yield, for every step of ``steps``, one micro-batch for every range of sample indices in ``parts``."""

    def stills(self, count: int) -> Tensor:
        """``count`` single frames fp32 [count, 3, H, W] in [-1, 1], always the same: to measure latents, to show."""

    def broken(self) -> list[str]:
        """One line for every sample that could not be read so far: its name and why."""


class DigitsSource:
    """Moving digits, drawn on the fly."""

    def __init__(self, *, seed: int, stage: int, frames: int, size: int, split: str = "train") -> None:
        self.seed, self.stage, self.frames = seed, stage, frames
        self.digits = MovingDigits(split, size)

    def words(self) -> Sequence[str]:
        """As :class:`Source` says."""
        return WORDS

    def batches(self, steps: range, parts: Sequence[range]) -> Iterator[list[Batch]]:
        """As :class:`Source` says."""
        for step in steps:
            yield [self._batch(step, part) for part in parts]

    def _batch(self, step: int, part: range) -> Batch:
        # The generator of a sample goes on to draw its noise and time, so its picture takes another one.
        clips = [
            self.digits.draw(1, self.frames, sample_generator(self.seed + 1, self.stage, step, index)) for index in part
        ]
        captions = [clip.captions[0] for clip in clips]
        return Batch(
            video=torch.cat([clip.video for clip in clips]),
            captions=captions,
            micro=micro_conditions(len(clips), self.frames, self.digits.size),
            names=[f"{text} (step {step}, sample {index})" for text, index in zip(captions, part, strict=True)],
        )

    def stills(self, count: int) -> Tensor:
        """As :class:`Source` says."""
        return self.digits.draw(count, 1, sample_generator(self.seed, 0, 0, 0)).video[:, 0]

    def broken(self) -> list[str]:
        """As :class:`Source` says: digits are never broken."""
        return []
