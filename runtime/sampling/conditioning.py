"""Frame replacement, the host's half: which frames are given, which rows see them, and the clean latents.

A boolean frame mask [T] marks the latent frames of a sample that are given; the ``step`` graph puts their clean latents
into the model input and the result (arXiv 2412.07730, section 2.3.1).
"""

from collections.abc import Iterable, Mapping

import numpy as np

from stiv_deploy.runtime.bundle.contract import MASKED
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.guidance import Branch


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


def frame_mask(frames: int, given: Iterable[int] = ()) -> np.ndarray:
    """Frame mask bool [frames] of a sample, true at its ``given`` latent frames."""
    mask = np.zeros(frames, dtype=np.bool_)
    mask[list(given)] = True
    return mask


def row_mask(branch: Branch, mask: np.ndarray) -> np.ndarray:
    """Frames bool [T] that the row of ``branch`` gets clean: those of ``mask`` if it sees the image, else none."""
    return mask if branch.image else np.zeros_like(mask)


def scatter_frames(given: Mapping[int, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Clean latents fp32 ``shape`` = [T, C, h, w] of a sample: ``given`` frames [C, h, w], zero elsewhere."""
    clean = np.zeros(shape, dtype=np.float32)
    for index, latents in given.items():
        clean[index] = latents
    return clean


def additive_mask(token_mask: np.ndarray) -> np.ndarray:
    """Additive text mask fp32 [B, 1, 1, L] of a 0/1 token mask [B, L]: 0 at text, ``MASKED`` at padding."""
    return np.where(token_mask == 0, np.float32(MASKED), np.float32(0))[:, None, None, :]


def micro_conditions(height: int, width: int, stride: int, video_frames: int) -> np.ndarray:
    """Micro-conditions fp32 [6]: original height and width, crop (none), sampling stride, number of frames."""
    return np.array([height, width, 0, 0, stride, video_frames], dtype=np.float32)
