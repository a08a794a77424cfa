"""Distillation: the student starts as its teacher, and its target is what the sampler makes of the teacher."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stiv_deploy.stiv_ref.config import StivConfig, Student
from stiv_deploy.stiv_ref.distillation import (
    LEAST,
    SPAN,
    TO_THE_END,
    Conditions,
    Intervals,
    draw_intervals,
    draw_scales,
    flow_map_loss,
    flow_map_targets,
    guidance_loss,
    guided_target,
    midpoint,
    point_of,
    sees_zeros,
    split_mean,
)
from stiv_deploy.stiv_ref.initialization import initialize_from
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.objective import Draws, Objective, draw, sample_generator
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, guided_velocity
from stiv_deploy.stiv_ref.text import TextStates

ModelFactory = Callable[..., Stiv]
SHAPE = (3, 4, 4, 6)  # T, C, h, w
SCALES = (2.0, 6.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def text_of(batch: int, seed: int) -> TextStates:
    return TextStates(normal(batch, 5, 12, seed=seed), torch.ones(batch, 5), normal(batch, 12, seed=seed + 1))


def drawn(objective: Objective, count: int = 2) -> Draws:
    draws = draw(objective, SHAPE, 6, [sample_generator(0, 1, 0, index) for index in range(count)])
    return replace(draws, timestep=draws.timestep.double(), noise=draws.noise.double())


def conditions_of(scale: Tensor) -> Conditions:
    batch = len(scale)
    return Conditions(text_of(batch, 3), text_of(batch, 5), normal(batch, 6, seed=7), scale)


def test_a_student_starts_as_its_teacher(random_model: ModelFactory, small_config: StivConfig) -> None:
    teacher = random_model()
    student = Stiv(small_config.model_copy(update={"student": Student(guidance=SCALES)})).double()
    student.initialize(torch.Generator().manual_seed(0))
    initialize_from(student, teacher)
    text, _, micro, scale = conditions_of(torch.tensor(SCALES).double())
    latents, time = normal(2, *SHAPE), torch.tensor([0.2, 0.7]).double()
    assert torch.equal(student(latents, time, micro, *text, guidance=scale), teacher(latents, time, micro, *text))


def test_a_flow_map_starts_as_its_students_velocity(random_model: ModelFactory, small_config: StivConfig) -> None:
    student = random_model(student=Student(guidance=SCALES))
    flow_map = Stiv(small_config.model_copy(update={"student": Student(guidance=SCALES, flow_map=True)})).double()
    initialize_from(flow_map.initialize(torch.Generator().manual_seed(0)), student)
    text, _, micro, scale = conditions_of(torch.tensor(SCALES).double())
    latents, time = normal(2, *SHAPE), torch.tensor([0.2, 0.7]).double()
    wanted = student(latents, time, micro, *text, guidance=scale)
    assert torch.equal(flow_map(latents, time, micro, *text, guidance=scale, target_time=torch.ones(2)), wanted)


@pytest.mark.parametrize("task", ["t2v", "ti2v", "interpolate", "views"])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_the_target_is_the_samplers_guided_velocity(random_model: ModelFactory, task: Any, dropout: float) -> None:
    """At the same latents, noise, time, given frames and scale, for each sample of a batch."""
    teacher, objective = random_model(), Objective(task=task, image_dropout=dropout)
    draws, clean = drawn(objective), normal(2, *SHAPE, seed=9)
    conditions = conditions_of(torch.tensor(SCALES).double())
    point = point_of(clean, draws, sees_zeros(objective, 2, None))
    target = guided_target(teacher, point, conditions)
    kept = objective.kind.conditioned and (task == "views" or not dropout)
    assert bool(point.given.any()) == kept
    for index in range(2):
        part = slice(index, index + 1)
        text, null = (TextStates(*(each[part] for each in states)) for states in conditions[:2])
        inputs = SamplingInputs(draws.noise[part], clean[part], point.given[part], text, null, conditions.micro[part])
        settings = SamplingSettings(guidance_scale=SCALES[index], unseen=objective.kind.unseen)
        time = draws.timestep[index].item()
        velocity = guided_velocity(teacher, inputs, settings)(point.latents[part], time, 1.0)
        torch.testing.assert_close(target[part], velocity, rtol=1e-9, atol=1e-9)


def test_the_loss_is_that_of_the_frames_to_make(random_model: ModelFactory) -> None:
    """And it is of the student alone: no gradient reaches its teacher."""
    teacher, objective = random_model(), Objective(task="ti2v", image_dropout=0)
    student = random_model(1, student=Student(guidance=SCALES)).requires_grad_(True)
    conditions, clean = conditions_of(torch.tensor(SCALES).double()), normal(2, *SHAPE, seed=9)
    point = point_of(clean, drawn(objective), sees_zeros(objective, 2, None))
    losses = guidance_loss(student, teacher, point, conditions)
    prediction = student(point.latents, point.timestep, conditions.micro, *conditions.text, guidance=conditions.scale)
    error = (prediction - guided_target(teacher, point, conditions)).square()
    torch.testing.assert_close(losses, error[:, 1:].mean(dim=(1, 2, 3, 4)).float(), rtol=1e-5, atol=0)
    losses.sum().backward()
    assert student.singleton.guidance.inner.weight.grad.abs().max() > 0
    assert teacher.patch.weight.grad is None


def test_scales_are_uniform_in_their_range_and_each_samples_own() -> None:
    def generators() -> list[torch.Generator]:
        return [sample_generator(0, 1, 0, index) for index in range(200)]

    scales = draw_scales(SCALES, generators())
    assert scales.min() >= 2
    assert scales.max() <= 6
    assert abs(scales.mean().item() - 4) < 4 * (16 / 12 / 200) ** 0.5
    assert torch.equal(scales[5:7], draw_scales(SCALES, generators()[5:7]))
    assert draw_scales((4.0, 4.0), generators()).unique().tolist() == [4.0]


def test_samples_of_views_among_others_have_zeros() -> None:
    assert sees_zeros(Objective(task="ti2v"), 3, ["views", None, "ti2v"]).tolist() == [True, False, False]
    assert sees_zeros(Objective(task="views"), 1, None).tolist() == [True]


class Gaussian:
    """Noise N(0, 1) to data N(mean, deviation^2), independent in each value: all of the flow is known."""

    def __init__(self, mean: float, deviation: float) -> None:
        self.data, self.deviation = mean, deviation

    def spread(self, time: Tensor) -> Tensor:
        return (time**2 * self.deviation**2 + (1 - time) ** 2).sqrt()

    def velocity(self, x: Tensor, time: Tensor) -> Tensor:
        change = (time * self.deviation**2 - (1 - time)) / self.spread(time)
        return self.data + change / self.spread(time) * (x - time * self.data)

    def mean(self, x: Tensor, time: Tensor, target: Tensor) -> Tensor:
        """The mean velocity: the path keeps the place in units of the spread."""
        there = target * self.data + self.spread(target) / self.spread(time) * (x - time * self.data)
        return torch.where(target == time, self.velocity(x, time), (there - x) / (target - time))


def at(*times: float) -> list[Tensor]:
    return [torch.full((50,), time, dtype=torch.float64) for time in times]


@given(
    mean=st.floats(-2, 2),
    deviation=st.floats(0.3, 2),
    start=st.floats(0, 0.99),
    share=st.floats(1e-3, 1),
    fraction=st.floats(0, 1),
)
def test_two_steps_that_are_right_make_one(
    mean: float, deviation: float, start: float, share: float, fraction: float
) -> None:
    flow, length = Gaussian(mean, deviation), (1 - start) * share
    times = at(start, start + fraction * length, start + length)
    x = normal(50)
    assert torch.allclose(split_mean(flow.mean, x, *times), flow.mean(x, times[0], times[2]), rtol=0, atol=1e-6)


@given(start=st.floats(0, 0.9), share=st.floats(0.05, 0.95), fraction=st.floats(0, 1), rate=st.floats(1, 2000))
def test_what_steps_are_wrong_by_is_added_up_and_never_grows(
    start: float, share: float, fraction: float, rate: float
) -> None:
    """However fast it changes with the times: mean velocities that do not depend on the place show it."""
    times = at(start, start + fraction * share * (1 - start), start + share * (1 - start))

    def wrong(x: Tensor, time: Tensor, until: Tensor) -> Tensor:
        return (torch.cos(rate * time + rate * until)).expand_as(x)

    assert split_mean(wrong, normal(50), *times).abs().max() <= 1 + 1e-9


@pytest.mark.parametrize("start", [0.1, 0.3, 0.6])
def test_the_midpoint_rule_is_of_second_order(start: float) -> None:
    """Half of the interval has a quarter of the error, or less."""
    flow, x = Gaussian(1.0, 0.5), normal(50)
    errors = []
    for length in (0.08, 0.04):
        times = at(start, start + length)
        errors.append((midpoint(flow.velocity, x, *times) - flow.mean(x, *times)).abs().max().item())
    assert errors[0] / errors[1] > 3.5
    assert errors[1] < 1e-2


def test_over_no_time_it_is_the_velocity() -> None:
    flow, x = Gaussian(1.0, 0.5), normal(50)
    for time in (0.0, 0.4, 1.0):
        assert torch.equal(midpoint(flow.velocity, x, *at(time, time)), flow.velocity(x, *at(time)))


def test_targets_of_a_batch(random_model: ModelFactory) -> None:
    """Short intervals by the teacher, long ones by the student's own calls, at the clip's scale; given frames stay."""
    teacher = random_model(student=Student(guidance=SCALES))
    student = random_model(1, student=Student(guidance=SCALES, flow_map=True))
    conditions, clean = conditions_of(torch.tensor(SCALES).double()), normal(2, *SHAPE, seed=9)
    objective = Objective(task="ti2v", image_dropout=0)
    point = point_of(clean, drawn(objective), sees_zeros(objective, 2, None))
    start = point.timestep
    intervals = Intervals(start, start + 0.25 * (1 - start), torch.ones_like(start), torch.tensor([False, True]))
    made = flow_map_targets(student, teacher, point, conditions, intervals)
    text, _, micro, scale = conditions

    def velocity(latents: Tensor, time: Tensor) -> Tensor:
        assert torch.equal(latents[:, 0], clean[:, 0])
        found = teacher(latents, time, micro, *text, guidance=scale)
        return torch.cat((torch.zeros_like(found[:, :1]), found[:, 1:]), 1)

    def mean(latents: Tensor, time: Tensor, until: Tensor) -> Tensor:
        assert torch.equal(latents[:, 0], clean[:, 0])
        found = student(latents, time, micro, *text, guidance=scale, target_time=until)
        return torch.cat((torch.zeros_like(found[:, :1]), found[:, 1:]), 1)

    wanted = split_mean(mean, point.latents, *intervals[:3])
    torch.testing.assert_close(made[0], wanted[0])
    torch.testing.assert_close(made[1], midpoint(velocity, point.latents, start, intervals.end)[1])
    losses = flow_map_loss(student, point, conditions, intervals.end, made)
    error = (student(point.latents, start, micro, *text, guidance=scale, target_time=intervals.end) - made).square()
    size = error[:, 1:].mean(dim=(1, 2, 3, 4)).float()
    torch.testing.assert_close(losses, size / (size + LEAST), rtol=1e-5, atol=0)


def test_intervals_are_short_or_long_and_each_samples_own() -> None:
    def generators() -> list[torch.Generator]:
        return [sample_generator(0, 1, 0, index) for index in range(400)]

    times = torch.linspace(0, 1, 400)
    found = draw_intervals(times, generators(), range(400))
    assert ((times <= found.split) & (found.split <= found.end) & (found.end <= 1)).all()
    assert found.short.tolist() == [number % 2 == 0 for number in range(400)]
    lengths = found.end - times
    assert lengths[found.short].max() <= SPAN + 1e-6
    far = ~found.short & (times < 1 - SPAN)
    assert lengths[far].min() >= SPAN - 1e-6
    assert abs((found.end[far] == 1).float().mean().item() - TO_THE_END) < 0.1
    part = draw_intervals(times[7:9], generators()[7:9], range(7, 9))
    assert all(torch.equal(mine, whole[7:9]) for mine, whole in zip(part, found, strict=True))
