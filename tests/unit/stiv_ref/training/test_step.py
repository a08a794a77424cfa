"""One step: what the model is given, and switches of efficiency that must not change the maths."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from stiv_deploy.stiv_ref.data.moving_digits import WORDS, micro_conditions
from stiv_deploy.stiv_ref.data.open_source import open_source
from stiv_deploy.stiv_ref.data.source import Batch
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.recipe import Recipe
from stiv_deploy.stiv_ref.training.parallel import Team
from stiv_deploy.stiv_ref.training.run import Run, new_run
from stiv_deploy.stiv_ref.training.stages import begin_stage
from stiv_deploy.stiv_ref.training.step import StepResult, latents_of, token_count, training_step

Started = Callable[..., Run]
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture
def started(recipe: Recipe) -> Started:
    """A run at the first step of the TI2V stage, from scratch, with weights that leave no branch switched off."""

    def start(efficiency: dict[str, Any] | None = None, stage: dict[str, Any] | None = None, **changes: Any) -> Run:
        one = recipe.stages[1].model_copy(
            update={"batch": 6, "image_dropout": 0.5, "joint_dropout": 0.2, "spatial_from": "scratch", **(stage or {})}
        )
        settings = recipe.efficiency.model_copy(update=efficiency or {})
        run = new_run(
            recipe.model_copy(update={"stages": (one,), "efficiency": settings, **changes}),
            Path(),
            Team(device=torch.device("cpu")),
            WORDS,
        )
        run.vae.eval().requires_grad_(False)
        run.stage = 1
        begin_stage(run)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in run.parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return run

    return start


def steps(run: Run, count: int) -> list[StepResult]:
    source = open_source(run.recipe, run.current, 1)
    parts = run.team.parts(run.current.batch, run.recipe.efficiency.micro_batch)
    return [training_step(run, batches, parts) for batches in source.batches(range(count), parts)]


def gradients(run: Run) -> dict[str, Tensor]:
    """Gradients of the first step, before they are clipped: its weights do not move."""
    from stiv_deploy.stiv_ref.training.step import accumulate

    source = open_source(run.recipe, run.current, 1)
    parts = run.team.parts(run.current.batch, run.recipe.efficiency.micro_batch)
    [batches] = list(source.batches(range(1), parts))
    accumulate(run, batches, parts)
    return {name: parameter.grad.clone() for name, parameter in run.parameters.items() if parameter.grad is not None}


def assert_equal_steps(one: list[StepResult], other: list[StepResult]) -> None:
    for first, second in zip(one, other, strict=True):
        assert first.values == second.values
        assert torch.equal(first.losses, second.losses)


@pytest.mark.parametrize("kept", ["blocks", "attention"])
def test_activation_checkpointing_is_bit_equal(started: Started, kept: str) -> None:
    plain, recomputing = started(), started({"activation_checkpointing": kept})
    assert_equal_steps(steps(plain, 3), steps(recomputing, 3))
    assert all(torch.equal(plain.parameters[name], each) for name, each in recomputing.parameters.items())


def test_averages_in_cpu_memory_are_bit_equal(started: Started) -> None:
    plain, apart = started(), started({"ema_device": "cpu"})
    assert_equal_steps(steps(plain, 2), steps(apart, 2))
    assert all(torch.equal(plain.averages[name], each) for name, each in apart.averages.items())
    assert any(not torch.equal(plain.averages[name], each) for name, each in plain.parameters.items())


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_gradients_of_micro_batches_add_up(started: Started, micro_batch: int) -> None:
    """Also where the last one is smaller: a mean over the *batch*, as exact as without them.

    Both err from the gradients of the same model in float64; one not more than twice as much as the other, but for a
    floor of a few roundings of the largest gradient.
    """
    exact, whole, cut = started(), started(), started({"micro_batch": micro_batch})
    for module in exact.modules.values():
        module.double()
    oracle, wanted, got = gradients(exact), gradients(whole), gradients(cut)
    assert oracle.keys() == got.keys() == wanted.keys()
    floor = 4 * EPSILON * max(gradient.abs().max() for gradient in oracle.values())
    for name, gradient in oracle.items():
        allowed, error = ((each[name].double() - gradient).abs().max() for each in (wanted, got))
        assert error <= 2 * allowed + floor, name
    torch.testing.assert_close(steps(cut, 1)[0].losses, steps(whole, 1)[0].losses, rtol=1e-5, atol=0)


def test_bf16_is_at_most_twice_as_wrong_as_plain_bf16(started: Started) -> None:
    """Against fp32: autocast errs at most twice as much as the model cast to bf16 as a whole; weights stay fp32."""
    exact, mixed = started(), started({"precision": "bfloat16"})
    plain = started()
    assert plain.model is not None
    forward = plain.model.forward

    def lowered(latents: Tensor, timestep: Tensor, micro: Tensor, *text: Tensor, keep: Tensor | None = None) -> Tensor:
        states, mask, pooled = text
        half = torch.bfloat16
        return forward(latents.to(half), timestep, micro, states.to(half), mask, pooled.to(half), keep=keep).float()

    plain.model.to(torch.bfloat16)
    plain.model.forward = lowered  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        results = [steps_losses(run) for run in (exact, mixed, plain)]
    scale = results[0].abs().max()
    error, allowed = ((results[index] - results[0]).abs().max() for index in (1, 2))
    assert 0 < error <= 2 * allowed + EPSILON * scale
    steps(mixed, 1)
    assert {parameter.dtype for parameter in mixed.parameters.values()} == {torch.float32}
    assert {average.dtype for average in mixed.averages.values()} == {torch.float32}


def steps_losses(run: Run) -> Tensor:
    from stiv_deploy.stiv_ref.training.step import sample_losses

    source = open_source(run.recipe, run.current, 1)
    [[batch]] = list(source.batches(range(1), [range(6)]))
    return sample_losses(run, batch, range(6))[0].detach()


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["blocks", "attention"])
def test_compiled_blocks_give_the_same_losses(started: Started, monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    """Blocks are traced whole, also under checkpointing, and decomposed; code for a device is not generated here.

    Decompositions round elsewhere: relative differences of some eps, over a hundred operations in a row.
    """
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda forward: real(forward, backend="aot_eager_decomp_partition", fullgraph=True)
    )
    torch.compiler.reset()
    plain = steps(started(), 1)[0]
    counters.clear()
    compiled = steps(started({"compile": True, "activation_checkpointing": kept}), 1)[0]
    assert counters["stats"]["unique_graphs"] > 0  # recomputation around it does not switch it off
    torch.testing.assert_close(compiled.losses, plain.losses, rtol=200 * EPSILON, atol=0)
    assert compiled.values["gradient_norm"] == pytest.approx(plain.values["gradient_norm"], rel=1e-4)
    torch.compiler.reset()


def test_masked_tokens_train_fewer_but_all_are_counted(started: Started, recipe: Recipe) -> None:
    model = recipe.model.model_copy(update={"blocks": 3, "full_blocks": 1})
    run = started(stage={"mask_ratio": 0.5}, model=model)
    before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    [result] = steps(run, 1)
    assert result.tokens == 6 * 3 * 16
    assert all(
        not torch.equal(run.parameters[name], before[name]) for name in ("model.mask_token", "model.blocks.2.table")
    )


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_optimizers_learn_too(started: Started, recipe: Recipe, name: str) -> None:
    optimizer = recipe.optimizer.model_copy(update={"name": name})
    run = started(stage={"batch": 2, "warmup": 0, "learning_rate": 0.02}, optimizer=optimizer)
    assert run.model is not None
    source = open_source(run.recipe, run.current, 1)
    [batches] = list(source.batches(range(1), [range(2)]))
    found = []
    for _ in range(25):
        found.append(training_step(run, batches, [range(2)]).values["loss"])
        run.step = 0
    assert found[-1] < 0.7 * found[0]


def test_gradients_are_clipped_and_their_whole_norm_is_told(started: Started) -> None:
    run = started(gradient_clip=0.01)
    wanted = torch.stack([gradient.norm() for gradient in gradients(started()).values()]).norm()
    [result] = steps(run, 1)
    assert result.values["gradient_norm"] == pytest.approx(wanted.item(), rel=1e-5)
    left = torch.stack([each.grad.norm() for each in run.parameters.values() if each.grad is not None]).norm()
    assert left.item() == pytest.approx(0.01, rel=1e-3)


def spied(run: Run) -> dict[str, Any]:
    """Let ``run``'s model note what it is given and predict zero."""
    seen: dict[str, Any] = {}

    def spy(latents: Tensor, *arguments: Tensor, keep: Tensor | None = None) -> Tensor:
        seen.update(latents=latents, timestep=arguments[0], micro=arguments[1], keep=keep)
        return torch.zeros_like(latents)

    assert run.model is not None
    run.model.forward = spy  # type: ignore[method-assign,assignment]
    return seen


def test_given_frames_enter_clean_and_do_not_count(started: Started) -> None:
    run = started(stage={"image_dropout": 0.0, "joint_dropout": 0.0})
    seen = spied(run)
    losses = steps_losses(run)
    [[batch]] = list(open_source(run.recipe, run.current, 1).batches(range(1), [range(6)]))
    clean = latents_of(run, batch)
    assert torch.equal(seen["latents"][:, 0], clean[:, 0])
    assert (seen["latents"][:, 1] != clean[:, 1]).any()
    assert torch.equal(seen["micro"], micro_conditions(6, 3))
    # From x_t = t x1 + (1 - t) n follows the target x1 - n = (x1 - x_t) / (1 - t), without knowing the noise.
    target = (clean - seen["latents"])[:, 1:] / (1 - seen["timestep"])[:, None, None, None, None]
    torch.testing.assert_close(losses, target.square().mean(dim=(1, 2, 3, 4)), rtol=1e-3, atol=0)


def test_every_second_frame_enters_clean_and_does_not_count(started: Started) -> None:
    """Only the frame between is left: its error is the whole loss."""
    run = started(stage={"task": "interpolate", "image_dropout": 0.0, "joint_dropout": 0.0})
    seen = spied(run)
    losses = steps_losses(run)
    [[batch]] = list(open_source(run.recipe, run.current, 1).batches(range(1), [range(6)]))
    clean = latents_of(run, batch)
    assert torch.equal(seen["latents"][:, ::2], clean[:, ::2])
    target = (clean - seen["latents"])[:, 1] / (1 - seen["timestep"])[:, None, None, None]
    torch.testing.assert_close(losses, target.square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("task", ["t2i", "t2v"])
def test_tasks_without_image_get_no_clean_frame(started: Started, task: str) -> None:
    run = started(stage={"task": task, "frames": 1 if task == "t2i" else 3, "image_dropout": 0.0})
    seen = spied(run)
    steps_losses(run)
    [[batch]] = list(open_source(run.recipe, run.current, 1).batches(range(1), [range(6)]))
    assert not (seen["latents"] == latents_of(run, batch)).flatten(2).all(-1).any()


def test_precomputed_latents_skip_the_vae(started: Started) -> None:
    run = started()
    latents = torch.randn(2, 3, 4, 8, 8).half()
    batch = Batch(latents=latents, captions=["a", "b"], micro=torch.ones(2, 6), names=["a", "b"])
    assert torch.equal(latents_of(run, batch), latents.float())


def test_data_that_does_not_fit(started: Started) -> None:
    run = started()
    assert run.model is not None
    empty = Batch(captions=["a"], micro=torch.ones(1, 6), names=["clip 7"])
    with pytest.raises(ConfigError, match="the samples clip 7 have neither video nor latents"):
        latents_of(run, empty)
    with pytest.raises(ConfigError, match="the data does not fit the model: latents have 8 channels"):
        token_count(run.model, torch.zeros(1, 3, 8, 8, 8))
    image = started(stage={"task": "t2i", "frames": 1}).model
    assert image is not None
    with pytest.raises(ConfigError, match="the data has 3 latent frames, a t2i stage takes one"):
        token_count(image, torch.zeros(1, 3, 4, 8, 8))
