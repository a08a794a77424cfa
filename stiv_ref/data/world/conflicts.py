"""Prompts that contradict the frame given with them: does the clip follow the picture, or the words?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from stiv_deploy.stiv_ref.data.world.captions import COLOURS, Caption, word
from stiv_deploy.stiv_ref.data.world.clips import World, WorldClip
from stiv_deploy.stiv_ref.data.world.draws import Draws
from stiv_deploy.stiv_ref.data.world.scores import Scores
from stiv_deploy.stiv_ref.world_settings import MOTIONS, SHAPES

About = Literal["colour", "shape", "motion"]
Followed = Literal["picture", "words", "neither"]
ABOUT: tuple[About, ...] = get_args(About)
CONFLICT_DRAWS = 2
"""Seeds the choices of conflicts, beside the clip's number."""


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """A clip, whose first frames are given, and a caption that says something else ``about`` it."""

    clip: WorldClip
    caption: Caption
    about: About

    def followed(self, scores: Scores) -> Followed:
        """What a clip with these scores follows in what they differ about."""
        seen = getattr(scores.seen, self.about, None)
        if seen is not None and seen == getattr(self.clip.scene.truth, self.about):
            return "picture"
        return "words" if seen is not None and seen == getattr(self.caption.told, self.about) else "neither"


def conflicts(world: World, count: int, about: Sequence[About] = ABOUT, *, first: int = 0) -> list[Conflict]:
    """``count`` conflicts with the clips of ``world`` from number ``first`` on, ``about`` one thing after the other.

    A single frame shows no motion: a caption about another motion is in conflict only where more frames are given.
    """
    return [_conflict(world.clip(first + index), about[index % len(about)]) for index in range(count)]


def shares(found: Sequence[Conflict], scores: Sequence[Scores]) -> dict[str, float]:
    """Percent of clips, with these ``scores``, that follow the picture, the words, or neither."""
    followed = Counter(each.followed(one) for each, one in zip(found, scores, strict=True))
    return {name: round(100 * followed[name] / len(found), 1) for name in get_args(Followed)}


def _conflict(clip: WorldClip, about: About) -> Conflict:
    draws, told = Draws(CONFLICT_DRAWS, clip.index), replace(clip.scene.truth, size=None)
    if about == "colour":
        told = replace(told, colour=draws.choice([each for each in COLOURS if each != told.colour]))
    elif about == "shape":
        told = replace(told, shape=draws.choice([each for each in SHAPES if each != told.shape]))
    else:
        told = replace(told, motion=draws.choice([each for each in MOTIONS if each != told.motion]))
    return Conflict(clip=clip, caption=word(told, draws), about=about)
