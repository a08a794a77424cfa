"""Distillation: the student starts as its teacher, and its target is what the sampler makes of the teacher."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stiv_deploy.stiv_ref.config import StivConfig, Student
from stiv_deploy.stiv_ref.distillation import (
    Conditions,
    draw_scales,
    guidance_loss,
    guided_target,
    point_of,
    sees_zeros,
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
    assert torch.equal(
        student(latents, time, micro, *text, guidance=scale),
        teacher(latents, time, micro, *text),
    )


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
        velocity = guided_velocity(teacher, inputs, settings)(point.latents[part], draws.timestep[index].item())
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
