"""Distillation: what a student learns from another model instead of from data alone.

``guidance`` (Meng et al., arXiv 2210.03142): one row of the student gives the velocity that the teacher gives with
JIT-CFG and CFG-Renorm in two, for every guidance scale of a range, which is a condition of the student. The teacher's
branches see what they see in sampling: given frames are clean in the conditional one, and in the unconditional one they
are noised, with the noise of the clip, or zero, as the task has it. The student sees the conditional one's input, so
that it learns the mean over that noise where frames are given.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stiv_deploy.stiv_ref.conditioning import noise_frames, replace_frames
from stiv_deploy.stiv_ref.flow import flow_loss, interpolate
from stiv_deploy.stiv_ref.guidance import Unseen, cfg_renorm, jit_cfg
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.objective import Draws, Objective
from stiv_deploy.stiv_ref.tasks import TASKS, TaskName
from stiv_deploy.stiv_ref.text import TextStates


class Point(NamedTuple):
    """A batch on the way from noise to data.

    ``latents`` [B, T, C, h, w] have their ``given`` frames, bool [B, T], clean, ``hidden`` as the unconditional branch
    gets them; ``timestep`` fp32 [B].
    """

    latents: Tensor
    hidden: Tensor
    given: Tensor
    timestep: Tensor


class Conditions(NamedTuple):
    """What all calls of a batch have: ``text`` and the empty prompt ``null``, ``micro`` [B, 6], ``scale`` fp32 [B]."""

    text: TextStates
    null: TextStates
    micro: Tensor
    scale: Tensor


def draw_scales(guidance: tuple[float, float], generators: Sequence[torch.Generator]) -> Tensor:
    """Guidance scales fp32 [B], uniform in the range, one sample per generator."""
    least, greatest = guidance
    return torch.cat([least + (greatest - least) * torch.rand(1, generator=each) for each in generators])


def sees_zeros(objective: Objective, count: int, tasks: Sequence[TaskName | None] | None) -> Tensor:
    """Whether the unconditional branch gets given frames as zeros, bool [B], by the tasks of ``count`` samples."""
    kinds = [TASKS[task] if task else objective.kind for task in tasks or [None] * count]
    return torch.tensor([kind.unseen is Unseen.ZERO for kind in kinds])


def point_of(latents: Tensor, draws: Draws, zeros: Tensor) -> Point:
    """The point that ``draws`` say of the data ``latents``; ``zeros`` bool [B] is of :func:`sees_zeros`.

    Samples of tasks that would have zeros in the place of a lost image keep it: nobody samples so.
    """
    given = draws.given | draws.zeroed
    noised = interpolate(latents, draws.noise, draws.timestep)
    seen = replace_frames(noised, latents, given)
    hidden = noise_frames(seen, latents, draws.noise, draws.timestep, given)
    hidden = replace_frames(hidden, torch.zeros_like(hidden), given & zeros[:, None])
    return Point(seen, hidden, given, draws.timestep)


@torch.no_grad()
def guided_target(teacher: Stiv, point: Point, conditions: Conditions) -> Tensor:
    """The guided, renormalized velocity [B, T, C, h, w] of ``teacher``, in one call of two rows a sample."""
    text, null, micro, scale = conditions
    both = TextStates(*(torch.cat(pair) for pair in zip(text, null, strict=True)))
    latents = torch.cat((point.latents, point.hidden))
    conditional, unconditional = teacher(latents, point.timestep.repeat(2), micro.repeat(2, 1), *both).chunk(2)
    guided = jit_cfg(conditional, unconditional, scale[:, None, None, None, None])
    return cfg_renorm(guided, conditional, point.given)


def guidance_loss(student: Stiv, teacher: Stiv, point: Point, conditions: Conditions) -> Tensor:
    """Mean squared error to the teacher's guided velocity, fp32 [B], over the frames that are not given."""
    text, _, micro, scale = conditions
    prediction = student(point.latents, point.timestep, micro, *text, guidance=scale)
    return flow_loss(prediction, guided_target(teacher, point, conditions), point.given)
