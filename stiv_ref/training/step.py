"""One training step: micro-batches through the model, gradients over all processes, a checked step, the averages."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stiv_deploy.stiv_ref.data.source import Batch
from stiv_deploy.stiv_ref.distillation import (
    Conditions,
    Point,
    draw_intervals,
    draw_scales,
    flow_map_loss,
    flow_map_targets,
    guidance_loss,
    point_of,
    sees_zeros,
)
from stiv_deploy.stiv_ref.errors import ConfigError, DivergedError
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.objective import draw, sample_generator, training_loss
from stiv_deploy.stiv_ref.training.averages import update_averages
from stiv_deploy.stiv_ref.training.optimizer import learning_rate, set_rate
from stiv_deploy.stiv_ref.training.parallel import local, sync_gradients
from stiv_deploy.stiv_ref.training.pictures import averaged
from stiv_deploy.stiv_ref.training.run import Run

NAMED = 4
"""So many samples of a bad batch are named."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step tells: ``values`` for the log, ``timesteps`` and ``losses`` fp32 [batch] of all its samples.

    ``tokens`` of video went through the model, in all processes together.
    """

    values: dict[str, float]
    timesteps: Tensor
    losses: Tensor
    tokens: int


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 autocast, or nothing for float32; the weights are fp32 in either case."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@torch.no_grad()
def latents_of(run: Run, batch: Batch) -> Tensor:
    """Latents fp32 [B, T, C, h, w] of ``batch`` on the run's device; the VAE is frozen and works in fp32."""
    device = run.team.device
    if batch.latents is not None:
        return batch.latents.to(device).float()
    if batch.video is None:
        raise ConfigError(f"the samples {', '.join(batch.names[:NAMED])} have neither video nor latents")
    return run.vae.encode(batch.video.to(device))


def token_count(model: Stiv, latents: Tensor) -> tuple[int, int]:
    """Tokens of a frame and of a whole batch of ``latents``; :class:`ConfigError` if these do not fit the model."""
    try:
        frames, rows, columns = model.token_grid(tuple(latents.shape))
    except ValueError as error:
        raise ConfigError(f"the data does not fit the model: {error}; mend frames, resolution or [model]") from None
    if not model.config.temporal and frames > 1:
        raise ConfigError(f"the data has {frames} latent frames, a t2i stage takes one")
    return rows * columns, latents.shape[0] * frames * rows * columns


def sample_losses(run: Run, batch: Batch, part: range) -> tuple[Tensor, Tensor, int]:
    """Loss and timestep, fp32 [B] each, of a micro-batch whose samples are ``part`` of the batch; and its tokens."""
    assert run.model is not None
    stage, device = run.current, run.team.device
    latents = latents_of(run, batch)
    frame_tokens, tokens = token_count(run.model, latents)
    generators = [sample_generator(run.recipe.seed, run.stage, run.step, index) for index in part]
    draws = draw(stage, latents.shape[1:], frame_tokens, generators, batch.tasks)
    timesteps = draws.timestep
    with autocast(device, run.recipe.efficiency.precision):
        text = run.text.states(batch, draws.drop_text, device)
        micro, draws = batch.micro.to(device), draws.to(device)
        if run.teacher is None:
            losses = training_loss(run.model, latents, text, micro, draws, stage.masked_loss_weight)
        else:
            conditions = Conditions(text, run.text.null(len(part), device), micro, scales_of(run, generators))
            zeros = sees_zeros(stage, len(latents), batch.tasks).to(device)
            losses = distillation_losses(run, point_of(latents, draws, zeros), conditions, generators, part)
    return losses, timesteps.to(device), tokens


def scales_of(run: Run, generators: Sequence[torch.Generator]) -> Tensor:
    """Guidance scales fp32 [B] of a stage that distills, drawn after everything else of its samples."""
    assert run.current.guidance is not None
    return draw_scales(run.current.guidance, generators).to(run.team.device)


def distillation_losses(
    run: Run, point: Point, conditions: Conditions, generators: Sequence[torch.Generator], part: range
) -> Tensor:
    """Losses fp32 [B] of a stage that distills, of the samples ``part`` of the batch."""
    assert run.model is not None
    assert run.teacher is not None
    if run.current.distill == "guidance":
        return guidance_loss(run.model, run.teacher, point, conditions)
    intervals = draw_intervals(point.timestep.cpu(), generators, part).to(run.team.device)
    weights = [local(run.parameters[name].detach()) for name in run.averages]
    with averaged(weights, [local(average) for average in run.averages.values()]):
        wanted = flow_map_targets(run.model, run.teacher, point, conditions, intervals)
    return flow_map_loss(run.model, point, conditions, intervals.end, wanted)


def diverged(name: str, value: float, run: Run, names: Sequence[str]) -> DivergedError:
    """What to raise, before it can reach a weight, for a ``value`` that is not finite; names the samples."""
    stage = run.current
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    return DivergedError(
        f"{name} is {value} at step {run.step} of stage {run.stage} ({stage.name}) for {shown}; the last saved state "
        "is kept. Lower learning_rate or gradient_clip in the recipe and train into another --out"
    )


def accumulate(run: Run, batches: Sequence[Batch], parts: Sequence[range]) -> tuple[Tensor, Tensor, int]:
    """Add up the gradients of the mean loss over the whole batch; losses and timesteps [own samples], tokens."""
    losses, timesteps, tokens = [], [], 0
    own = sum(len(part) for part in parts)
    modules = list(run.modules.values())
    for index, (batch, part) in enumerate(zip(batches, parts, strict=True)):
        loss, timestep, count = sample_losses(run, batch, part)
        sync_gradients(modules, index == len(parts) - 1)
        (loss.sum() / own).backward()  # FSDP takes the mean over processes, and every process has as many samples
        losses.append(loss.detach().float())
        timesteps.append(timestep)
        tokens += count
    return torch.cat(losses), torch.cat(timesteps), tokens


def clip_gradients(run: Run) -> float:
    """Scale the gradients down to a norm of at most ``gradient_clip``; returns the norm before, that of all shards."""
    norm = nn.utils.clip_grad_norm_(run.parameters.values(), run.recipe.gradient_clip)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def training_step(run: Run, batches: Sequence[Batch], parts: Sequence[range]) -> StepResult:
    """Train on ``batches``, this process's micro-batches ``parts`` of the step; all processes together.

    Raises :class:`DivergedError`, in all processes, before a loss or gradient that is not finite changes a weight.
    """
    assert run.optimizer is not None
    team, stage = run.team, run.current
    run.optimizer.zero_grad()
    own_losses, own_timesteps, tokens = accumulate(run, batches, parts)
    losses, timesteps = team.gather(torch.stack((own_losses, own_timesteps))).cpu().unbind()
    loss = losses.mean().item()
    if not losses.isfinite().all():
        names = team.gather_names([name for batch in batches for name in batch.names])
        bad = [name for name, each in zip(names, losses, strict=True) if not each.isfinite()]
        raise diverged("loss", loss, run, bad)
    norm = clip_gradients(run)
    if not math.isfinite(norm):
        names = team.gather_names([name for batch in batches for name in batch.names])
        raise diverged("gradient norm", norm, run, names)
    rate = learning_rate(stage, run.step)
    set_rate(run.optimizer, rate)
    run.optimizer.step()
    update_averages(run.averages, run.parameters, run.recipe.ema, run.step)
    run.step += 1
    values = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
    return StepResult(values=values, timesteps=timesteps, losses=losses, tokens=tokens * team.world)
