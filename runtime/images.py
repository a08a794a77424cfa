"""Given images: read, checked against the video's size, and turned into a clip for the image encoder."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from stiv_deploy.runtime import media
from stiv_deploy.runtime.conditioning import frame_indices
from stiv_deploy.runtime.errors import RequestError

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


def clip_from_images(images: Mapping[int, np.ndarray], temporal_factor: int) -> tuple[list[int], np.ndarray]:
    """Latent frames that ``images`` (by video frame) give, and the clip fp32 [N * factor, 3, H, W] in [-1, 1] of them.

    A VAE that codes several frames as one latent frame gets, for every frame of such a group, its nearest given image.
    """
    groups = sorted({index // temporal_factor for index in images})
    frames = [group * temporal_factor + offset for group in groups for offset in range(temporal_factor)]
    nearest = [
        min((i for i in images if i // temporal_factor == frame // temporal_factor), key=lambda i: abs(i - frame))
        for frame in frames
    ]
    clip = np.stack([images[index] for index in nearest]).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return groups, clip.transpose(0, 3, 1, 2)  # (N * factor, 3, H, W)


def frames_from_video(video: np.ndarray) -> np.ndarray:
    """Frames uint8 [B, F, H, W, 3] from decoded video fp32 [B, F, 3, H, W] in [-1, 1]."""
    frames = video.transpose(0, 1, 3, 4, 2) * np.float32(127.5) + np.float32(127.5)
    return np.rint(frames, out=frames).clip(0, 255, out=frames).astype(np.uint8)
