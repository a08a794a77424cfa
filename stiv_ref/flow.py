"""Flow matching: the path from noise to data, its velocity, and how timesteps are drawn and laid out.

``x_t = t * x1 + (1 - t) * noise`` and ``v = x1 - noise`` (arXiv 2412.07730, section 2.1; Lipman et al., arXiv
2210.02747): t = 0 is noise, t = 1 is data.
"""

import torch
from torch import Tensor

LATE = 0.12
"""Time from which on sampling can take longer steps."""


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View ``values`` [B] so that it broadcasts over ``like`` [B, ...]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def interpolate(data: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """The point x_t of the path, for data and noise [B, ...] and timestep [B]."""
    t = _per_sample(timestep, data)
    return t * data + (1 - t) * noise


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """What the model learns: dx_t/dt = data - noise."""
    return data - noise


def shift_time(timestep: Tensor, shift: float) -> Tensor:
    """Move timesteps toward noise (shift > 1): t / (t + shift * (1 - t)).

    With sigma = 1 - t this is the resolution shift of Stable Diffusion 3 (arXiv 2403.03206, eq. 23).
    """
    return timestep / (timestep + shift * (1 - timestep))


def sample_timesteps(count: int, *, logit_normal: bool, shift: float, generator: torch.Generator) -> Tensor:
    """Draw training timesteps, fp32 [count], uniform or logit-normal(0, 1), then shifted."""
    if logit_normal:
        timestep = torch.randn(count, generator=generator).sigmoid()
    else:
        timestep = torch.rand(count, generator=generator)
    return shift_time(timestep, shift)


def schedule(steps: int, shift: float = 1.0, late_stretch: float = 1.0) -> Tensor:
    """Sampling times 0 = t_0 < ... < t_steps = 1, fp64 [steps + 1]; ``ValueError`` if there is no step.

    Before they are shifted, steps behind the time that becomes :data:`LATE` are ``late_stretch`` times as long as those
    before it: what a clip shows is decided early (docs/results.md, "Sampling times").
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    way = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if late_stretch != 1:
        late = shift_time(torch.tensor(LATE, dtype=torch.float64), 1 / shift)
        way = way * (late + (1 - late) / late_stretch)
        way = torch.where(way <= late, way, late + (way - late) * late_stretch).clamp(max=1)
        way[-1] = 1
    return shift_time(way, shift)


def flow_loss(prediction: Tensor, target: Tensor, clean_frames: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
    """Mean squared error per sample, fp32 [B], over the frames that are not given.

    ``prediction`` and ``target`` [B, T, C, h, w]; ``clean_frames`` bool [B, T] marks the frames whose loss is masked
    out because the model was handed them clean (frame replacement). ``pixel_weight`` [B, h, w] weighs the places of
    all frames; without it they count alike.
    """
    error = (prediction.float() - target.float()).square()
    if pixel_weight is None:
        per_frame = error.mean(dim=(2, 3, 4))  # (B, T)
    else:
        weighted = (error.mean(dim=2) * pixel_weight.unsqueeze(1)).sum(dim=(2, 3))
        per_frame = weighted / pixel_weight.sum(dim=(1, 2)).unsqueeze(1)  # (B, T)
    weight = (~clean_frames).float()
    return (per_frame * weight).sum(1) / weight.sum(1).clamp_min(1)
