"""What one training step asks of the model: the random choices of a batch, and the loss under them.

Every sample draws from a generator of its own, seeded by (seed, stage, step, number in the batch): the same sample is
drawn whatever the number of processes, the size of the micro-batches, or the step at which a run was resumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stiv_deploy.stiv_ref.bounds import TimeShift
from stiv_deploy.stiv_ref.conditioning import draw_dropout, replace_frames
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.flow import flow_loss, interpolate, sample_timesteps, velocity_target
from stiv_deploy.stiv_ref.givings import Mix
from stiv_deploy.stiv_ref.guidance import Unseen
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.tasks import MIX, TASKS, Task, TaskName
from stiv_deploy.stiv_ref.text import TextStates


class Objective(FrozenConfig):
    """How a stage draws its training samples.

    ``task`` is the name of a mix of given frames; ``givings`` is a mix of the stage's own, and its task is ``mix``.
    ``text_dropout`` is the share of clips without their caption, ``image_dropout`` of those without their given frames:
    independent of each other, unless ``joint_dropout`` of the latter lose their text in any case. ``mask_ratio`` of the
    spatial tokens skip the main blocks (MaskDiT, arXiv 2306.09305); their loss counts ``masked_loss_weight`` times.
    """

    task: TaskName = MIX
    givings: Mix | None = None
    text_dropout: float = Field(default=0.1, ge=0, le=1)
    image_dropout: float = Field(default=0.08, ge=0, le=1)
    joint_dropout: float = Field(default=0.0, ge=0, le=1)
    logit_normal: bool = True
    time_shift: TimeShift = 1.0
    mask_ratio: float = Field(default=0.0, ge=0, lt=1)
    masked_loss_weight: float = Field(default=0.1, ge=0, le=1)

    @property
    def kind(self) -> Task:
        """The task by its name, or the stage's own mix."""
        return Task(mix=self.givings or {}) if self.task == MIX else TASKS[self.task]

    @model_validator(mode="after")
    def _check_mix(self) -> Self:
        if self.task == MIX and self.givings is None:
            raise ValueError(f"give a task ({', '.join(TASKS)}), or givings with the share of each")
        if self.task != MIX and self.givings is not None:
            raise ValueError(f"task {self.task} has givings of its own; take out task, or givings")
        return self


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random choices of one batch.

    ``timestep`` fp32 [B]; ``noise`` fp32 [B, T, C, h, w]; ``given`` bool [B, T], frames that the model gets clean;
    ``zeroed`` bool [B, T], those that it would, had the sample not lost its image, and gets as zeros, of tasks that say
    so; ``drop_text`` bool [B]; ``keep`` int64 [B, S'], sorted tokens that pass the main blocks, or ``None`` for all.
    """

    timestep: Tensor
    noise: Tensor
    given: Tensor
    zeroed: Tensor
    drop_text: Tensor
    keep: Tensor | None

    def to(self, device: torch.device) -> "Draws":
        """The same choices on ``device``."""
        keep = None if self.keep is None else self.keep.to(device)
        return Draws(
            timestep=self.timestep.to(device),
            noise=self.noise.to(device),
            given=self.given.to(device),
            zeroed=self.zeroed.to(device),
            drop_text=self.drop_text.to(device),
            keep=keep,
        )


def sample_generator(seed: int, stage: int, step: int, sample: int) -> torch.Generator:
    """The random generator of one training sample: number ``sample`` of the global batch of ``step``."""
    mixed = np.random.SeedSequence((seed, stage, step, sample)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


def kept_tokens(tokens: int, mask_ratio: float) -> int:
    """How many of ``tokens`` spatial tokens pass the main blocks; at least one."""
    return max(1, round(tokens * (1 - mask_ratio)))


def draw(
    objective: Objective,
    latents_shape: Sequence[int],
    tokens: int,
    generators: Sequence[torch.Generator],
    tasks: Sequence[TaskName | None] | None = None,
) -> Draws:
    """Make the choices for latents ``latents_shape`` (T, C, h, w) with ``tokens`` a frame, one sample per generator.

    ``tasks`` are those of the samples, if not all have the objective's.
    """
    image_dropout = objective.image_dropout if objective.kind.conditioned else 1.0
    joint = objective.joint_dropout if objective.kind.conditioned else objective.text_dropout
    kinds = [TASKS[task] if task else objective.kind for task in tasks or [None] * len(generators)]
    timesteps, noises, texts, givens, zeroed, keeps = [], [], [], [], [], []
    for generator, kind in zip(generators, kinds, strict=True):
        drop_text, drop_image = draw_dropout(
            1, text=objective.text_dropout, image=image_dropout, joint=joint, generator=generator
        )
        texts.append(drop_text)
        timesteps.append(
            sample_timesteps(1, logit_normal=objective.logit_normal, shift=objective.time_shift, generator=generator)
        )
        noises.append(torch.randn(tuple(latents_shape), generator=generator))
        if objective.mask_ratio:
            order = torch.randperm(tokens, generator=generator)
            keeps.append(order[: kept_tokens(tokens, objective.mask_ratio)].sort().values)
        chosen = kind.draw(latents_shape[0], generator)
        givens.append(chosen & ~drop_image)
        zeroed.append(chosen & drop_image & (kind.unseen is Unseen.ZERO))
    return Draws(
        timestep=torch.cat(timesteps),
        noise=torch.stack(noises),
        given=torch.stack(givens),
        zeroed=torch.stack(zeroed),
        drop_text=torch.cat(texts),
        keep=torch.stack(keeps) if keeps else None,
    )


def drop_text(text: TextStates, null: TextStates, dropped: Tensor) -> TextStates:
    """``text`` with the samples of ``dropped`` (bool [B]) taken from ``null``, whose batch is B or 1."""
    return TextStates(
        torch.where(dropped[:, None, None], null.states, text.states),
        torch.where(dropped[:, None], null.mask, text.mask),
        torch.where(dropped[:, None], null.pooled, text.pooled),
    )


def token_weights(keep: Tensor, tokens: int, masked: float) -> Tensor:
    """Loss weights fp32 [B, S]: 1 for the tokens of ``keep`` [B, S'], ``masked`` for the others."""
    weights = torch.full((keep.shape[0], tokens), masked, device=keep.device)
    return weights.scatter(1, keep, 1.0)


def training_loss(
    model: Stiv, latents: Tensor, text: TextStates, micro: Tensor, draws: Draws, masked_loss_weight: float = 0.1
) -> Tensor:
    """Flow-matching loss per sample, fp32 [B], with frame replacement and, if drawn, masked tokens.

    It is that of the frames that are noised to the model. ``latents`` [B, T, C, h, w] are the data; ``text`` lost what
    ``draws.drop_text`` says already (with :func:`drop_text`, or by encoding empty captions).
    """
    noised = interpolate(latents, draws.noise, draws.timestep)
    model_input = replace_frames(replace_frames(noised, latents, draws.given), torch.zeros_like(noised), draws.zeroed)
    prediction = model(model_input, draws.timestep, micro, *text, keep=draws.keep)
    weight = None
    if draws.keep is not None:
        _, rows, columns = model.token_grid(latents.shape)
        size = model.config.patch[1]
        weight = token_weights(draws.keep, rows * columns, masked_loss_weight).unflatten(1, (rows, columns))
        weight = weight.repeat_interleave(size, 1).repeat_interleave(size, 2)  # (B, h, w)
    return flow_loss(prediction, velocity_target(latents, draws.noise), draws.given | draws.zeroed, weight)
