"""Distillation: what a student learns from another model instead of from data alone.

``guidance`` (Meng et al., arXiv 2210.03142): one row of the student gives the velocity that the teacher gives with
JIT-CFG and CFG-Renorm in two, for every guidance scale of a range, which is a condition of the student. The teacher's
branches see what they see in sampling: given frames are clean in the conditional one, and in the unconditional one they
are noised, with the noise of the clip, or zero, as the task has it. The student sees the conditional one's input, so
that it learns the mean over that noise where frames are given.

``flow-map``: the student then learns the mean velocity u(x, t, r) = (X(r) - x) / (r - t) of the path X of its teacher's
velocity v that goes through x at time t, so that x + (r - t) u is the path's point at r, however far that is. Over a
short interval that is what the midpoint rule makes of v. A long one is split at a time s (SplitMeanFlow, arXiv
2507.16884): two steps that are right make one that is, so that

    (r - t) u(x, t, r) = (s - t) u(x, t, s) + (r - s) u(x + (s - t) u(x, t, s), s, r),

by two calls of the student itself, averaged weights. What these are wrong by is added up, by shares of the interval,
and never grows. The derivative of the definition, u = v + (r - t) du/dt (MeanFlow, arXiv 2505.13447), with central
differences over d in the place of du/dt, is no such target: (r - t) cos(pi t / d) solves it too, since its differences
are 0, and the error of other fast modes grows by up to (r - t) / d. A student of the shipped model that was trained by
it had ever smaller losses, and in the end steps that were wrong by more than their size.
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
Velocity = Callable[[Tensor, Tensor], Tensor]
"""Velocity [B, ...] at latents [B, ...] and times [B]."""
SPAN = 0.02
"""Intervals up to so long are short: the midpoint rule errs by their square."""
LEAST = 1e-2
"""Mean squared error from which on a sample of a flow map counts less than its share."""
TO_THE_END = 0.3
"""Share of the long intervals that go to the end; the others' lengths are log-uniform."""


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


class Intervals(NamedTuple):
    """Where steps of a batch go: fp32 [B] each, ``start`` <= ``split`` <= ``end``; ``short`` bool [B], on the host."""

    start: Tensor
    split: Tensor
    end: Tensor
    short: Tensor

    def part(self, index: Tensor) -> "Intervals":
        """Those of some samples, int64 [b] on the host."""
        return Intervals(*(each[index.to(each.device)] for each in self))

    def to(self, device: torch.device) -> "Intervals":
        """Times on ``device``."""
        return Intervals(self.start.to(device), self.split.to(device), self.end.to(device), self.short)


def draw_intervals(timestep: Tensor, generators: Sequence[torch.Generator], part: Sequence[int]) -> Intervals:
    """Intervals from each of ``timestep`` [B], one sample per generator; samples with an even number have short ones.

    ``part`` are the numbers of the samples in the whole batch: half of any of its parts is short.
    """
    ends, splits = [], []
    for time, generator, number in zip(timestep, generators, part, strict=True):
        kind, share, fraction = torch.rand(3, generator=generator)
        room = 1 - time
        if number % 2 == 0:
            length = room.clamp_max(SPAN) * share
        elif kind < TO_THE_END or room <= SPAN:
            length = room
        else:
            length = room ** (1 - share) * SPAN**share
        ends.append((time + length).clamp_max(1))
        splits.append(torch.minimum(time + fraction * length, ends[-1]))
    short = torch.tensor([number % 2 == 0 for number in part])
    return Intervals(timestep, torch.stack(splits), torch.stack(ends), short)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))


def midpoint(velocity: Velocity, latents: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Mean velocity [B, ...] of the path through ``latents`` between two times fp32 [B], by the midpoint rule."""
    half = (end - start) / 2
    between = latents + _wide(half, latents) * velocity(latents, start)
    return velocity(between, start + half)


def split_mean(mean: Mean, latents: Tensor, start: Tensor, split: Tensor, end: Tensor) -> Tensor:
    """Mean velocity [B, ...] that two steps by ``mean`` have together, from ``start`` over ``split`` to ``end`` [B]."""
    first = mean(latents, start, split)
    there = latents + _wide(split - start, latents) * first
    share = _wide((split - start) / (end - start).clamp_min(1e-6), latents)
    return share * first + (1 - share) * mean(there, split, end)


def _some(point: Point, conditions: Conditions, index: Tensor) -> tuple[Point, Conditions]:
    """Those of some samples, int64 [b]."""
    text, null, micro, scale = conditions

    def part(states: TextStates) -> TextStates:
        return TextStates(*(each[index] for each in states))

    some = Conditions(part(text), part(null), micro[index], scale[index])
    return Point(*(each[index] for each in point)), some


@torch.no_grad()
def flow_map_targets(
    averaged: Stiv, teacher: Stiv, point: Point, conditions: Conditions, intervals: Intervals
) -> Tensor:
    """Mean velocities [B, T, C, h, w] over ``intervals``: short ones by ``teacher``, others by ``averaged`` weights.

    Given frames do not move.
    """
    found = torch.empty_like(point.latents)
    for short in (True, False):
        index = (intervals.short == short).nonzero()[:, 0]
        if len(index):
            here = index.to(found.device)
            some = _some(point, conditions, here)
            part = intervals.part(index)
            found[here] = _short_targets(teacher, *some, part) if short else _long_targets(averaged, *some, part)
    return found


def _short_targets(teacher: Stiv, point: Point, conditions: Conditions, intervals: Intervals) -> Tensor:
    text, _, micro, scale = conditions
    given = point.given[:, :, None, None, None]

    def velocity(latents: Tensor, time: Tensor) -> Tensor:
        return teacher(latents, time, micro, *text, guidance=scale).masked_fill(given, 0)

    return midpoint(velocity, point.latents, intervals.start, intervals.end)


def _long_targets(averaged: Stiv, point: Point, conditions: Conditions, intervals: Intervals) -> Tensor:
    text, _, micro, scale = conditions
    given = point.given[:, :, None, None, None]

    def mean(latents: Tensor, time: Tensor, until: Tensor) -> Tensor:
        return averaged(latents, time, micro, *text, guidance=scale, target_time=until).masked_fill(given, 0)

    return split_mean(mean, point.latents, *intervals[:3])


def flow_map_loss(student: Stiv, point: Point, conditions: Conditions, end: Tensor, wanted: Tensor) -> Tensor:
    """Squared error to the ``wanted`` mean velocity up to ``end`` [B], fp32 [B], of the frames to make.

    Each sample's is divided by what it is, and :data:`LEAST` more (MeanFlow, section 4.3): targets that are far off are
    those of long steps while the student has not learnt the short ones, and would drown all others.
    """
    text, _, micro, scale = conditions
    prediction = student(point.latents, point.timestep, micro, *text, guidance=scale, target_time=end)
    losses = flow_loss(prediction, wanted, point.given)
    return losses / (losses.detach() + LEAST)
