"""The noise that a clip starts from."""

from collections.abc import Sequence

import numpy as np


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Noise fp32 [len(seeds), *shape], each sample from its own seed, so that batching does not change it."""
    draws = (np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32) for seed in seeds)
    return np.stack(list(draws))
