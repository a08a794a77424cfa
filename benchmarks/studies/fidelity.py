"""How near clips are to true ones, frame by frame."""

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.decibels import decibels


def psnr_by_frame(video: NDArray[np.float32], truth: NDArray[np.float32]) -> list[float]:
    """PSNR in dB (values in [-1, 1]) by frame of [B, F, 3, H, W] against ``truth`` (F or 1 frames), mean over clips."""
    error = np.square(np.clip(video, -1, 1) - truth).mean(axis=(2, 3, 4))
    return decibels(error, 2).mean(axis=0).round(3).tolist()


def fidelity(video: NDArray[np.float32], truth: NDArray[np.float32]) -> dict[str, list[float]]:
    """PSNR by frame of [B, F, 3, H, W] against the true continuation, and against the frame that was given."""
    return {"psnr": psnr_by_frame(video, truth), "psnr_to_first": psnr_by_frame(video, truth[:, :1])}
