"""Bounds of the numbers and names in a manifest: beyond every model, and small enough to compute and allocate with."""

from typing import Annotated

from pydantic import Field

SIZE_LIMIT = 2**16
"""Frames, pixels of a side, clips at once, widths of layers: few enough for every product of two."""
STEP_LIMIT = 10_000
SCALE_LIMIT = 1_000.0
"""Guidance scales lie between minus this and this."""
RATE_LIMIT = 1_000
"""Frames per second."""
SHIFT_LIMITS = (0.001, 1_000.0)
"""Least and greatest time shift."""
STRETCH_LIMITS = (1.0, 10.0)
"""Least and greatest stretch of late steps."""
WEIGHT_LIMIT = 1_000.0
"""Weights of a solver lie between minus this and this."""
BLOCK_LIMIT = 1_000
TOKEN_LIMIT = 2**14
"""Tokens of a prompt."""

Size = Annotated[int, Field(ge=1, le=SIZE_LIMIT)]
Factor = Annotated[int, Field(ge=1, le=2**10)]
"""Pixels or frames of a latent, latents of a token."""
Scale = Annotated[float, Field(ge=-SCALE_LIMIT, le=SCALE_LIMIT)]
Weight = Annotated[float, Field(ge=-WEIGHT_LIMIT, le=WEIGHT_LIMIT)]
Weights = Annotated[tuple[tuple[Weight, Weight], ...], Field(max_length=STEP_LIMIT)]
"""AB2's in every step but the first: of the velocity there, and of the one before. None: the rule's own."""
Steps = Annotated[tuple[Annotated[int, Field(ge=0, le=STEP_LIMIT)], ...], Field(max_length=STEP_LIMIT)]
"""Numbers of steps, counted from 0."""
Bytes = Annotated[int, Field(ge=0, le=2**50)]
Name = Annotated[str, Field(max_length=200)]
Digest = Annotated[str, Field(max_length=64)]
"""A SHA-256 in hex."""
