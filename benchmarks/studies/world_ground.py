"""The drawn world as a study's ground: the world of the shipped checkpoint's recipe, judged by the pixels.

Held-out clips are those whose captions tell the motion. A moving clip's *speed* is in percent of the mean of the real
ones: neither captions nor a first frame tell it, and real clips differ. Mini models learn 48 pixels: of smaller
pictures the VAE leaves too little to tell shapes by.
"""

from collections.abc import Iterator, Sequence
from itertools import count as numbers
from itertools import islice

import above  # noqa: F401  # isort: split
import numpy as np
import torch
from fidelity import fidelity
from ground import CHECKPOINTS, FRAMES, STALE, Result, Shape, Video
from world_scores import as_frames, as_video, wanted, world_of

from stiv_deploy.stiv_ref.data.drawn import CLIPS
from stiv_deploy.stiv_ref.data.world.clips import Split, World, WorldClip
from stiv_deploy.stiv_ref.data.world.conflicts import Conflict, conflicts, shares
from stiv_deploy.stiv_ref.data.world.scores import Scores, asked, score

A_SEED = 1_000
"""So many held-out clips are a seed's own."""
JUDGED = ("colour", "shape", "motion", "identity", "smooth", "right")


def video_of(clips: Sequence[WorldClip]) -> torch.Tensor:
    """Video fp32 [B, F, 3, H, W] in [-1, 1] of ``clips`` of one shape."""
    return torch.from_numpy(np.ascontiguousarray(as_video(np.stack([clip.frames for clip in clips]))))


class WorldClips:
    """Clips of the world."""

    def __init__(self, truth: Sequence[WorldClip]) -> None:
        self.truth, self.video = truth, video_of(truth)
        self.captions = [clip.caption.text for clip in truth]

    def scores(self, video: Video, *, image: bool) -> Result:
        """As :class:`ground.Clips` says."""
        found = self._judged(video, image=image)
        result: Result = {name: 100 * float(np.mean([getattr(one, name) for one in found])) for name in JUDGED}
        pairs = [(one, clip) for one, clip in zip(found, self.truth, strict=True) if clip.speed]
        speeds = np.array([one.speed for one, _ in pairs]) / np.mean([clip.speed for _, clip in pairs])
        result |= {"speed": 100 * float(speeds.mean()), "stale": 100 * float(np.mean(100 * speeds < STALE))}
        return result | (fidelity(video, self.video.numpy()) if image else {})

    def right(self, video: Video) -> list[bool]:
        """As :class:`ground.Clips` says."""
        return [one.right for one in self._judged(video, image=True)]

    def _judged(self, video: Video, *, image: bool) -> list[Scores]:
        pairs = zip(as_frames(video), self.truth, strict=True)
        return [score(frames, wanted(clip, int(image))) for frames, clip in pairs]


class WorldConflicts:
    """Clips under captions that name another colour or another shape than their first frame shows."""

    def __init__(self, found: Sequence[Conflict]) -> None:
        self.found, self.video = found, video_of([each.clip for each in found])
        self.captions = [each.caption.text for each in found]

    def followed(self, video: Video) -> dict[str, float]:
        """As :class:`ground.Conflicts` says."""
        pairs = zip(as_frames(video), self.found, strict=True)
        return shares(self.found, [score(frames, asked(each.caption.told)) for frames, each in pairs])


class WorldGround:
    """As :class:`ground.Ground` says."""

    name, place = "world", " in the world"
    checkpoint = CHECKPOINTS / "world"
    shape, shipped = Shape(FRAMES, 48), Shape(16, 64)
    steps = 12
    caption_tokens = 11
    columns = {one: one for one in JUDGED} | {"right": "all", "speed": "speed"}
    whole, speed = "right", "speed"
    continuation = " A first frame and a caption leave the speed open: no clip can be sure of its later frames."

    def __init__(self) -> None:
        self.settings, _ = world_of(self.checkpoint, None)

    def captions(self) -> list[str]:
        """The empty one: of the others there are thousands."""
        return [""]

    def draw(self, count: int, shape: Shape, generator: torch.Generator) -> WorldClips:
        """As :class:`ground.Ground` says."""
        world = self._world(shape, "train")
        return WorldClips([world.clip(index) for index in torch.randint(CLIPS, (count,), generator=generator).tolist()])

    def clips(self, count: int, seed: int, shape: Shape) -> WorldClips:
        """As :class:`ground.Ground` says."""
        return WorldClips(list(islice(self._telling(shape, A_SEED * seed), count)))

    def conflicts(self, count: int, seed: int, shape: Shape) -> WorldConflicts:
        """As :class:`ground.Ground` says."""
        return WorldConflicts(conflicts(self._world(shape, "test"), count, ("colour", "shape"), first=A_SEED * seed))

    def _world(self, shape: Shape, split: Split) -> World:
        return World(self.settings, frames=shape.frames, side=shape.size, split=split)

    def _telling(self, shape: Shape, first: int) -> Iterator[WorldClip]:
        """Held-out clips from number ``first`` on whose captions tell the motion."""
        world = self._world(shape, "test")
        return (clip for index in numbers(first) if (clip := world.clip(index)).caption.told.motion)
