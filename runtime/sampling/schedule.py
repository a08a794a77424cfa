"""Sampling times of the flow: t = 0 is noise, t = 1 is data (arXiv 2412.07730, section 2.1)."""

import math

import numpy as np

from stiv_deploy.runtime.errors import RequestError

LATE = 0.12
"""Time from which on sampling can take longer steps."""


def shift_time(timestep: np.ndarray, shift: float) -> np.ndarray:
    """Move timesteps toward noise (shift > 1): t / (t + shift * (1 - t)).

    With sigma = 1 - t this is the resolution shift of Stable Diffusion 3 (arXiv 2403.03206, eq. 23).
    """
    return timestep / (timestep + shift * (1 - timestep))


def schedule(steps: int, shift: float = 1.0, late_stretch: float = 1.0) -> np.ndarray:
    """Sampling times 0 = t_0 < ... < t_steps = 1, fp64 [steps + 1].

    Before they are shifted, steps behind the time that becomes :data:`LATE` are ``late_stretch`` times as long as those
    before it: what a clip shows is decided early.

    Raises :class:`RequestError` for fewer than one step, a shift that is not positive and finite, or a stretch below 1.
    """
    if steps < 1:
        raise RequestError(f"num_inference_steps must be at least 1, got {steps}")
    if not (math.isfinite(shift) and shift > 0):
        raise RequestError(f"time_shift must be positive and finite, got {shift}")
    if not (math.isfinite(late_stretch) and late_stretch >= 1):
        raise RequestError(f"late_stretch must be finite and at least 1, got {late_stretch}")
    late = float(shift_time(np.array(LATE), 1 / shift))
    return shift_time(_stretched(np.linspace(0.0, 1.0, steps + 1), late_stretch, late), shift)


def _stretched(way: np.ndarray, factor: float, late: float) -> np.ndarray:
    """``way`` from 0 to 1 on another scale, which from ``late`` on has units ``factor`` times as long as before."""
    if factor == 1:
        return way
    ticks = np.array([0.0, late, late + (1 - late) / factor])
    return np.interp(way * ticks[-1], ticks, [0.0, late, 1.0])
