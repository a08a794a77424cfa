"""Resolution buckets: which videos share one, and how frames are resized and cropped to it.

Sizes are (height, width) in pixels. Every batch comes from one bucket, so that its samples stack.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Size = tuple[int, int]


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """Number of the bucket for a video of ``size``: the nearest log aspect ratio; of those the largest that does not
    enlarge the video, or if all do, the smallest.
    """

    def badness(number: int) -> tuple[float, bool, int]:
        height, width = buckets[number]
        # Rounded: equal ratios of different sizes may differ in the last bit.
        aspect = round(abs(math.log(width / height) - math.log(size[1] / size[0])), 9)
        enlarges = cover(size, buckets[number]) > 1
        return aspect, enlarges, height * width if enlarges else -height * width

    return min(range(len(buckets)), key=badness)


def cover(size: Size, bucket: Size) -> float:
    """The factor by which a video of ``size`` is resized so that it just covers ``bucket``."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def resized(size: Size, bucket: Size) -> Size:
    """Size of a video of ``size`` after resizing, before cropping: at least ``bucket``, on one side equal to it."""
    factor = cover(size, bucket)
    return max(bucket[0], round(size[0] * factor)), max(bucket[1], round(size[1] * factor))


def draw_crop(size: Size, bucket: Size, generator: torch.Generator) -> tuple[int, int]:
    """A uniform crop position (top, left), in pixels of the resized video."""
    room = [there - wanted + 1 for there, wanted in zip(resized(size, bucket), bucket, strict=True)]
    top, left = (int(torch.randint(each, (), generator=generator)) for each in room)
    return top, left


def fit(frames: NDArray[np.uint8], bucket: Size, crop: tuple[int, int]) -> Tensor:
    """Video fp32 [F, 3, H, W] in [-1, 1] of size ``bucket`` from ``frames`` uint8 [F, h, w, 3], cropped at ``crop``."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    size = resized((video.shape[2], video.shape[3]), bucket)
    if size != tuple(video.shape[2:]):
        video = F.interpolate(video, size=size, mode="bicubic", antialias=True)
    top, left = crop
    return video[..., top : top + bucket[0], left : left + bucket[1]].to(torch.float32) / 127.5 - 1


def micro_conditions(size: Size, crop: tuple[int, int], stride: int, frames: int) -> Tensor:
    """Micro-conditions fp32 [6] of a clip: original height and width, crop top and left, frame stride, frames.

    As in SDXL (arXiv 2307.01952, section 2.2) the size is that of the video before resizing, and the crop is where the
    top left corner was cut, in pixels of the resized video. STIV adds stride and frames (arXiv 2412.07730).
    """
    return torch.tensor([*size, *crop, stride, frames], dtype=torch.float32)
