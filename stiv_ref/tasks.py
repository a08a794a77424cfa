"""What a model is trained for: stills or video, and which latent frames it is given (arXiv 2412.07730, section 5).

One model can learn them all, one after the other or all at once: a task is a mix of givings
(:mod:`~stiv_deploy.stiv_ref.givings`), drawn anew for every sample, and nothing else.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from stiv_deploy.stiv_ref.givings import NONE, Giving, drawn, frame_mask, giving
from stiv_deploy.stiv_ref.guidance import Unseen

TaskName = Literal["t2i", "t2v", "ti2v", "predict", "interpolate", "keyframes", "views", "all", "mix"]


class Task(NamedTuple):
    """``mix`` has the givings and the share of the samples that each has. Without ``video`` a sample is a still.

    ``unseen`` is what a sample that loses its image gets at the given frames, in training and, in the unconditional
    branch of guidance, in sampling.
    """

    video: bool = True
    mix: Mapping[str, float] = MappingProxyType({NONE: 1.0})
    unseen: Unseen = Unseen.NOISED

    @property
    def conditioned(self) -> bool:
        """Whether any frame is given to any sample."""
        return set(self.mix) != {NONE}

    @property
    def givings(self) -> dict[str, Giving]:
        """The givings by name, in the order of the mix."""
        return {name: giving(name) for name in self.mix}

    @property
    def least_frames(self) -> int:
        """The fewest frames that are worth the task: a video has two, and every giving leaves one to make."""
        return max(1 + self.video, *(each.least_frames for each in self.givings.values()))

    def draw(self, frames: int, generator: torch.Generator) -> Tensor:
        """Frame mask bool [frames] of one sample; a task of one giving draws nothing, unless that is ``random``."""
        return frame_mask(giving(drawn(self.mix, generator)).frames(frames, generator), frames)

    def shown(self, number: int, frames: int) -> Tensor:
        """Frame mask bool [frames] of picture ``number`` of those that show the task: the givings in turn."""
        generator = torch.Generator().manual_seed(number)
        return frame_mask(giving(list(self.mix)[number % len(self.mix)]).frames(frames, generator), frames)


MIX: Final = "mix"
"""The task of a stage that writes its own mix."""
TASKS: Mapping[str, Task] = {
    "t2i": Task(video=False),
    "t2v": Task(),
    "ti2v": Task(mix={"first": 1.0}),
    "predict": Task(mix={"first 4": 1.0}),
    "interpolate": Task(mix={"every 2": 1.0}),
    "keyframes": Task(mix={"first": 0.5, "ends": 0.5}),
    "views": Task(mix={"first": 1.0}, unseen=Unseen.ZERO),
    "all": Task(mix={NONE: 0.2, "first": 0.2, "first 4": 0.15, "every 2": 0.15, "ends": 0.15, "random": 0.15}),
}
"""All tasks but ``mix``. Video prediction is given the first four frames, interpolation every second one, and views the
first of them, as in the paper. Its long video has two ways, and ``keyframes`` both, at whatever stride a clip has:
frames far apart, of which the first may be given, and what lies between two of them."""
