"""Frame replacement: how STIV is given images (arXiv 2412.07730, section 2.3.1).

Frames of the model's input are the clean latents where a boolean frame mask [B, T] says so; which, is drawn by the
task (:mod:`~stiv_deploy.stiv_ref.tasks`), or is the request's.
"""

import torch
from torch import Tensor

from stiv_deploy.stiv_ref.flow import interpolate


def replace_frames(latents: Tensor, clean: Tensor, frame_mask: Tensor) -> Tensor:
    """Return ``latents`` [B, T, C, h, w] with the frames of ``frame_mask`` (bool [B, T]) taken from ``clean``."""
    return torch.where(frame_mask[:, :, None, None, None], clean, latents)


def noise_frames(latents: Tensor, clean: Tensor, noise: Tensor, timestep: Tensor, frame_mask: Tensor) -> Tensor:
    """Return ``latents`` with the given frames *noised* to ``timestep`` [B]: the unconditional branch of JIT-CFG.

    The latents of a sampling loop hold given frames clean; a branch that must not see the image gets the point of
    the flow path that it would see in training, ``t * clean + (1 - t) * noise``.
    """
    return replace_frames(latents, interpolate(clean, noise, timestep), frame_mask)


def draw_dropout(
    batch: int, *, text: float, image: float, joint: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw which samples lose their text and their image, two bool [B].

    ``text`` and ``image`` are the total rates. ``joint`` of the dropped *images* lose the text in any case (for more of
    the unconditional branch of JIT-CFG), so ``joint * image`` must not exceed ``text``; the texts that are left to
    drop do not look at the image. With 0 both are independent, as in the paper.
    """
    both = joint * image
    if not (0 <= text <= 1 and 0 <= image <= 1 and both <= text):
        wanted = "dropout rates must lie in [0, 1] with joint * image <= text"
        raise ValueError(f"{wanted}; got {text=}, {image=}, {joint=}")
    draw = torch.rand(batch, generator=generator)
    drop_image = draw < image
    drop_both = draw < both
    text_alone = (text - both) / (1 - both) if both < 1 else 0.0
    drop_text = drop_both | (torch.rand(batch, generator=generator) < text_alone)
    return drop_text, drop_image
