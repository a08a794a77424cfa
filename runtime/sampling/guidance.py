"""Guidance as data: which branches, each a row of the model, a sample has, and how ``step`` weighs their velocities.

Branches are ordered from most to least conditioned, so that the first is the conditional one that CFG-Renorm takes
its norm from. Source: arXiv 2412.07730, sections 2.3.2, 3.4.2 and A.
"""

import math
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from stiv_deploy.runtime.errors import RequestError


class GuidanceMode(StrEnum):
    """Which branches are run at each step."""

    NONE = "none"
    """Conditional branch only."""
    JIT = "jit"
    """Joint image-text guidance: text + image against neither. Two branches, one scale."""
    SIT = "sit"
    """Separate image-text guidance: text + image, image only, neither. Three branches, two scales."""


class Unseen(StrEnum):
    """What a branch that does not see the image gets at the given frames."""

    NOISED = "noised"
    """The point of the flow path between the noise and the given latents."""
    ZERO = "zero"
    """Zero latents at every step, as STIV's multi-view model (arXiv 2412.07730, section 3.6)."""


class Branch(NamedTuple):
    """What one branch is conditioned on; without text it gets the negative (by default empty) prompt."""

    text: bool
    image: bool


BRANCHES: dict[GuidanceMode, tuple[Branch, ...]] = {
    GuidanceMode.NONE: (Branch(text=True, image=True),),
    GuidanceMode.JIT: (Branch(text=True, image=True), Branch(text=False, image=False)),
    GuidanceMode.SIT: (Branch(text=True, image=True), Branch(text=False, image=True), Branch(text=False, image=False)),
}


def branch_weights(mode: GuidanceMode, guidance_scale: float, image_scale: float) -> np.ndarray:
    """Weights fp32 [branches], summing to 1, of the branches' velocities in the guided velocity.

    JIT ``v0 + s * (v - v0)`` gives [s, 1 - s]; SIT ``v0 + s_i * (v_i - v0) + s_t * (v - v_i)`` gives
    [s_t, s_i - s_t, 1 - s_i]. Raises :class:`RequestError` for a scale that is not finite.
    """
    for name, scale in (("guidance_scale", guidance_scale), ("image_guidance_scale", image_scale)):
        if not math.isfinite(scale):
            raise RequestError(f"{name} must be finite, got {scale}")
    weights = {
        GuidanceMode.NONE: (1.0,),
        GuidanceMode.JIT: (guidance_scale, 1 - guidance_scale),
        GuidanceMode.SIT: (guidance_scale, image_scale - guidance_scale, 1 - image_scale),
    }[mode]
    return np.array(weights, dtype=np.float32)


class GuidanceRow(NamedTuple):
    """A row of the model: what it is conditioned on, and the weight of its velocity in the guided velocity."""

    branch: Branch
    weight: float


def guidance_rows(mode: GuidanceMode, weights: np.ndarray) -> list[GuidanceRow]:
    """The rows that a sample needs of its branches' ``weights`` [branches]: the conditional one, and all not 0.

    Guidance with scale 1 is the conditional velocity, and needs one row.
    """
    rows = [GuidanceRow(*pair) for pair in zip(BRANCHES[mode], weights.tolist(), strict=True)]
    return [rows[0], *(row for row in rows[1:] if row.weight != 0)]
