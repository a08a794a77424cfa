"""The world as training data."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stiv_deploy.stiv_ref.data.buckets import micro_conditions
from stiv_deploy.stiv_ref.data.source import Batch
from stiv_deploy.stiv_ref.data.world.captions import words
from stiv_deploy.stiv_ref.data.world.clips import World, WorldClip
from stiv_deploy.stiv_ref.objective import sample_generator
from stiv_deploy.stiv_ref.world_settings import WorldData

CLIPS = 2**62
"""So many clips of the split are drawn from."""


class WorldSource:
    """A :class:`~stiv_deploy.stiv_ref.data.source.Source` of clips of the world, drawn on the fly."""

    def __init__(self, settings: WorldData, *, seed: int, stage: int, frames: int, side: int) -> None:
        self.settings, self.seed, self.stage = settings, seed, stage
        self.world = World(settings, frames=frames, side=side)

    def words(self) -> Sequence[str]:
        """As :class:`~stiv_deploy.stiv_ref.data.source.Source` says: all that any world's captions have."""
        return words()

    def batches(self, steps: range, parts: Sequence[range]) -> Iterator[list[Batch]]:
        """As :class:`~stiv_deploy.stiv_ref.data.source.Source` says."""
        for step in steps:
            yield [self._batch(step, part) for part in parts]

    def _batch(self, step: int, part: range) -> Batch:
        # The generator of a sample goes on to draw its noise and time, so its picture takes another one.
        generators = [sample_generator(self.seed + 1, self.stage, step, index) for index in part]
        clips = [self.world.clip(int(torch.randint(CLIPS, (), generator=each))) for each in generators]
        size = (self.world.side, self.world.side)
        return Batch(
            video=video_of(clips),
            captions=[clip.caption.text for clip in clips],
            micro=torch.stack([micro_conditions(size, (0, 0), clip.stride, len(clip.frames)) for clip in clips]),
            names=[f"clip {clip.index} of the world" for clip in clips],
        )

    def stills(self, count: int) -> Tensor:
        """As :class:`~stiv_deploy.stiv_ref.data.source.Source` says: of the first clips."""
        world = World(self.settings, frames=1, side=self.world.side)
        return video_of([world.clip(index) for index in range(count)])[:, 0]

    def broken(self) -> list[str]:
        """As :class:`~stiv_deploy.stiv_ref.data.source.Source` says: nothing here is ever broken."""
        return []


def video_of(clips: Sequence[WorldClip]) -> Tensor:
    """Video fp32 [B, F, 3, H, W] in [-1, 1] of clips of one shape."""
    frames = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
    return frames.permute(0, 1, 4, 2, 3).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
