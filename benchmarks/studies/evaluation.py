"""What is measured of a trained model: held-out loss, and clips judged frame by frame.

A clip's *motion* is how fast its digit moves, in percent of the speed of real clips: 100 is right, 0 is a still. A clip
under half the speed is *stale*. Clips larger than 32 pixels are shrunk to 32 for the scorers, which know that size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import above  # noqa: F401  # isort: split
import numpy as np
import torch
import torch.nn.functional as F
from harness import FRAMES, Adapt, Frozen, Phase, as_is
from numpy.typing import NDArray
from scorers import THRESHOLD, brightness, centre_of_mass, judge, percentages
from torch import Tensor

from stiv_deploy.stiv_ref.conditioning import replace_frames
from stiv_deploy.stiv_ref.data.moving_digits import Clips, MovingDigits, micro_conditions
from stiv_deploy.stiv_ref.digit_canvas import SIZE, speed_of
from stiv_deploy.stiv_ref.flow import flow_loss, interpolate, velocity_target
from stiv_deploy.stiv_ref.generation import seeded_noise
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, sample

STALE = 50.0  # percent of the real speed
LOSS_TIMES = (0.02, 0.06, 0.12, 0.25, 0.4, 0.6, 0.8, 0.95)
FIRST_SEED = 500_000
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One evaluation: how many test clips, Euler steps, and clips generated at once."""

    clips: int = 40
    steps: int = 20
    batch: int = 40


def clips_for(count: int, seed: int, size: int = SIZE) -> Clips:
    """Clips of the test split; other ones for every seed."""
    return MovingDigits("test", size).draw(count, FRAMES, torch.Generator().manual_seed(90_000 + seed))


def at_scorer_size(video: NDArray[np.float32]) -> NDArray[np.float32]:
    """``video`` [B, F, 3, H, W] with 32 x 32 pixels, by area."""
    if video.shape[-1] == SIZE:
        return video
    frames = torch.from_numpy(video).flatten(0, 1)
    small = F.interpolate(frames, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return small.unflatten(0, video.shape[:2]).numpy()


def speed(clip: NDArray[np.float32]) -> float:
    """Speed in pixels a frame of the brightness [F, H, W]: slope of the centre of mass; 0 if nothing is seen."""
    places = [(frame, place) for frame, image in enumerate(clip) if (place := centre_of_mass(image)) is not None]
    if len(places) < 2:
        return 0.0
    slope = np.polyfit([frame for frame, _ in places], np.array([place for _, place in places]), 1)[0]
    return float(np.hypot(*slope))


def motion(clips: NDArray[np.float32]) -> list[float]:
    """Percent of the real speed, for brightness [B, F, 32, 32]."""
    return [100 * speed(clip) / speed_of(SIZE) for clip in clips]


def psnr_by_frame(video: NDArray[np.float32], truth: NDArray[np.float32]) -> list[float]:
    """PSNR in dB (values in [-1, 1]) by frame of [B, F, 3, H, W] against ``truth`` (F or 1 frames), mean over clips."""
    error = np.square(np.clip(video, -1, 1) - truth).mean(axis=(2, 3, 4))
    return (10 * np.log10(4 / np.maximum(error, 1e-12))).mean(axis=0).round(3).tolist()


def scores(video: NDArray[np.float32], clips: Clips, *, image: bool) -> Result:
    """All measurements of ``video`` [B, F, 3, H, W] that was asked for by the captions of ``clips``.

    With ``image`` the first frames of ``clips`` were given too: PSNR by frame against the true continuation and
    against the given frame.
    """
    bright = brightness(at_scorer_size(video))
    moved = motion(bright)
    result: Result = percentages(judge(bright, clips.digits, clips.directions))
    result |= {"motion": float(np.mean(moved)), "stale": 100 * float(np.mean(np.array(moved) < STALE))}
    result["empty"] = 100 * float(np.mean((bright > THRESHOLD).sum(axis=(2, 3)).min(axis=1) == 0))
    if image:
        truth = clips.video.numpy()
        result["psnr"] = psnr_by_frame(video, truth)
        result["psnr_to_first"] = psnr_by_frame(video, truth[:, :1])
    return result


@torch.no_grad()
def generate(
    model: Stiv,
    frozen: Frozen,
    clips: Clips,
    settings: SamplingSettings,
    trial: Trial,
    seed: int,
    *,
    image: bool,
    adapt: Adapt = as_is,
    text: bool = True,
) -> tuple[NDArray[np.float32], Tensor]:
    """Video [B, F, 3, H, W] and latents for the captions, and with ``image`` the first frames, of ``clips``."""
    parts = []
    size = clips.video.shape[-1]
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
            micro_conditions(count, FRAMES, size),
        )
        parts.append(sample(model, inputs, settings))
    latents = torch.cat(parts)
    return frozen.vae.decode(latents).numpy(), latents


@torch.no_grad()
def held_out_loss(
    model: Stiv, frozen: Frozen, phase: Phase, *, adapt: Adapt = as_is, image: bool = False, clips: int = 32
) -> Result:
    """Loss on test clips at :data:`LOSS_TIMES`, the same noise for every model: mean, by time and by frame."""
    found = clips_for(clips, 77, phase.size)
    latents = frozen.vae.encode(found.video)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(77))
    given = torch.zeros(latents.shape[:2], dtype=torch.bool)
    given[:, 0] = image
    text, replaced = adapt(model, frozen.text(found.captions), latents, given)
    micro = micro_conditions(clips, FRAMES, phase.size)
    target, by_time, by_frame = velocity_target(latents, noise), [], []
    for time in LOSS_TIMES:
        timestep = torch.full((clips,), time)
        model_input = replace_frames(interpolate(latents, noise, timestep), latents, replaced)
        prediction = model(model_input, timestep, micro, *text)
        by_time.append(float(flow_loss(prediction, target, given).mean()))
        by_frame.append((prediction - target).square().mean(dim=(0, 2, 3, 4)))
    frames = torch.stack(by_frame).mean(0).tolist()
    return {"mean": float(np.mean(by_time)), "by_time": by_time, "by_frame": frames}


def validation(frozen: Frozen, seed: int, trial: Trial, size: int = SIZE) -> Result:
    """Scores of the real clips through the VAE: what a perfect model would get."""
    clips = clips_for(trial.clips, seed, size)
    with torch.no_grad():
        coded = frozen.vae.decode(frozen.vae.encode(clips.video)).numpy()
    return scores(coded, clips, image=True)


def mean_of(rows: Sequence[Result], key: str) -> list[float]:
    """The value ``key`` of every row."""
    return [row[key] for row in rows]
