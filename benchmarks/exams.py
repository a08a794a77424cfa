"""What clips are asked to show, and whether they do, by what a checkpoint was trained on: digits, or the world."""

from pathlib import Path
from typing import Protocol

import numpy as np
from clip_source import Video
from scorers import brightness, judge
from world_scores import as_frames, as_video, wanted

from stiv_deploy.stiv_ref.checkpoint import SamplingDefaults
from stiv_deploy.stiv_ref.data.digit_requests import balanced_requests, real_clips
from stiv_deploy.stiv_ref.data.world.clips import World
from stiv_deploy.stiv_ref.data.world.scores import score
from stiv_deploy.stiv_ref.recipe import load_recipe
from stiv_deploy.stiv_ref.world_settings import WorldData

Verdict = list[bool | None]
"""Whether a clip is right, in the order of :attr:`Exam.judged`; ``None`` for what its prompt leaves open."""


class Exam(Protocol):
    """Prompts, a first frame for each, and the judgement of clips made from them."""

    about: str
    """What the prompts are, in a few words."""
    judged: tuple[str, ...]
    """What is judged; the last is all of it together."""
    prompts: list[str]
    first_frames: Video
    """Pictures fp32 [B, 3, H, W] in [-1, 1]."""

    def verdicts(self, clips: Video, *, image: bool) -> list[Verdict]:
        """A verdict on each of the ``clips`` [B, F, 3, H, W] of the prompts, with their first frames if ``image``."""
        ...


class DigitExam:
    """Balanced prompts of moving digits, judged by a classifier and the way of the centre of mass."""

    about = "balanced prompts of moving digits"
    judged = ("digit", "direction", "both")

    def __init__(self, samples: int, frames: int) -> None:
        self.requests = balanced_requests(samples, moving=True)
        self.prompts = self.requests.prompts
        self.first_frames = np.ascontiguousarray(real_clips(self.requests, frames).numpy()[:, 0])

    def verdicts(self, clips: Video, *, image: bool) -> list[Verdict]:
        """As :class:`Exam` says."""
        found = judge(brightness(clips), self.requests.digits, self.requests.directions)
        return [[one.digit_right, one.direction_right, one.digit_right and one.direction_right] for one in found]


class WorldExam:
    """Captions of held-out clips of the world, judged by the pixels (``docs/world.md``)."""

    about = "captions of held-out clips of the world"
    judged = ("colour", "shape", "motion", "identity", "smooth", "right")

    def __init__(self, samples: int, settings: WorldData, sampling: SamplingDefaults) -> None:
        one_stride = settings.model_copy(update={"strides": (sampling.stride or 1,)})
        world = World(one_stride, frames=sampling.frames, side=sampling.height, split="test")
        self.clips = [world.clip(index) for index in range(samples)]
        self.prompts = [clip.caption.text for clip in self.clips]
        self.first_frames = np.ascontiguousarray(as_video(np.stack([clip.frames[0] for clip in self.clips])))

    def verdicts(self, clips: Video, *, image: bool) -> list[Verdict]:
        """As :class:`Exam` says."""
        pairs = zip(as_frames(clips), self.clips, strict=True)
        scores = [score(frames, wanted(clip, int(image))) for frames, clip in pairs]
        return [[getattr(one, name) for name in self.judged] for one in scores]


def exam_of(checkpoint: Path, sampling: SamplingDefaults, samples: int) -> Exam:
    """The exam for what ``checkpoint`` was trained on, by the recipe beside it; of digits without one."""
    recipe = checkpoint / "recipe.toml"
    last = load_recipe(recipe) if recipe.is_file() else None
    parts = last.parts_of(last.stages[-1].data).values() if last else ()
    world = next((each for each in parts if isinstance(each, WorldData)), None)
    return DigitExam(samples, sampling.frames) if world is None else WorldExam(samples, world, sampling)
