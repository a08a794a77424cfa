"""What a model is trained for: stills or video, and which latent frames it is given (arXiv 2412.07730, section 3).

One model can learn them all, one after the other: a task is a pattern of given frames, and nothing else.
"""

from itertools import count
from typing import Literal, NamedTuple

TaskName = Literal["t2i", "t2v", "ti2v", "predict", "interpolate"]


class Task(NamedTuple):
    """``given`` are the latent frames that the model gets clean. Without ``video`` there is one frame, a still."""

    video: bool = True
    given: slice = slice(0)

    @property
    def conditioned(self) -> bool:
        """Whether any frame is given."""
        return bool(self.given_frames(1))

    @property
    def least_frames(self) -> int:
        """The fewest frames that are worth the task: a video has two, and one must be left to make."""
        return next(frames for frames in count(1 + self.video) if len(self.given_frames(frames)) < frames)

    def given_frames(self, frames: int) -> list[int]:
        """Which of ``frames`` latent frames are given."""
        return list(range(frames)[self.given])


TASKS: dict[TaskName, Task] = {
    "t2i": Task(video=False),
    "t2v": Task(),
    "ti2v": Task(given=slice(1)),
    "predict": Task(given=slice(4)),
    "interpolate": Task(given=slice(0, None, 2)),
}
"""All tasks. Video prediction is given the first four frames and interpolation every second one, as in the paper."""
