"""Training data that is drawn on the fly from a number, in the form of a source."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stiv_deploy.stiv_ref.data.buckets import micro_conditions
from stiv_deploy.stiv_ref.data.source import Batch
from stiv_deploy.stiv_ref.objective import sample_generator
from stiv_deploy.stiv_ref.tasks import TaskName

CLIPS = 2**62
"""So many clips are drawn from."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A clip: ``frames`` uint8 [F, H, W, 3], every ``stride``-th of what they show, the caption, and a name.

    ``task`` is what it is for, whatever its stage is.
    """

    frames: NDArray[np.uint8]
    caption: str
    stride: int
    name: str
    task: TaskName | None = None


class DrawnSource:
    """A :class:`~stiv_deploy.stiv_ref.data.source.Source` of what ``clip`` draws, and ``still`` for single frames.

    Both are functions of a number alone, and give clips of one shape each. ``words`` are all that captions have.
    """

    def __init__(
        self,
        clip: Callable[[int], Drawn],
        still: Callable[[int], Drawn],
        words: Sequence[str],
        *,
        seed: int,
        stage: int,
    ) -> None:
        self.clip, self.still, self.seed, self.stage = clip, still, seed, stage
        self._words = tuple(words)

    def words(self) -> Sequence[str]:
        """As :class:`~stiv_deploy.stiv_ref.data.source.Source` says, whatever a recipe leaves out."""
        return self._words

    def batches(self, steps: range, parts: Sequence[range]) -> Iterator[list[Batch]]:
        """As :class:`~stiv_deploy.stiv_ref.data.source.Source` says."""
        for step in steps:
            yield [self._batch(step, part) for part in parts]

    def _batch(self, step: int, part: range) -> Batch:
        # The generator of a sample goes on to draw its noise and time, so its picture takes another one.
        generators = [sample_generator(self.seed + 1, self.stage, step, index) for index in part]
        clips = [self.clip(int(torch.randint(CLIPS, (), generator=each))) for each in generators]
        return Batch(
            video=video_of(clips),
            captions=[clip.caption for clip in clips],
            micro=torch.stack([_micro(clip) for clip in clips]),
            names=[clip.name for clip in clips],
            tasks=[clip.task for clip in clips],
        )

    def stills(self, count: int) -> Tensor:
        """As :class:`~stiv_deploy.stiv_ref.data.source.Source` says: of the first clips."""
        return video_of([self.still(index) for index in range(count)])[:, 0]

    def broken(self) -> list[str]:
        """As :class:`~stiv_deploy.stiv_ref.data.source.Source` says: nothing here is ever broken."""
        return []


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is mixed: ``share`` of all samples are of ``source``, and for ``task`` if not for the stage's."""

    source: DrawnSource
    share: float
    task: TaskName | None = None


def mixed_source(parts: Sequence[Part], *, seed: int, stage: int) -> DrawnSource:
    """A source of samples of all ``parts``, whose clips have one shape; a number alone says which part it is of."""
    ends = np.cumsum([part.share for part in parts])

    def part_of(index: int) -> Part:
        place = np.random.default_rng((index, len(parts))).random() * ends[-1]
        return parts[int(np.searchsorted(ends, place, side="right"))]

    def clip(index: int) -> Drawn:
        part = part_of(index)
        return replace(part.source.clip(index), task=part.task)

    words = dict.fromkeys(word for part in parts for word in part.source.words())
    return DrawnSource(clip, lambda index: part_of(index).source.still(index), tuple(words), seed=seed, stage=stage)


def _micro(clip: Drawn) -> Tensor:
    frames, height, width, _ = clip.frames.shape
    return micro_conditions((height, width), (0, 0), clip.stride, frames)


def video_of(clips: Sequence[Drawn]) -> Tensor:
    """Video fp32 [B, F, 3, H, W] in [-1, 1] of clips of one shape."""
    frames = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
    return frames.permute(0, 1, 4, 2, 3).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
