"""Classifier-free guidance with two conditions, and its renormalization (arXiv 2412.07730, sections 2.3.2, 3.4.2, A).

Branches are ordered from most to least conditioned. Every rule is a weighted sum of the branches' velocities.
"""

from enum import StrEnum

from torch import Tensor

NORM_FLOOR = 1e-12
"""Smallest norm that CFG-Renorm divides by: small enough to change nothing, large enough not to overflow."""


class GuidanceMode(StrEnum):
    """Which branches are run at each step."""

    NONE = "none"
    """Conditional branch only."""
    JIT = "jit"
    """Joint image-text guidance: text + image against neither. Two passes, one scale."""
    SIT = "sit"
    """Separate image-text guidance: text + image, image only, neither. Three passes, two scales."""


class Unseen(StrEnum):
    """What a branch that does not see the image gets at the given frames."""

    NOISED = "noised"
    """The point of the flow path between the run's noise and the given latents."""
    ZERO = "zero"
    """Zero latents at every step, as STIV's multi-view model (arXiv 2412.07730, section 3.6)."""


def jit_cfg(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """JIT-CFG: ``F(x, 0, 0) + s * (F(x, text, image) - F(x, 0, 0))``."""
    return unconditional + scale * (conditional - unconditional)


def sit_cfg(
    conditional: Tensor, image_only: Tensor, unconditional: Tensor, text_scale: float, image_scale: float
) -> Tensor:
    """SIT-CFG: ``F(0, 0) + s_i * (F(0, image) - F(0, 0)) + s_t * (F(text, image) - F(0, image))``."""
    return unconditional + image_scale * (image_only - unconditional) + text_scale * (conditional - image_only)


def cfg_renorm(guided: Tensor, conditional: Tensor, frame_mask: Tensor) -> Tensor:
    """CFG-Renorm: scale ``guided`` [B, T, C, h, w] to the norm of ``conditional``, per sample.

    Norms run over the frames that are generated: at frames given clean (``frame_mask``, bool [B, T]) the velocity is
    not trained and not used.
    """
    weight = (~frame_mask).to(guided.dtype)[:, :, None, None, None]

    def norm(velocity: Tensor) -> Tensor:
        return (velocity.square() * weight).sum(dim=(1, 2, 3, 4), keepdim=True).sqrt()

    return guided * (norm(conditional) / norm(guided).clamp_min(NORM_FLOOR))
