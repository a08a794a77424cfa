"""Pictures of latents without a decoder: what a clip looks like becoming, while it is made."""

import numpy as np

from stiv_deploy.runtime.bundle.manifest import Preview
from stiv_deploy.runtime.pipeline.animations import webp

MOST = 16
"""Frames of a preview; of more, so many are shown, evenly spaced."""


def preview_frames(latents: np.ndarray, preview: Preview) -> np.ndarray:
    """Frames uint8 [at most ``MOST``, h, w, 3] of latents fp32 [T, C, h, w]; what is not finite is black."""
    kept = latents[np.arange(min(MOST, len(latents))) * len(latents) // min(MOST, len(latents))]
    weights, bias = np.array(preview.weights, np.float32), np.array(preview.bias, np.float32)
    colours = np.moveaxis(kept, 1, -1) @ weights + bias
    return np.nan_to_num(colours * 127.5 + 127.5, nan=0.0).clip(0, 255).round().astype(np.uint8)


def preview_picture(latents: np.ndarray, preview: Preview, seconds: float) -> bytes:
    """The preview as a WebP that repeats, once in ``seconds``."""
    frames = preview_frames(latents, preview)
    return webp(frames, len(frames) / seconds, None)
