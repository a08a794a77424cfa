"""A small convolutional per-frame VAE, of the interface that :mod:`~stiv_deploy.stiv_ref.pretrained.vae` has too.

Interface: ``encode`` video [B, F, 3, H, W] in [-1, 1] -> latents [B, T, C, h, w] of zero mean and unit variance,
``decode`` back; ``latent_frames`` and ``video_frames`` turn F into T and T into F; ``config`` has ``latent_channels``,
``spatial_factor``, ``temporal_factor`` and ``causal``. A causal VAE codes the first frame alone, as latent frame 0, so
that a given first frame is a given latent frame (image conditioning by frame replacement). Source of the objective:
Kingma & Welling, arXiv 1312.6114; the small KL weight follows latent diffusion (arXiv 2112.10752).
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stiv_deploy.stiv_ref.bounds import Size
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.errors import ConfigError


class VaeConfig(FrozenConfig):
    """Architecture: each of the ``channels`` after the first halves the resolution once, as does the first."""

    latent_channels: Size = 4
    channels: tuple[Size, ...] = Field(default=(32, 64), min_length=1, max_length=10)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, along height and width."""
        return 2 ** len(self.channels)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame: 1, every frame is coded on its own."""
        return 1

    @property
    def causal(self) -> bool:
        """Whether latents depend on earlier frames (and on no later one): no."""
        return False

    def latent_frames(self, frames: int) -> int:
        """Latent frames of ``frames`` frames of video: as many; :class:`ConfigError` if there is none."""
        if frames < 1:
            raise ConfigError(f"{frames} frames, but this VAE codes 1 or more")
        return frames

    def video_frames(self, latent_frames: int) -> int:
        """Frames of video that ``latent_frames`` latent frames make: as many; :class:`ConfigError` if there is none."""
        return self.latent_frames(latent_frames)


class Vae(nn.Module):
    """Convolutional VAE; ``shift`` and ``scale`` [C] standardize its latents and are measured after training."""

    shift: Tensor
    scale: Tensor

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        down: list[nn.Module] = []
        previous = 3
        for channels in config.channels:
            down += [nn.Conv2d(previous, channels, 3, stride=2, padding=1), nn.SiLU()]
            previous = channels
        down += [nn.Conv2d(previous, previous, 3, padding=1), nn.SiLU()]
        self.encoder = nn.Sequential(*down, nn.Conv2d(previous, 2 * config.latent_channels, 1))
        up: list[nn.Module] = [nn.Conv2d(config.latent_channels, previous, 3, padding=1), nn.SiLU()]
        for channels in reversed(config.channels):
            up += [nn.Conv2d(previous, channels, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2.0)]
            previous = channels
        up += [nn.Conv2d(previous, previous, 3, padding=1), nn.SiLU()]
        self.decoder = nn.Sequential(*up, nn.Conv2d(previous, 3, 3, padding=1))
        self.register_buffer("shift", torch.zeros(config.latent_channels))
        self.register_buffer("scale", torch.ones(config.latent_channels))

    def latent_frames(self, frames: int) -> int:
        """Latent frames of ``frames`` frames of video: as many; :class:`ConfigError` if there is none."""
        return self.config.latent_frames(frames)

    def video_frames(self, latent_frames: int) -> int:
        """Frames of video that ``latent_frames`` latent frames make: as many; :class:`ConfigError` if there is none."""
        return self.config.video_frames(latent_frames)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [N, C, h, w] of images [N, 3, H, W], before standardization."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, video: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] (posterior mean, standardized) of video [B, F, 3, H, W]."""
        mean, _ = self.posterior(video.flatten(0, 1))
        latents = (mean - self.shift[:, None, None]) / self.scale[:, None, None]
        return latents.unflatten(0, video.shape[:2])

    def decode(self, latents: Tensor) -> Tensor:
        """Video [B, F, 3, H, W] clamped to [-1, 1] from latents [B, T, C, h, w]."""
        x = latents.flatten(0, 1) * self.scale[:, None, None] + self.shift[:, None, None]
        return self.decoder(x).clamp(-1, 1).unflatten(0, latents.shape[:2])

    @torch.no_grad()
    def standardize(self, images: Tensor) -> None:
        """Set ``shift`` and ``scale`` so that the latents of ``images`` [N, 3, H, W] have mean 0 and variance 1."""
        mean, _ = self.posterior(images)
        self.shift.copy_(mean.mean(dim=(0, 2, 3)))
        self.scale.copy_(mean.std(dim=(0, 2, 3)))


def vae_loss(vae: Vae, images: Tensor, kl_weight: float, noise: Tensor) -> Tensor:
    """Reconstruction error plus ``kl_weight`` times the KL divergence to N(0, 1), both per pixel.

    ``noise`` [N, C, h, w], standard normal, draws the latents of ``images`` [N, 3, H, W].
    """
    mean, log_variance = vae.posterior(images)
    latents = mean + noise * (0.5 * log_variance).exp()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / images.numel()
    return F.mse_loss(vae.decoder(latents), images) + kl_weight * kl
