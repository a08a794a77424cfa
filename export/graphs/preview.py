"""A linear map from latents to colours, for previews while a clip is made, fitted to the VAE's own decode.

The pictures are drawn: rectangles of all colours on plain grounds, black ones among them, under soft light. After
"Latent2RGB" of ComfyUI, whose factors are such a fit for the VAEs that it knows.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stiv_deploy.runtime.bundle.manifest import Preview
from stiv_deploy.stiv_ref.checkpoint import AnyVae

PICTURES, SIDE = 48, 8
"""Pictures, and latents of a side: with 3072 latents more than any VAE has channels."""
SHAPES = 6


def drawn_pictures(count: int, side: int, seed: int = 0) -> Tensor:
    """``count`` pictures fp32 [count, 3, side, side] in [-1, 1]."""
    random = torch.Generator().manual_seed(seed)
    pictures = torch.rand(count, 3, 1, 1, generator=random).mul(2).sub(1).repeat(1, 1, side, side)
    pictures[::4] = -1
    pictures[1::4] = pictures[1::4].mean(dim=1, keepdim=True)
    for picture in pictures:
        for _ in range(SHAPES):
            top, left, height, width = torch.randint(0, side, (4,), generator=random).tolist()
            colour = torch.rand(3, 1, 1, generator=random) * 2 - 1
            picture[:, top : top + height // 2 + 1, left : left + width // 2 + 1] = colour
    light = F.interpolate(torch.randn(count, 1, 3, 3, generator=random), (side, side), mode="bicubic")
    return (pictures + 0.15 * light).clamp(-1, 1)


@torch.no_grad()
def fit_preview(vae: AnyVae) -> Preview:
    """The map of ``vae``, in float64."""
    factor = vae.config.spatial_factor
    pictures = drawn_pictures(PICTURES, SIDE * factor)
    latents = vae.encode(pictures[:, None])
    decoded = vae.decode(latents)[:, 0].float()
    colours = F.avg_pool2d(decoded, factor).movedim(1, -1).reshape(-1, 3).double().numpy()
    values = latents[:, 0].float().movedim(1, -1).reshape(len(colours), -1).double().numpy()
    known = np.concatenate([values, np.ones((len(values), 1))], axis=1)
    solved = np.linalg.lstsq(known, colours, rcond=None)[0]
    error = float(np.sqrt(np.mean((known @ solved - colours) ** 2)))
    return Preview(weights=solved[:-1].tolist(), bias=solved[-1].tolist(), error=error)
