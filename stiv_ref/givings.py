"""Givings: which latent frames of a clip the model gets clean, by name (arXiv 2412.07730, section 5 and appendix J).

A giving is written as in a recipe: ``none``, ``first``, ``first K``, ``every N`` (frames 0, N, 2N ...), ``ends`` (the
first and the last frame) or ``random``. The last has 1 to T - 1 of T frames, every number as likely as every other, and
every choice of so many frames as well.
"""

import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Annotated, NamedTuple

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from stiv_deploy.stiv_ref.errors import briefly

NONE = "none"
WANTED = "none, first, first K, every N, ends and random, K and N from 2 on"
PATTERN = re.compile(r"(none|first|ends|random)|(first|every) ([2-9]|[1-9]\d{1,4})")
FIXED: dict[str, Callable[[int, int], list[int]]] = {
    "none": lambda _frames, _number: [],
    "first": lambda frames, number: list(range(min(number, frames))),
    "every": lambda frames, number: list(range(0, frames, number)),
    "ends": lambda frames, _number: sorted({0, frames - 1}),
}
"""Given frames, of so many, of all kinds that leave no choice; the number is that in the name."""


class Giving(NamedTuple):
    """What the name of a giving says: its ``kind``, and the K of ``first K`` or the N of ``every N``."""

    kind: str
    number: int = 1

    @property
    def leading(self) -> bool:
        """Whether it is the beginning of a clip, or nothing: a causal VAE can code that alone."""
        return self.kind in (NONE, "first")

    @property
    def least_frames(self) -> int:
        """The fewest frames of which one is left to make."""
        return {"none": 1, "first": self.number + 1, "every": 2, "ends": 3, "random": 2}[self.kind]

    def frames(self, frames: int, generator: torch.Generator) -> list[int]:
        """Which of ``frames`` latent frames are given, ascending; only ``random`` draws from ``generator``."""
        if self.kind != "random":
            return FIXED[self.kind](frames, self.number)
        many = int(torch.randint(1, frames, (1,), generator=generator))
        return sorted(torch.randperm(frames, generator=generator)[:many].tolist())


def giving(name: str) -> Giving:
    """The giving of this name; ``ValueError`` for another name."""
    found = PATTERN.fullmatch(name)
    if found is None:
        raise ValueError(f"{briefly(name)} is no giving of frames; there are {WANTED}")
    return Giving(found[1] or found[2], int(found[3] or 1))


def _a_giving(name: str) -> str:
    giving(name)
    return name


def _a_mix(mix: Mapping[str, float]) -> Mapping[str, float]:
    total = sum(mix.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the shares add up to {total:g}, not to 1")
    return mix


GivingName = Annotated[str, Field(max_length=100), AfterValidator(_a_giving)]
Share = Annotated[float, Field(gt=0, le=1)]
Mix = Annotated[dict[GivingName, Share], Field(min_length=1, max_length=100), AfterValidator(_a_mix)]
"""Givings and the share of the samples that each has; the shares add up to 1."""


def drawn(mix: Mapping[str, float], generator: torch.Generator) -> str:
    """One of the givings of ``mix``, by its share. With a single one nothing is drawn from ``generator``."""
    names = list(mix)
    if len(names) == 1:
        return names[0]
    chance = torch.rand(1, generator=generator, dtype=torch.float64).item()
    below = (name for name, end in zip(names, accumulate(mix.values()), strict=True) if chance < end)
    return next(below, names[-1])


def frame_mask(given: list[int], frames: int) -> Tensor:
    """Bool [frames], true at the frames ``given``."""
    mask = torch.zeros(frames, dtype=torch.bool)
    mask[given] = True
    return mask
