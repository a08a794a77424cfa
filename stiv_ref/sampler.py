"""The shortest correct sampling loop: the golden answer for every shipped form of it.

Integrates the flow from t = 0 (noise) to t = 1 (data) with frame replacement at every evaluation and any of the
guidance modes, all branches in one batched call (arXiv 2412.07730, section 2.3).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stiv_deploy.stiv_ref.conditioning import noise_frames, replace_frames
from stiv_deploy.stiv_ref.config import Student
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.flow import schedule
from stiv_deploy.stiv_ref.guidance import GuidanceMode, Unseen, cfg_renorm, jit_cfg, sit_cfg
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.skipping import Skipping
from stiv_deploy.stiv_ref.text import TextStates

Weights = tuple[tuple[float, float], ...]
"""AB2's of steps: of the velocity at the start of the step, and of the one before."""
TIE = 1e-9
"""Times this near to an end of the guidance interval are at it: their last bits depend on who computes them."""


class Solver(StrEnum):
    """Ordinary differential equation solver: Euler (one model call a step), Heun (two, second order) or AB2.

    AB2, the Adams-Bashforth rule of two steps, is of second order too, with one model call a step: it uses the velocity
    of the step before again.
    """

    EULER = "euler"
    HEUN = "heun"
    AB2 = "ab2"


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Everything about a sampling run that is not a tensor. ``image_scale`` is used by SIT-CFG only.

    Evaluations at times from ``guidance_from`` to ``guidance_until``, both among them, are guided; all others are of
    the conditional branch alone (a guidance interval, arXiv 2404.07724). ``solver_weights`` are AB2's in every step but
    the first, of the velocity there and of the one before, in place of :func:`adams_bashforth`'s. ``skipped_steps``,
    counted from 0, do without the model's blocks (:mod:`~stiv_deploy.stiv_ref.skipping`).
    """

    steps: int = 50
    guidance_mode: GuidanceMode = GuidanceMode.JIT
    guidance_scale: float = 7.5
    image_scale: float = 1.5
    renorm: bool = True
    solver: Solver = Solver.EULER
    time_shift: float = 1.0
    late_stretch: float = 1.0
    solver_weights: Weights = ()
    skipped_steps: tuple[int, ...] = ()
    unseen: Unseen = Unseen.NOISED
    guidance_from: float = 0.0
    guidance_until: float = 1.0

    def times(self) -> list[float]:
        """Sampling times, one more than steps (:func:`~stiv_deploy.stiv_ref.flow.schedule`)."""
        return schedule(self.steps, self.time_shift, self.late_stretch).tolist()

    def guides(self, time: float) -> bool:
        """Whether an evaluation at ``time`` is guided."""
        return self.guidance_from - TIE <= time <= self.guidance_until + TIE


class SamplingInputs(NamedTuple):
    """Tensors of a sampling run.

    ``noise`` and ``clean`` [B, T, C, h, w]; ``frame_mask`` bool [B, T] marks the frames of ``clean`` that are given;
    ``text`` and ``null_text`` are the states of the prompts and of the empty (or negative) prompts, ``micro`` [B, 6].
    """

    noise: Tensor
    clean: Tensor
    frame_mask: Tensor
    text: TextStates
    null_text: TextStates
    micro: Tensor


Observer = Callable[[int, Tensor, Tensor], None]
"""Called after each step with its index, the latents before it and the guided velocity used (first evaluation)."""


class _Branches(NamedTuple):
    """The guidance branches, folded into the batch axis [G * B], and which of them see the given frames."""

    text: TextStates
    sees_image: list[bool]


def _branches(mode: GuidanceMode, text: TextStates, null: TextStates) -> _Branches:
    order = {
        GuidanceMode.NONE: [(text, True)],
        GuidanceMode.JIT: [(text, True), (null, False)],
        GuidanceMode.SIT: [(text, True), (null, True), (null, False)],
    }[mode]
    stacked = TextStates(*(torch.cat(parts) for parts in zip(*(states for states, _ in order), strict=True)))
    return _Branches(stacked, [sees for _, sees in order])


def _guide(branches: tuple[Tensor, ...], frame_mask: Tensor, settings: SamplingSettings) -> Tensor:
    match settings.guidance_mode:
        case GuidanceMode.NONE:
            return branches[0]
        case GuidanceMode.JIT:
            guided = jit_cfg(branches[0], branches[1], settings.guidance_scale)
        case GuidanceMode.SIT:
            scales = (settings.guidance_scale, settings.image_scale)
            guided = sit_cfg(branches[0], branches[1], branches[2], *scales)
    return cfg_renorm(guided, branches[0], frame_mask) if settings.renorm else guided


def check_student(student: Student, settings: SamplingSettings) -> None:
    """:class:`ConfigError` where a student cannot be sampled with ``settings``."""
    if settings.guidance_mode is GuidanceMode.SIT:
        raise ConfigError("guidance mode sit: a student has the joint guidance of text and image in it; use jit")
    if not student.covers(settings.guidance_scale):
        raise ConfigError(f"guidance scale {settings.guidance_scale:g}: this student was trained for {student.scales}")
    if not (settings.renorm and settings.guides(0) and settings.guides(1)):
        raise ConfigError("a student's guidance is renormalized, at all times; leave renorm on and the interval whole")
    if student.flow_map and settings.solver is not Solver.EULER:
        raise ConfigError(f"solver {settings.solver}: a flow map goes from time to time by itself; use euler")


def student_inputs(student: Student | None, scale: float, timestep: Tensor, target: float) -> dict[str, Tensor]:
    """What a student takes besides the inputs of other models, for a step from ``timestep`` [B] to ``target``."""
    if student is None:
        return {}
    late = {"guidance": scale} | ({"target_time": target} if student.flow_map else {})
    return {name: torch.full_like(timestep, value) for name, value in late.items()}


Velocity = Callable[[Tensor, float, float], Tensor]
"""Guided velocity at latents [B, T, C, h, w] and a time, for a step up to another time."""


def guided_velocity(model: Stiv, inputs: SamplingInputs, settings: SamplingSettings) -> Velocity:
    """The guided velocity of a run as a function of latents and times; text is projected here, once.

    Where a step ends is asked by flow maps, which give the mean velocity up to there. That of a student is one row's,
    whose condition is the guidance scale, in the modes ``none`` and ``jit`` alike. Raises :class:`ConfigError` where
    ``settings`` are not for it.
    """
    if model.config.student is not None:
        check_student(model.config.student, settings)
        settings = replace(settings, guidance_mode=GuidanceMode.NONE)
    guided = _velocity(model, inputs, settings)
    if settings.guidance_mode is GuidanceMode.NONE or (settings.guides(0) and settings.guides(1)):
        return guided
    conditional = _velocity(model, inputs, replace(settings, guidance_mode=GuidanceMode.NONE))
    return lambda latents, time, target: (guided if settings.guides(time) else conditional)(latents, time, target)


def _velocity(model: Stiv, inputs: SamplingInputs, settings: SamplingSettings) -> Velocity:
    noise, clean, frame_mask, text, null_text, micro = inputs
    branches = _branches(settings.guidance_mode, text, null_text)
    count = len(branches.sees_image)
    with torch.no_grad():
        text_kv = model.text_kv(branches.text.states)
    micro = micro.repeat(count, 1)
    times = settings.times()
    skipping = Skipping([times[step] for step in settings.skipped_steps]) if settings.skipped_steps else None

    @torch.no_grad()
    def velocity(latents: Tensor, time: float, target: float) -> Tensor:
        timestep = latents.new_full((len(latents),), time)
        if settings.unseen is Unseen.ZERO:
            hidden = replace_frames(latents, torch.zeros_like(clean), frame_mask)
        else:
            hidden = noise_frames(latents, clean, noise, timestep, frame_mask)
        model_input = torch.cat([latents if sees else hidden for sees in branches.sees_image])
        more: dict[str, Any] = student_inputs(model.config.student, settings.guidance_scale, timestep, target)
        if skipping is not None:
            skipping.begin(time)
            more["skipping"] = skipping
        output = model(model_input, timestep.repeat(count), micro, *branches.text, text_kv=text_kv, **more)
        return _guide(output.chunk(count), frame_mask, settings)

    return velocity


def adams_bashforth(velocity: Tensor, previous: Tensor, ratio: float) -> Tensor:
    """Mean velocity of a step, on the line through the ``previous`` velocity and this one, at the start of the step.

    ``ratio`` is this step's length over the previous one's. The Adams-Bashforth rule of order two on unequal steps
    (Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, section III.5).
    """
    return velocity + 0.5 * ratio * (velocity - previous)


class _Last(NamedTuple):
    """What AB2 remembers of the step before: when it began, and the guided velocity there."""

    time: float
    velocity: Tensor


def _slope(own: Weights, velocity: Tensor, last: _Last, time: float, following: float) -> Tensor:
    """AB2's mean velocity from ``time`` to ``following``, by the step's ``own`` weights where it has some."""
    if not own:
        return adams_bashforth(velocity, last.velocity, (following - time) / (time - last.time))
    ((this, before),) = own
    return this * velocity + before * last.velocity


@torch.no_grad()
def sample(model: Stiv, inputs: SamplingInputs, settings: SamplingSettings, observer: Observer | None = None) -> Tensor:
    """Generate latents [B, T, C, h, w]; the given frames come out bit-equal to ``inputs.clean``."""
    noise, clean, frame_mask = inputs.noise, inputs.clean, inputs.frame_mask
    velocity = guided_velocity(model, inputs, settings)
    latents = replace_frames(noise, clean, frame_mask)
    times = settings.times()
    last: _Last | None = None
    for step, (time, following) in enumerate(pairwise(times)):
        before, v = latents, velocity(latents, time, following)
        if last is not None and settings.guides(last.time) != settings.guides(time):
            last = None  # the velocity jumps where guidance begins or ends
        slope = v if last is None else _slope(settings.solver_weights[step - 1 : step], v, last, time, following)
        latents = replace_frames(before + (following - time) * slope, clean, frame_mask)
        if settings.solver is Solver.HEUN and following < 1:
            mean = 0.5 * (v + velocity(latents, following, following))
            latents = replace_frames(before + (following - time) * mean, clean, frame_mask)
        if settings.solver is Solver.AB2:
            last = _Last(time, v)
        if observer is not None:
            observer(step, before, v)
    return latents
