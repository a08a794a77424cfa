"""Sampling times of the flow: t = 0 is noise, t = 1 is data (arXiv 2412.07730, section 2.1)."""

import math

import numpy as np

from stiv_deploy.runtime.errors import RequestError


def shift_time(timestep: np.ndarray, shift: float) -> np.ndarray:
    """Move timesteps toward noise (shift > 1): t / (t + shift * (1 - t)).

    With sigma = 1 - t this is the resolution shift of Stable Diffusion 3 (arXiv 2403.03206, eq. 23).
    """
    return timestep / (timestep + shift * (1 - timestep))


def schedule(steps: int, shift: float = 1.0) -> np.ndarray:
    """Sampling times 0 = t_0 < ... < t_steps = 1, fp64 [steps + 1].

    Raises :class:`RequestError` for fewer than one step, or a shift that is not positive and finite.
    """
    if steps < 1:
        raise RequestError(f"num_inference_steps must be at least 1, got {steps}")
    if not (math.isfinite(shift) and shift > 0):
        raise RequestError(f"time_shift must be positive and finite, got {shift}")
    return shift_time(np.linspace(0.0, 1.0, steps + 1), shift)
