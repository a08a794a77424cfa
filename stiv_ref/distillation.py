"""Distillation: what a student learns from another model instead of from data alone.

``guidance`` (Meng et al., arXiv 2210.03142): one row of the student gives the velocity that the teacher gives with
JIT-CFG and CFG-Renorm in two, for every guidance scale of a range, which is a condition of the student. The teacher's
branches see what they see in sampling: given frames are clean in the conditional one, and in the unconditional one they
are noised, with the noise of the clip, or zero, as the task has it. The student sees the conditional one's input, so
that it learns the mean over that noise where frames are given.

``flow-map``: the student then learns the mean velocity u(x, t, r) = (X(r) - x) / (r - t) of the path X of its teacher's
velocity v that goes through x at time t, so that x + (r - t) u is the path's point at r, however far that is. Its
target (MeanFlow, arXiv 2505.13447; without derivatives of the model, as AnyFlow, arXiv 2605.13724): by definition
(r - t) u(X(t), t, r) = X(r) - X(t). Along the path, with r fixed, d/dt of the left is -u + (r - t) du/dt, and of the
right -v, so that

    u = v + (r - t) du/dt,    du/dt = [u(X(t + d), t + d, r) - u(X(t - d), t - d, r)] / 2d + O(d^2),

a central difference of two calls of the student itself, averaged weights. The path is straight enough over d: x + d v
is X(t + d) but for a term of d^2 that both points share, which changes their difference by O(d^3). Where t - d lies
before 0, or t + d behind r, the point is 0 or r, and the difference is of first order. Where r = t, u is v itself.
"""

from collections.abc import Callable, Sequence
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

Mean = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mean velocity [B, ...] at latents [B, ...] and times [B] up to later times [B]."""
SPAN = 0.01
"""The d of central differences: in float32 rounding is 1e-5 of the difference's quotient."""
LEAST = 1e-2
"""Mean squared error from which on a sample of a flow map counts less than its share."""
AT_ONCE, TO_THE_END = 0.5, 0.25
"""Shares of the samples whose target time is their own time, and the end; the others' is uniform between."""


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


def draw_targets(timestep: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Target times fp32 [B], from each of ``timestep`` [B] to 1, one sample per generator."""
    targets = []
    for time, generator in zip(timestep, generators, strict=True):
        kind, share = torch.rand(2, generator=generator)
        farther = (
            time if kind < AT_ONCE else torch.ones(()) if kind < AT_ONCE + TO_THE_END else time + (1 - time) * share
        )
        targets.append(farther)
    return torch.stack(targets)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))


@torch.no_grad()
def flow_map_target(
    mean: Mean, velocity: Tensor, latents: Tensor, times: tuple[Tensor, Tensor], span: float = SPAN
) -> Tensor:
    """What ``mean`` should give at ``latents`` [B, ...] between ``times`` [B] twice; see the module's text.

    ``velocity`` [B, ...] is that of the path at the first of the times, 0 where nothing moves.
    """
    time, target = times
    before, after = (time - span).clamp_min(0), torch.minimum(time + span, target)
    both = torch.cat([latents + _wide(when - time, latents) * velocity for when in (before, after)])
    first, last = mean(both, torch.cat((before, after)), target.repeat(2)).chunk(2)
    slope = (last - first) / _wide((after - before).clamp_min(1e-6), latents)
    return velocity + _wide(target - time, latents) * slope


def flow_map_targets(averaged: Stiv, teacher: Stiv, point: Point, conditions: Conditions, target: Tensor) -> Tensor:
    """Targets [B, T, C, h, w] of a batch, by calls of the student's ``averaged`` weights; given frames do not move."""
    text, _, micro, scale = conditions
    given = point.given[:, :, None, None, None]
    with torch.no_grad():
        velocity = teacher(point.latents, point.timestep, micro, *text, guidance=scale).masked_fill(given, 0)
    twice = TextStates(*(torch.cat((part, part)) for part in text))

    def mean(latents: Tensor, time: Tensor, until: Tensor) -> Tensor:
        return averaged(latents, time, micro.repeat(2, 1), *twice, guidance=scale.repeat(2), target_time=until)

    return flow_map_target(mean, velocity, point.latents, (point.timestep, target))


def flow_map_loss(student: Stiv, point: Point, conditions: Conditions, target: Tensor, wanted: Tensor) -> Tensor:
    """Squared error to the ``wanted`` mean velocity up to ``target`` [B], fp32 [B], of the frames to make.

    Each sample's is divided by what it is, and :data:`LEAST` more (MeanFlow, section 4.3): targets that are far off are
    those of long steps while the student has not learnt the short ones, and would drown all others.
    """
    text, _, micro, scale = conditions
    prediction = student(point.latents, point.timestep, micro, *text, guidance=scale, target_time=target)
    losses = flow_loss(prediction, wanted, point.given)
    return losses / (losses.detach() + LEAST)
