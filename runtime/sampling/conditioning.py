"""Frame replacement, the host's half: which frames are given, which branches see them, and the clean latents.

A boolean frame mask [B, T] marks latent frames that are given; the ``step`` graph puts their clean latents into the
model input and the result (arXiv 2412.07730, section 3).
"""

from collections.abc import Iterable, Mapping

import numpy as np

from stiv_deploy.runtime.bundle.contract import MASKED
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.guidance import BRANCHES, GuidanceMode


def frame_indices(indices: Iterable[int], frames: int, what: str = "image") -> list[int]:
    """Indices into ``frames`` frames with negative ones counted from the end, in the given order.

    Raises :class:`RequestError`, which calls what is given ``what``, for an index out of range or a frame given twice.
    """
    resolved: list[int] = []
    for index in indices:
        if not -frames <= index < frames:
            raise RequestError(
                f"{what} for frame {index}, but the video has frames 0 to {frames - 1} (or -{frames} to -1)"
            )
        if index % frames in resolved:
            raise RequestError(f"{what} for frame {index % frames} given twice; give each frame once")
        resolved.append(index % frames)
    return resolved


def frame_mask(batch: int, frames: int, given: Iterable[int] = ()) -> np.ndarray:
    """Frame mask bool [batch, frames], true at the ``given`` latent frames of every sample."""
    mask = np.zeros((batch, frames), dtype=np.bool_)
    mask[:, list(given)] = True
    return mask


def branch_mask(mode: GuidanceMode, mask: np.ndarray) -> np.ndarray:
    """Mask bool [branches, B, T]: ``mask`` [B, T] in branches that see the image, all false in the others."""
    return np.stack([mask if branch.image else np.zeros_like(mask) for branch in BRANCHES[mode]])


def scatter_frames(given: Mapping[int, np.ndarray], batch: int, shape: tuple[int, ...]) -> np.ndarray:
    """Clean latents fp32 [batch, *shape] with ``shape`` = (T, C, h, w): ``given`` frames [C, h, w], zero elsewhere."""
    clean = np.zeros((batch, *shape), dtype=np.float32)
    for index, latents in given.items():
        clean[:, index] = latents
    return clean


def additive_mask(token_mask: np.ndarray) -> np.ndarray:
    """Additive text mask fp32 [B, 1, 1, L] of a 0/1 token mask [B, L]: 0 at text, ``MASKED`` at padding."""
    return np.where(token_mask == 0, np.float32(MASKED), np.float32(0))[:, None, None, :]


def micro_conditions(height: int, width: int, stride: int, video_frames: int) -> np.ndarray:
    """Micro-conditions fp32 [6]: original height and width, crop (none), sampling stride, number of frames."""
    return np.array([height, width, 0, 0, stride, video_frames], dtype=np.float32)
