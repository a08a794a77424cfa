"""Given images: fitted to the video's size, checked, and turned into a clip for the image encoder."""

import logging
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum

import numpy as np
from PIL import Image, ImageOps

from stiv_deploy.runtime.bundle.contract import ModelFacts
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.tasks import task_of

log = logging.getLogger(__name__)


class Fit(StrEnum):
    """How a picture of another size becomes a frame."""

    EXACT = "exact"
    """Not at all: it must have the video's size."""
    STRETCH = "stretch"
    """Scaled to the video's size, whatever its shape."""
    CROP = "crop"
    """Scaled until it covers the frame; what sticks out, left and right or above and below, is cut off."""
    PAD = "pad"
    """Scaled until it fits into the frame, in the middle of the background."""


def fitted_image(
    pixels: np.ndarray,
    height: int,
    width: int,
    fit: Fit = Fit.EXACT,
    name: str = "the image",
    background: tuple[int, int, int] = (0, 0, 0),
    *,
    tell: bool = True,
) -> np.ndarray:
    """``pixels`` uint8 [h, w, 3] as uint8 [height, width, 3], scaled bicubically; an equal size stays as it is.

    ``background`` (RGB) is what ``Fit.PAD`` pads with. A warning says what ``Fit.CROP`` cuts off, if ``tell``.

    Raises :class:`RequestError`, which calls the image ``name``, for another size with ``Fit.EXACT``.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    image, size = Image.fromarray(pixels), (width, height)
    match fit:
        case Fit.STRETCH:
            return np.asarray(image.resize(size))
        case Fit.CROP:
            if tell:
                _tell_cut(image, size, name)
            return np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC))
        case Fit.PAD:
            return _padded(image, size, background)
    raise RequestError(
        f"{name} is {pixels.shape[1]}x{pixels.shape[0]} (width x height), the video is {width}x{height}; "
        "give it that size, or choose a fit: stretch, crop or pad"
    )


def _tell_cut(image: Image.Image, size: tuple[int, int], name: str) -> None:
    """Say so if a pixel or more of ``image`` does not get into a frame of ``size`` (width, height)."""
    scale = max(size[0] / image.width, size[1] / image.height)
    columns, rows = image.width - size[0] / scale, image.height - size[1] / scale
    if max(columns, rows) >= 1:
        sides = f"{columns:.0f} columns left and right" if columns > rows else f"{rows:.0f} rows above and below"
        frame = f"{size[0]}x{size[1]}"
        log.warning(
            f"{name} is {image.width}x{image.height}, the video {frame}: {sides} are cut off; the fit pad keeps them"
        )


def _padded(image: Image.Image, size: tuple[int, int], background: tuple[int, int, int]) -> np.ndarray:
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = [min(max(1, round(side * scale)), most) for side, most in zip(image.size, size, strict=True)]
    frame = Image.new("RGB", size, background)
    frame.paste(image.resize((inner[0], inner[1])), ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return np.asarray(frame)


def check_given_frames(images: Collection[int], frames: int, model: ModelFacts) -> None:
    """Raise :class:`RequestError` if the VAE cannot code ``images`` of ``frames`` frames without those between them.

    A causal VAE codes a frame from those before it: the first alone, or the first few that fill latent frames.
    """
    if not model.causal_vae or not images:
        return
    factor = model.temporal_factor
    if not task_of(images, frames).leading or (len(images) - 1) % factor:
        raise RequestError(
            f"images are given for frames {', '.join(map(str, sorted(images)))}; this bundle's VAE codes each frame "
            f"from those before it: give frame 0 alone, or the first {1 + factor}, {1 + 2 * factor}, ... frames"
        )


def latent_groups(images: Collection[int], model: ModelFacts) -> list[int]:
    """Latent frames that ``images``, by video frame, give; those of a causal VAE are the first few."""
    if model.causal_vae:
        return list(range(model.latent_frames(len(images)))) if images else []
    return sorted({index // model.temporal_factor for index in images})


def clip_from_images(images: Mapping[int, np.ndarray], model: ModelFacts) -> tuple[list[int], np.ndarray]:
    """Latent frames that ``images`` (by video frame) give, and the clip fp32 [N, 3, H, W] in [-1, 1] of them.

    A causal VAE gets the images as they are, see :func:`check_given_frames`. One that codes several frames as one
    latent frame, each such group on its own, gets for every frame of a group its nearest given image.
    """
    factor, groups = model.temporal_factor, latent_groups(images, model)
    if model.causal_vae:
        return groups, _clip([images[index] for index in sorted(images)])
    frames = [group * factor + offset for group in groups for offset in range(factor)]
    nearest = [
        min((i for i in images if i // factor == frame // factor), key=lambda i: abs(i - frame)) for frame in frames
    ]
    return groups, _clip([images[index] for index in nearest])


def _clip(images: Sequence[np.ndarray]) -> np.ndarray:
    """Clip fp32 [N, 3, H, W] in [-1, 1] of images uint8 [H, W, 3]."""
    clip = np.stack(images).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return clip.transpose(0, 3, 1, 2)


def frames_from_video(video: np.ndarray) -> np.ndarray:
    """Frames uint8 [B, F, H, W, 3] from decoded video fp32 [B, F, 3, H, W] in [-1, 1]; NaN is black.

    The ``frames`` graph computes the same, bit by bit on a CPU.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # of NaN, and of what is far beyond
        frames = video.transpose(0, 1, 3, 4, 2) * np.float32(127.5) + np.float32(127.5)
        return np.rint(frames, out=frames).clip(0, 255, out=frames).astype(np.uint8)
