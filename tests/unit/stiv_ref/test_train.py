"""Training: it learns, it stops and goes on without a trace, it carries weights over, it keeps the last good state."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stiv_deploy.stiv_ref import train as module
from stiv_deploy.stiv_ref.checkpoint import load_checkpoint
from stiv_deploy.stiv_ref.data.moving_digits import Clips, MovingDigits, micro_conditions
from stiv_deploy.stiv_ref.errors import CheckpointError, DivergedError
from stiv_deploy.stiv_ref.recipe import Recipe
from stiv_deploy.stiv_ref.text import tokenize
from stiv_deploy.stiv_ref.train import (
    Run,
    begin_stage,
    diffusion_loss,
    interrupt_held,
    learning_rate,
    load_state,
    optimize,
    start_run,
    step_generator,
    train,
    update_ema,
)

Optimize = Callable[[Run, Recipe, MovingDigits], dict[str, float]]


def losses(out: Path) -> dict[tuple[int, int], float]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {(entry["stage"], entry["step"]): entry["loss"] for entry in entries}


def patch_optimize(monkeypatch: pytest.MonkeyPatch, at: tuple[int, int], stop: BaseException) -> None:
    """Make the training step at (stage, step) raise ``stop``, once."""
    real, left = module.optimize, [stop]

    def stopping(run: Run, recipe: Recipe, data: MovingDigits) -> dict[str, float]:
        if (run.stage, run.step) == at and left:
            raise left.pop()
        return real(run, recipe, data)

    monkeypatch.setattr(module, "optimize", stopping)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One whole run of the short recipe, shared: (losses, state, checkpoint) to compare with."""
    return {"folder": tmp_path_factory.mktemp("whole")}


@pytest.fixture
def whole(uninterrupted: dict[str, Any], recipe: Recipe) -> Path:
    out = uninterrupted["folder"] / "run"
    if not out.exists():
        train(recipe, out, quiet=True)
    return out


def assert_same_run(out: Path, whole: Path) -> None:
    assert losses(out) == losses(whole)
    for name in ("state.safetensors", "checkpoint/model.safetensors", "checkpoint/text_encoder.safetensors"):
        got, wanted = load_file(out / name), load_file(whole / name)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("at", [(1, 0), (1, 3), (2, 0), (2, 4)])
def test_stopped_and_resumed_equals_uninterrupted(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[int, int]
) -> None:
    """Ctrl-C in the first, a middle and the last step of a stage, also at the boundary; bit for bit."""
    patch_optimize(monkeypatch, at, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert load_state(tmp_path / "run" / "state.safetensors", recipe).step == at[1]
    train(recipe, tmp_path / "run", quiet=True)
    assert_same_run(tmp_path / "run", whole)


def test_killed_and_resumed_equals_uninterrupted(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash saves nothing: the run goes on from its last regular save, here two steps back, to the same end."""
    patch_optimize(monkeypatch, (2, 3), RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, tmp_path / "run", quiet=True)
    state = load_state(tmp_path / "run" / "state.safetensors", recipe)
    assert (state.stage, state.step) == (2, 2)
    train(recipe, tmp_path / "run", quiet=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_is_only_written_again(recipe: Recipe, whole: Path) -> None:
    before = losses(whole), (whole / "checkpoint" / "model.safetensors").read_bytes()
    assert train(recipe, whole, quiet=True) == whole / "checkpoint"
    assert (losses(whole), (whole / "checkpoint" / "model.safetensors").read_bytes()) == before


def test_checkpoint_is_half_size_and_loads(recipe: Recipe, whole: Path) -> None:
    checkpoint = load_checkpoint(whole / "checkpoint")
    assert checkpoint.config.sampling == recipe.sampling
    assert checkpoint.config.model.temporal
    assert {t.dtype for t in load_file(whole / "checkpoint" / "model.safetensors").values()} == {torch.float16}
    averages = load_file(whole / "state.safetensors")
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(tensor, averages[f"ema.model.{name}"].half().float())


def test_state_of_another_recipe_is_refused(recipe: Recipe, whole: Path) -> None:
    with pytest.raises(CheckpointError, match="belongs to another recipe; choose another --out or delete it"):
        load_state(whole / "state.safetensors", recipe.model_copy(update={"seed": 1}))


def test_incomplete_state_is_refused(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    tensors = load_file(whole / "state.safetensors")
    del tensors["ema.model.patch.bias"]
    with safe_open(whole / "state.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "state.safetensors", file.metadata())
    with pytest.raises(CheckpointError, match="incomplete, it has no average of model.patch.bias"):
        load_state(tmp_path / "state.safetensors", recipe)


def test_damaged_state_is_refused(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    torn = tmp_path / "state.safetensors"
    torn.write_bytes((whole / "state.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_state(torn, recipe)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_divergence_keeps_the_last_good_state(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    real = module.diffusion_loss

    def poisoned(run: Run, *arguments: Any) -> torch.Tensor:
        loss = real(run, *arguments)
        if run.step < 3:
            return loss
        # A root of zero: its value is finite, its slope is not.
        return loss * torch.nan if poison == "loss" else loss + (run.model.head.out.bias * 0).square().sum().sqrt()

    monkeypatch.setattr(module, "diffusion_loss", poisoned)
    with pytest.raises(
        DivergedError, match=r"is (nan|inf) at step 3 of stage 1 \(t2i\); the last saved state is kept"
    ) as caught:
        train(recipe, tmp_path, quiet=True)
    assert caught.value.exit_code == 2
    run = load_state(tmp_path / "state.safetensors", recipe)
    assert (run.stage, run.step) == (1, 2)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "state.safetensors").values())


def test_interrupt_waits_for_the_end_of_a_step() -> None:
    """A Ctrl-C in the middle of a step must not leave weights moved and the step not counted."""
    done = []

    def step() -> None:
        with interrupt_held():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("rest of the step")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["rest of the step"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt_held():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class OneBatch:
    """Data that is always the same few clips."""

    def __init__(self, count: int, frames: int) -> None:
        self.clips = MovingDigits("train").draw(count, frames, torch.Generator().manual_seed(0))

    def draw(self, count: int, frames: int, generator: torch.Generator) -> Clips:
        return self.clips


def test_loss_falls_on_a_tiny_set(recipe: Recipe) -> None:
    """The start predicts zero, so its loss is E|data - noise|^2 = 2 for standardized latents; learning halves it."""
    stage = recipe.stages[0].model_copy(update={"steps": 1000, "batch": 8, "learning_rate": 1e-2, "warmup": 10})
    recipe = recipe.model_copy(update={"stages": (stage,)})
    run, data = start_run(recipe), OneBatch(8, 1)
    run.vae.standardize(data.clips.video[:, 0])
    run.stage = 1
    begin_stage(run, recipe)

    def fixed_loss() -> float:
        with torch.no_grad():
            return diffusion_loss(run, stage, data.clips, step_generator(99, 1, 0)).mean().item()

    before = fixed_loss()
    assert before == pytest.approx(2, rel=0.15)
    for step in range(150):
        optimize(run, recipe, data)  # type: ignore[arg-type]
        run.step = step + 1
    assert fixed_loss() < 0.5 * before


def test_the_video_model_starts_as_the_image_model_frame_by_frame_but_for_their_places(recipe: Recipe) -> None:
    run = start_run(recipe)
    run.stage = 1
    begin_stage(run, recipe)
    generator = torch.Generator().manual_seed(0)
    for average in run.ema.values():  # as if trained: the stage's result is its averages
        average += 0.05 * torch.randn(average.shape, generator=generator)
    module.use_ema(run)
    image = run.model
    run.stage, run.step = 2, 0
    begin_stage(run, recipe)
    assert run.model.config.temporal
    latents = torch.randn(2, 3, 4, 8, 8, generator=generator)
    text = run.text_encoder(*tokenize(run.tokenizer, ["digit one", "digit two moving up"]))
    micro, t = micro_conditions(2, 3), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        run.model.frame_position.weight.zero_()
        video = run.model(latents, t, micro, *text)
        frames = torch.cat([image(latents[:, index : index + 1], t, micro, *text) for index in range(3)], dim=1)
    assert video.std() > 0.1
    torch.testing.assert_close(video, frames, rtol=0, atol=1e-5 * float(video.abs().max()))


def test_next_stage_continues_from_the_averages(recipe: Recipe) -> None:
    run = start_run(recipe)
    run.stage = 1
    begin_stage(run, recipe)
    wanted = {name: value.add_(1).clone() for name, value in run.ema.items()}
    run.stage = 2
    begin_stage(run, recipe)
    parameters = module.trained(run)
    assert all(torch.equal(parameters[name], wanted[name]) for name in wanted)
    assert {name for name in parameters if name not in wanted} == {
        name for name in parameters if ".temporal" in name or "frame_position" in name
    }
    assert all(torch.equal(run.ema[name], parameter) for name, parameter in parameters.items())


def test_given_frames_enter_clean_and_do_not_count(recipe: Recipe) -> None:
    run = start_run(recipe)
    stage = recipe.stages[1].model_copy(update={"image_dropout": 0.0, "joint_dropout": 0.0})
    clips = MovingDigits("train").draw(3, 3, torch.Generator().manual_seed(0))
    seen: dict[str, Any] = {}

    def spy(latents: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        seen.update(latents=latents, timestep=arguments[0], micro=arguments[1])
        return torch.zeros_like(latents)

    run.model = spy  # type: ignore[assignment]
    loss = diffusion_loss(run, stage, clips, torch.Generator().manual_seed(1))
    clean = run.vae.encode(clips.video)
    assert torch.equal(seen["latents"][:, 0], clean[:, 0])
    assert (seen["latents"][:, 1] != clean[:, 1]).any()
    assert seen["timestep"].shape == (3,)
    assert torch.equal(seen["micro"], micro_conditions(3, 3))
    assert loss.shape == (3,)
    # From x_t = t x1 + (1 - t) n follows the target x1 - n = (x1 - x_t) / (1 - t), without knowing the noise.
    target = (clean - seen["latents"])[:, 1:] / (1 - seen["timestep"])[:, None, None, None, None]
    torch.testing.assert_close(loss, target.square().mean(dim=(1, 2, 3, 4)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("task", ["t2i", "t2v"])
def test_tasks_without_image_get_no_clean_frame(recipe: Recipe, task: str) -> None:
    frames = 1 if task == "t2i" else 3
    stage = recipe.stages[1].model_copy(update={"task": task, "frames": frames, "image_dropout": 0.0})
    run, seen = start_run(recipe), {}
    clips = MovingDigits("train").draw(8, frames, torch.Generator().manual_seed(0))

    def spy(latents: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        seen["latents"] = latents
        return torch.zeros_like(latents)

    run.model = spy  # type: ignore[assignment]
    diffusion_loss(run, stage, clips, torch.Generator().manual_seed(1))
    same = seen["latents"] == run.vae.encode(clips.video)
    assert not same.flatten(2).all(-1).any()


def test_averages_ramp_up_then_decay() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    run = Run(model=torch.nn.Module(), text_encoder=torch.nn.Module(), vae=None, tokenizer=None)  # type: ignore[arg-type]
    run.model.register_parameter("weight", parameter)
    for step, decay in ((0, 0.1), (10, 0.55), (10**6, 0.9)):
        run.ema, run.step = {"model.weight": torch.zeros(1)}, step
        update_ema(run, 0.9)
        assert run.ema["model.weight"].item() == pytest.approx(1 - decay, rel=1e-5)


def test_learning_rate_warms_up_then_falls_to_a_tenth(recipe: Recipe) -> None:
    stage = recipe.stages[0].model_copy(update={"steps": 1000, "warmup": 10, "learning_rate": 1.0})
    rates = [learning_rate(stage, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[4] == pytest.approx(0.5, rel=1e-3)
    assert max(rates) == pytest.approx(1, rel=1e-2)
    assert rates[500] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, rel=1e-3)
    assert all(later < sooner for sooner, later in zip(rates[10:], rates[11:], strict=False))


def test_every_step_has_its_own_draws() -> None:
    seeds = [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]
    draws = {torch.rand(1, generator=step_generator(*seed)).item() for seed in seeds}
    assert len(draws) == len(seeds)
