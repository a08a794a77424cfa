"""What the engine needs of one clip, all of it on the host."""

from dataclasses import dataclass

import numpy as np

from stiv_deploy.runtime.sampling.guidance import Branch, Unseen
from stiv_deploy.runtime.sampling.settings import SamplingSettings
from stiv_deploy.runtime.sampling.text_stage import Tokens


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One clip to make, of T latent frames.

    ``noise`` and ``clean`` fp32 [T, C, h, w]; ``frame_mask`` bool [T] marks the frames of ``clean`` that are given;
    ``micro`` fp32 [6]; ``negative`` is the text of the guidance branches that do not get ``text``.
    """

    noise: np.ndarray
    clean: np.ndarray
    frame_mask: np.ndarray
    micro: np.ndarray
    text: Tokens
    negative: Tokens
    settings: SamplingSettings

    def start(self, mask: np.ndarray) -> np.ndarray:
        """Where the flow starts: noise, with the frames of ``mask``, bool [T], clean."""
        return np.where(mask[:, None, None, None], self.clean, self.noise)

    def between(self, timestep: float) -> np.ndarray:
        """The point of the flow path from noise to the clean latents at ``timestep``, as the ``step`` graph has it."""
        time = np.float32(timestep)
        return time * self.clean + (1 - time) * self.noise

    def zeroed(self, branch: Branch) -> np.ndarray:
        """Frames bool [T] that are zero in the model input of ``branch``, whatever the time is."""
        zero = self.settings.unseen is Unseen.ZERO and not branch.image
        return self.frame_mask if zero else np.zeros_like(self.frame_mask)
