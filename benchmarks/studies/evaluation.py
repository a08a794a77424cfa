"""What is measured of a trained model: held-out loss, and what is asked of it."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from ground import Asked, Ground, Result, Shape, Video
from harness import Adapt, Frozen, Phase, as_is, conditions
from torch import Tensor

from stiv_deploy.stiv_ref.conditioning import replace_frames
from stiv_deploy.stiv_ref.flow import flow_loss, interpolate, velocity_target
from stiv_deploy.stiv_ref.generation import seeded_noise
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, sample

LOSS_TIMES = (0.02, 0.06, 0.12, 0.25, 0.4, 0.6, 0.8, 0.95)
FIRST_SEED = 500_000
LOSS_SEED = 77
"""Of the clips and the noise of held-out losses."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One evaluation: how many test clips, sampling steps, and clips generated at once."""

    clips: int = 40
    steps: int = 20
    batch: int = 40

    @property
    def loss_clips(self) -> int:
        """Test clips of a held-out loss."""
        return min(32, self.clips)


def trial_on(ground: Ground, *, smallest: bool = False, clips: int = 40) -> Trial:
    """An evaluation with the sampling steps of ``ground``, all clips at once; or of one clip and two steps."""
    return Trial(clips=1, steps=2) if smallest else Trial(clips=clips, steps=ground.steps, batch=clips)


def guided(frozen: Frozen, scale: float, steps: int) -> SamplingSettings:
    """The checkpoint's settings with JIT-CFG at ``scale``; no guidance at 1."""
    mode = GuidanceMode.NONE if scale == 1 else GuidanceMode.JIT
    return replace(frozen.sampling(steps), guidance_mode=mode, guidance_scale=scale)


def sampled(frozen: Frozen, trial: Trial) -> str:
    """How a trial samples, for a report."""
    return f"{trial.steps} steps of {frozen.sampling(trial.steps).solver}"


@torch.no_grad()
def generate(
    model: Stiv,
    frozen: Frozen,
    clips: Asked,
    settings: SamplingSettings,
    trial: Trial,
    seed: int,
    *,
    image: bool,
    adapt: Adapt = as_is,
    text: bool = True,
) -> tuple[Video, Tensor]:
    """Video [B, F, 3, H, W] and latents for the captions, and with ``image`` the first frames, of ``clips``."""
    parts = []
    shape = Shape(clips.video.shape[1], clips.video.shape[-1])
    for start in range(0, len(clips.captions), trial.batch):
        captions = clips.captions[start : start + trial.batch]
        count = len(captions)
        clean = frozen.vae.encode(clips.video[start : start + count])
        noise = seeded_noise(
            range(FIRST_SEED + 1_000 * seed + start, FIRST_SEED + 1_000 * seed + start + count), tuple(clean.shape[1:])
        )
        given = torch.zeros(clean.shape[:2], dtype=torch.bool)
        given[:, 0] = image
        states, replaced = adapt(model, frozen.text(captions if text else [""] * count), clean, given)
        null, _ = adapt(model, frozen.text([""] * count), clean, torch.zeros_like(given))
        inputs = SamplingInputs(
            noise,
            torch.where(replaced[:, :, None, None, None], clean, 0.0),
            replaced,
            states,
            null,
            conditions(count, shape),
        )
        parts.append(sample(model, inputs, settings))
    latents = torch.cat(parts)
    return frozen.vae.decode(latents).numpy(), latents


@torch.no_grad()
def held_out_loss(
    model: Stiv, frozen: Frozen, phase: Phase, *, clips: int, adapt: Adapt = as_is, image: bool = False
) -> Result:
    """Loss on test clips at :data:`LOSS_TIMES`, the same noise for every model: mean, by time and by frame."""
    found = frozen.ground.clips(clips, LOSS_SEED, phase.shape)
    latents = frozen.vae.encode(found.video)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(LOSS_SEED))
    given = torch.zeros(latents.shape[:2], dtype=torch.bool)
    given[:, 0] = image
    text, replaced = adapt(model, frozen.text(found.captions), latents, given)
    micro = conditions(clips, phase.shape)
    target, by_time, by_frame = velocity_target(latents, noise), [], []
    for time in LOSS_TIMES:
        timestep = torch.full((clips,), time)
        model_input = replace_frames(interpolate(latents, noise, timestep), latents, replaced)
        prediction = model(model_input, timestep, micro, *text)
        by_time.append(float(flow_loss(prediction, target, given).mean()))
        by_frame.append((prediction - target).square().mean(dim=(0, 2, 3, 4)))
    frames = torch.stack(by_frame).mean(0).tolist()
    return {"mean": float(np.mean(by_time)), "by_time": by_time, "by_frame": frames}


def validation(frozen: Frozen, seed: int, trial: Trial, shape: Shape) -> Result:
    """Scores of the real clips through the VAE: what a perfect model would get."""
    clips = frozen.ground.clips(trial.clips, seed, shape)
    with torch.no_grad():
        coded = frozen.vae.decode(frozen.vae.encode(clips.video)).numpy()
    return clips.scores(coded, image=True)
