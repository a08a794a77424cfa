"""Bounds of the numbers and names in recipes, configs and settings: beyond every use, small enough to compute with."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

SIZE_LIMIT = 2**16
"""Frames, pixels of a side, widths of layers, clips at once: few enough for every product of two."""
COUNT_LIMIT = 10**9
"""Steps of a stage, and whatever is counted in steps or clips."""

Size = Annotated[int, Field(gt=0, le=SIZE_LIMIT)]
Count = Annotated[int, Field(gt=0, le=COUNT_LIMIT)]
Frame = Annotated[int, Field(ge=0, le=COUNT_LIMIT)]
"""Number of a frame of a video."""
Factor = Annotated[int, Field(gt=0, le=2**10)]
"""Pixels or frames of a latent, latents of a token."""
Layers = Annotated[int, Field(gt=0, le=1_000)]
Vocabulary = Annotated[int, Field(gt=0, le=2**24)]
Tokens = Annotated[int, Field(gt=1, le=2**14)]
"""Tokens of a text."""
Steps = Annotated[int, Field(gt=0, le=10_000)]
"""Steps of a sampler."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(gt=0, le=1e30)]
"""A learning rate; one that is too large diverges, which training says."""
Scale = Annotated[float, Field(ge=-1_000, le=1_000)]
"""A guidance scale."""
TimeShift = Annotated[float, Field(ge=1e-3, le=1e3)]
LateStretch = Annotated[float, Field(ge=1, le=10)]
Measure = Annotated[float, Field(ge=0, le=1e12)]
"""Seconds, motion, sharpness, and what is compared with those."""
Processes = Annotated[int, Field(ge=0, le=2**10)]
Name = Annotated[str, Field(max_length=100)]
Strides = Annotated[tuple[Size, ...], Field(min_length=1, max_length=1_000)]


def _a_path(path: Path) -> Path:
    """``ValueError`` for a path that no file system takes."""
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if "\0" in str(path):
        raise ValueError("a name has no NUL in it")
    if longest > 255:
        raise ValueError(f"has a name of {longest} bytes, file systems take 255")
    return path


SomePath = Annotated[Path, AfterValidator(_a_path)]
"""A path that may be one."""
