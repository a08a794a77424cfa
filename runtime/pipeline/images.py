"""Given images: read, checked against the video's size, and turned into a clip for the image encoder."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from stiv_deploy.runtime.bundle.contract import ModelFacts
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline import media
from stiv_deploy.runtime.sampling.conditioning import frame_indices

ImageLike: TypeAlias = Image.Image | np.ndarray | str | PathLike[str]
"""A PIL image, a uint8 array [H, W, 3], or the path of an image file."""


def _pixels(image: ImageLike) -> np.ndarray:
    """The image as uint8 [height, width, 3]."""
    if isinstance(image, str | PathLike):
        return media.read_image(Path(image))
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise RequestError(
            f"cannot use a {type(image).__name__} as an image; give a file, a PIL image or a uint8 array"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise RequestError(f"the image array is {image.dtype} {list(image.shape)}; give uint8 [height, width, 3]")
    return image


def fitted_image(image: ImageLike, height: int, width: int, *, resize: bool = False) -> np.ndarray:
    """Image uint8 [height, width, 3]. A wrong size is a :class:`RequestError` unless ``resize`` asks for scaling."""
    pixels = _pixels(image)
    if pixels.shape[:2] == (height, width):
        return pixels
    if resize:
        return np.asarray(Image.fromarray(pixels).resize((width, height)))
    name = f"{image}" if isinstance(image, str | PathLike) else "the image"
    raise RequestError(
        f"{name} is {pixels.shape[1]}x{pixels.shape[0]} (width x height), the video is {width}x{height}; "
        "scale or crop it, or allow resizing"
    )


def given_images(
    image: ImageLike | Mapping[int, ImageLike] | None, frames: int, height: int, width: int, *, resize: bool = False
) -> dict[int, np.ndarray]:
    """Given images uint8 [height, width, 3] by video frame; one image alone is the first frame.

    Raises :class:`RequestError` for an index outside ``frames`` or an image that does not fit.
    """
    if image is None:
        return {}
    items: dict[Any, ImageLike] = dict(image) if isinstance(image, Mapping) else {0: image}
    for index in items:
        if not isinstance(index, int | np.integer):
            raise RequestError(f"images are given by frame number, got {index!r}")
    indices = frame_indices(items, frames)
    return {
        index: fitted_image(each, height, width, resize=resize)
        for index, each in zip(indices, items.values(), strict=True)
    }


def check_given_frames(images: Mapping[int, np.ndarray], model: ModelFacts) -> None:
    """Raise :class:`RequestError` if the VAE cannot code ``images`` (by video frame) without the frames between them.

    A causal VAE codes a frame from those before it: the first alone, or the first few that fill latent frames.
    """
    if not model.causal_vae or not images:
        return
    factor, given = model.temporal_factor, sorted(images)
    if given != list(range(len(given))) or (len(given) - 1) % factor:
        raise RequestError(
            f"images are given for frames {', '.join(map(str, given))}; this bundle's VAE codes each frame from those "
            f"before it: give frame 0 alone, or the first {1 + factor}, {1 + 2 * factor}, ... frames"
        )


def clip_from_images(images: Mapping[int, np.ndarray], model: ModelFacts) -> tuple[list[int], np.ndarray]:
    """Latent frames that ``images`` (by video frame) give, and the clip fp32 [N, 3, H, W] in [-1, 1] of them.

    A causal VAE gets the images as they are, see :func:`check_given_frames`. One that codes several frames as one
    latent frame, each such group on its own, gets for every frame of a group its nearest given image.
    """
    if model.causal_vae:
        return list(range(model.latent_frames(len(images)))), _clip([images[index] for index in sorted(images)])
    factor = model.temporal_factor
    groups = sorted({index // factor for index in images})
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
    """Frames uint8 [B, F, H, W, 3] from decoded video fp32 [B, F, 3, H, W] in [-1, 1]."""
    frames = video.transpose(0, 1, 3, 4, 2) * np.float32(127.5) + np.float32(127.5)
    return np.rint(frames, out=frames).clip(0, 255, out=frames).astype(np.uint8)
