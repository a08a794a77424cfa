"""Whether a finished video looks like one: what is told of a service that makes nothing but black or still pictures."""

import numpy as np

DARK = 8
"""Of 255: where no value is larger, a video is black."""


def suspicions(frames: np.ndarray) -> list[str]:
    """``black`` where nothing can be seen of ``frames`` uint8 [F, H, W, 3], ``frozen`` where all are the same."""
    found = ["black"] if frames.max() <= DARK else []
    return found + (["frozen"] if len(frames) > 1 and (frames[1:] == frames[:1]).all() else [])
