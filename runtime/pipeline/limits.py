"""Limits of a request's numbers and texts, and how a fault is said: one line, whichever way the value came."""

import math
import os
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

import numpy as np

from stiv_deploy.runtime.bundle.bounds import (
    RATE_LIMIT,
    SCALE_LIMIT,
    SHIFT_LIMITS,
    SIZE_LIMIT,
    STEP_LIMIT,
    STRETCH_LIMITS,
)
from stiv_deploy.runtime.errors import RequestError, briefly

Name = TypeVar("Name", bound=StrEnum)
GIB = 2**30
COUNT_LIMIT = 1_000
"""Videos of one request."""
SEED_LIMIT = 2**63
TEXT_LIMIT = 20_000
"""Characters of a prompt; the tokenizer cuts far earlier."""


class Bounds(NamedTuple):
    """Least and greatest allowed value, both allowed; both int for a whole number."""

    low: float
    high: float

    @property
    def whole(self) -> bool:
        """Whether the value is a whole number."""
        return isinstance(self.low, int)


FPS = Bounds(0.01, float(RATE_LIMIT))
BOUNDS = {
    "num_frames": Bounds(1, SIZE_LIMIT),
    "height": Bounds(1, SIZE_LIMIT),
    "width": Bounds(1, SIZE_LIMIT),
    "fps": FPS,
    "stride": Bounds(1, SIZE_LIMIT),
    "original_height": Bounds(1, SIZE_LIMIT),
    "original_width": Bounds(1, SIZE_LIMIT),
    "num_inference_steps": Bounds(1, STEP_LIMIT),
    "guidance_scale": Bounds(-SCALE_LIMIT, SCALE_LIMIT),
    "image_guidance_scale": Bounds(-SCALE_LIMIT, SCALE_LIMIT),
    "guidance_from": Bounds(0.0, 1.0),
    "guidance_until": Bounds(0.0, 1.0),
    "time_shift": Bounds(*SHIFT_LIMITS),
    "late_stretch": Bounds(*STRETCH_LIMITS),
    "seed": Bounds(0, SEED_LIMIT - 1),
    "count": Bounds(1, COUNT_LIMIT),
    "decode_tile": Bounds(0, SIZE_LIMIT),
}
"""Every number of a request by its field."""


def memory_bytes() -> int | None:
    """Physical memory of this machine, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(what: str, needed: int, remedy: str) -> None:
    """:class:`RequestError` if ``what`` needs more bytes than this machine has, before any are asked for."""
    there = memory_bytes()
    if there is not None and needed > there:
        raise RequestError(f"{what} needs {needed / GIB:.3g} GiB of memory, here are {there / GIB:.3g}; {remedy}")


def whole_number(name: str, value: Any) -> int:
    """``value`` as int; :class:`RequestError` if it is not a whole number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise RequestError(f"{name} must be a whole number, got {briefly(value)}")
    return int(value)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def number(name: str, value: Any) -> float:
    """``value`` as float; :class:`RequestError` if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not _is_finite(value):
        raise RequestError(f"{name} must be a finite number, got {briefly(value)}")
    return float(value)


def bounded(name: str, value: Any, bounds: Bounds | None = None) -> float:
    """``value`` as the int or float that ``bounds`` (those of ``name``) want; :class:`RequestError` outside them."""
    low, high = bounds = bounds or BOUNDS[name]
    result = whole_number(name, value) if bounds.whole else number(name, value)
    if not low <= result <= high:
        raise RequestError(f"{name} must be from {low} to {high}, got {briefly(result)}")
    return result


def named(kind: type[Name], name: str, value: Any) -> Name:
    """The member of ``kind`` called ``value``; :class:`RequestError` listing the names if there is none."""
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"unknown {name} {briefly(value)}; there are: {', '.join(kind)}") from None


def switch(name: str, value: Any) -> bool:
    """``value`` as bool; :class:`RequestError` if it is neither true nor false."""
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{name} must be true or false, got {briefly(value)}")
    return bool(value)


def text(name: str, value: Any) -> str:
    """``value``, a string of Unicode of at most ``TEXT_LIMIT`` characters; :class:`RequestError` if it is not."""
    if not isinstance(value, str):
        raise RequestError(f"a {name} must be a string, got {briefly(value)}")
    if len(value) > TEXT_LIMIT:
        raise RequestError(f"a {name} has at most {TEXT_LIMIT} characters, got {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"a {name} must be Unicode text, got {briefly(value)}") from None
    return value
