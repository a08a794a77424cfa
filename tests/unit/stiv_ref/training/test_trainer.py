"""Training: it learns, it stops and goes on without a trace, it keeps the last good state."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stiv_deploy.stiv_ref.checkpoint import load_checkpoint
from stiv_deploy.stiv_ref.data.source import Batch, DigitsSource
from stiv_deploy.stiv_ref.errors import CheckpointError, ConfigError, DivergedError
from stiv_deploy.stiv_ref.recipe import FrozenText, FrozenVae, Recipe
from stiv_deploy.stiv_ref.training import step as step_module
from stiv_deploy.stiv_ref.training import trainer as trainer_module
from stiv_deploy.stiv_ref.training.parallel import Team
from stiv_deploy.stiv_ref.training.trainer import TrainReport, TrainRequest, check, check_vae, train
from stiv_deploy.stiv_ref.training.vae_stage import frames_of
from stiv_deploy.stiv_ref.world_settings import ViewsData

At = tuple[int, int]
BeforeStep = Callable[[At, Callable[[], None]], None]


def trained(recipe: Recipe, out: Path) -> TrainReport:
    return train(TrainRequest(recipe=recipe, out=out))


def position(out: Path) -> tuple[int, int]:
    found = json.loads((out / "state" / "position.json").read_text())
    return found["stage"], found["step"]


@pytest.mark.parametrize(
    "at", [(1, 3), *(pytest.param(at, marks=pytest.mark.slow) for at in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 4)))]
)
def test_stopped_and_resumed_equals_uninterrupted(
    runs: Any, recipe: Recipe, whole: Path, tmp_path: Path, before_step: BeforeStep, at: tuple[int, int]
) -> None:
    """Ctrl-C in the VAE's training and in the first, a middle and the last step of a stage; bit for bit."""
    out = tmp_path / "run"
    before_step(at, runs.interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, out)
    assert not (out / "checkpoint").exists()
    assert position(out) == (at[0], at[1] + 1)  # the step that was running is whole
    trained(recipe, out)
    runs.assert_same(out, whole)


@pytest.mark.parametrize(
    ("function", "at"), [("finish_vae", (0, 2)), ("keep_stage", (1, 1)), ("save_checkpoint", (2, 1))]
)
def test_a_signal_between_stages_and_at_the_end_is_heard(
    runs: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, at: At
) -> None:
    """While the VAE is measured, a stage's checkpoint written, or the last one: that is finished, then it stops."""
    short = recipe.model_copy(update={"stages": tuple(s.model_copy(update={"steps": 1}) for s in recipe.stages)})
    real, calls = getattr(trainer_module, function), []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            runs.interrupt()
        return real(*arguments)

    monkeypatch.setattr(trainer_module, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(short, tmp_path)
    assert position(tmp_path) == at
    assert (tmp_path / "checkpoint").exists() == (function == "save_checkpoint")
    assert (tmp_path / "stages" / "1-t2i").exists() == (function != "finish_vae")
    assert trained(short, tmp_path).checkpoint.exists()


def test_crashed_and_resumed_equals_uninterrupted(
    runs: Any, recipe: Recipe, whole: Path, tmp_path: Path, before_step: BeforeStep
) -> None:
    """A crash saves nothing: the run goes on from its last regular save, here one step back, to the same end."""

    def crash() -> None:
        raise RuntimeError("power cut")

    before_step((2, 3), crash)
    with pytest.raises(RuntimeError, match="power cut"):
        trained(recipe, tmp_path / "run")
    assert position(tmp_path / "run") == (2, 2)
    trained(recipe, tmp_path / "run")
    runs.assert_same(tmp_path / "run", whole)


def test_a_finished_run_is_only_written_again(runs: Any, recipe: Recipe, whole: Path) -> None:
    before = runs.losses(whole), runs.files(whole, "checkpoint", "state")
    assert trained(recipe, whole).checkpoint == whole / "checkpoint"
    assert runs.losses(whole) == before[0]
    for name, tensors in runs.files(whole, "checkpoint", "state").items():
        assert all(torch.equal(tensor, before[1][name][key]) for key, tensor in tensors.items())


def test_what_does_not_change_the_maths_may_change_on_resume(
    runs: Any, recipe: Recipe, whole: Path, tmp_path: Path, before_step: BeforeStep
) -> None:
    before_step((2, 1), runs.interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path)
    other = recipe.model_copy(update={"save_every": 100, "efficiency": recipe.efficiency.model_copy(
        update={"activation_checkpointing": "blocks", "ema_device": "cpu"})})  # fmt: skip
    trained(other, tmp_path)
    assert runs.losses(tmp_path) == runs.losses(whole)


def test_stages_that_have_not_begun_and_their_data_may_change_and_be_added(
    runs: Any, recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    other_data = {**recipe.data, "other": ViewsData(kind="views")}
    trained(recipe.model_copy(update={"stages": recipe.stages[:1], "data": other_data}), tmp_path)
    trained(recipe, tmp_path)
    runs.assert_same(tmp_path, whole)


def test_a_resumed_run_has_no_new_words(
    runs: Any, recipe: Recipe, tmp_path: Path, before_step: BeforeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step((1, 1), runs.interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path)
    monkeypatch.setattr(DigitsSource, "words", lambda self: ("digit", "a", "b", "c", "d", "e"))
    with pytest.raises(ConfigError, match="begun without the words a, b, c, d and 1 more; train into another --out"):
        trained(recipe, tmp_path)


def test_checkpoint_is_half_size_and_loads(runs: Any, recipe: Recipe, whole: Path) -> None:
    checkpoint = load_checkpoint(whole / "checkpoint")
    assert checkpoint.config.sampling == recipe.sampling.model_copy(update={"stride": 1})
    assert checkpoint.config.model.temporal
    assert {t.dtype for t in load_file(whole / "checkpoint" / "model.safetensors").values()} == {torch.float16}
    [averages] = runs.files(whole, "state").values()
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(tensor, averages[f"ema.model.{name}"].half().float())


def test_every_stage_leaves_a_whole_checkpoint(recipe: Recipe, whole: Path) -> None:
    assert sorted(path.name for path in (whole / "stages").iterdir()) == ["1-t2i", "2-ti2v"]
    first = load_checkpoint(whole / "stages" / "1-t2i")
    assert not first.config.model.temporal
    last, final = load_checkpoint(whole / "stages" / "2-ti2v"), load_checkpoint(whole / "checkpoint")
    for name, tensor in last.model.state_dict().items():
        assert torch.equal(tensor.half().float(), final.model.state_dict()[name])
    assert all(torch.equal(tensor, final.vae.state_dict()[name].float()) or tensor.half().float().equal(
        final.vae.state_dict()[name]) for name, tensor in first.vae.state_dict().items())  # fmt: skip


def test_state_of_another_recipe_is_refused_by_what_differs(recipe: Recipe, whole: Path) -> None:
    other = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"name": "adafactor"})})
    wanted = (
        "belongs to another recipe; choose another --out or delete it (optimizer.name is adamw there, adafactor here)"
    )
    with pytest.raises(CheckpointError, match=re.escape(wanted)):
        trained(other, whole)
    stages = (recipe.stages[0].model_copy(update={"steps": 7}), *recipe.stages[1:])
    with pytest.raises(CheckpointError, match=r"stages\.0\.steps is 5 there, 7 here"):
        trained(recipe.model_copy(update={"stages": stages}), whole)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_divergence_keeps_the_last_good_state(
    runs: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    real, calls = step_module.training_loss, []

    def poisoned(model: Any, *arguments: Any) -> torch.Tensor:
        loss = real(model, *arguments)
        calls.append(0)
        if len(calls) != 4:
            return loss
        if poison == "loss":
            return loss * torch.tensor([1.0, torch.nan, 1.0, 1.0])
        return loss + (model.head.out.bias * 0).square().sum().sqrt()  # a root of zero: its slope is not finite

    monkeypatch.setattr(step_module, "training_loss", poisoned)
    name = "loss" if poison == "loss" else "gradient norm"
    message = (
        rf"^{name} is (nan|inf) at step 3 of stage 1 \(1-t2i\) for digit \w+ \(step 3, sample {int(poison == 'loss')}\)"
    )
    with pytest.raises(DivergedError, match=message) as caught:
        trained(recipe, tmp_path)
    assert caught.value.exit_code == 2
    assert "the last saved state is kept" in str(caught.value)
    assert ("sample 2" in str(caught.value)) == (poison == "gradient")  # only the bad samples, or all of them
    assert position(tmp_path) == (1, 2)
    assert all(
        tensor.isfinite().all() for tensors in runs.files(tmp_path, "state").values() for tensor in tensors.values()
    )


def test_a_last_step_that_diverges_leaves_no_checkpoint_and_no_state_of_it(recipe: Recipe, tmp_path: Path) -> None:
    """Its loss is that of the weights before it, and no later step sees the others."""
    stage = recipe.stages[0].model_copy(update={"steps": 1, "learning_rate": 1e39})
    wanted = r"^the weights of stage 1 \(1-t2i\) are not finite after step 0; .* Lower learning_rate"
    with pytest.raises(DivergedError, match=wanted):
        trained(recipe.model_copy(update={"stages": (stage,)}), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert position(tmp_path / "run") == (0, 2)


def test_a_vae_whose_last_step_diverges_is_not_kept(recipe: Recipe, tmp_path: Path) -> None:
    vae = recipe.vae.model_copy(update={"steps": 1, "learning_rate": 3e37})
    with pytest.raises(CheckpointError, match=r"^the trained VAE as float32: NaN or infinity in shift"):
        trained(recipe.model_copy(update={"vae": vae}), tmp_path / "run")
    assert not (tmp_path / "run" / "vae.safetensors").exists()


def test_a_vae_that_diverges_is_named(recipe: Recipe, tmp_path: Path) -> None:
    vae = recipe.vae.model_copy(update={"learning_rate": 1e30, "steps": 4})
    with pytest.raises(DivergedError, match=r"the VAE's loss is (nan|inf) at step 1; .* Lower vae\.learning_rate"):
        trained(recipe.model_copy(update={"vae": vae}), tmp_path)


def test_a_vae_cannot_be_trained_on_latents() -> None:
    batch = Batch(latents=torch.zeros(1, 1, 4, 8, 8), captions=["a"], micro=torch.ones(1, 6), names=["a"])
    with pytest.raises(ConfigError, match=r"pre-computed latents: name the frozen VAE that they are from in \[vae\]"):
        frames_of(batch)


@pytest.mark.slow
def test_loss_falls(runs: Any, recipe: Recipe, tmp_path: Path) -> None:
    """The start predicts zero, so its loss is E|data - noise|^2 = 2 for standardized latents; learning lowers it."""
    vae = recipe.vae.model_copy(update={"steps": 60})
    stage = recipe.stages[0].model_copy(update={"steps": 100, "batch": 16, "learning_rate": 1e-2, "warmup": 10})
    trained(recipe.model_copy(update={"stages": (stage,), "vae": vae, "save_every": 1000}), tmp_path)
    found = runs.losses(tmp_path)
    assert found[1, 0] == pytest.approx(2, rel=0.2)
    assert sum(found[1, step] for step in range(80, 100)) / 20 < 0.75 * found[1, 0]


def test_the_text_of_a_frozen_encoder_and_a_frozen_vae(runs: Any, recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """Components of an earlier run: no VAE is trained, and neither of them changes."""
    from_there = {"kind": "checkpoint", "path": whole / "stages" / "2-ti2v"}
    frozen = recipe.model_copy(update={"vae": FrozenVae(**from_there), "text": FrozenText(**from_there)})
    trained(frozen, tmp_path)
    assert {stage for stage, _ in runs.losses(tmp_path)} == {1, 2}
    made, origin = load_checkpoint(tmp_path / "stages" / "2-ti2v"), load_checkpoint(whole / "stages" / "2-ti2v")
    for part in ("vae", "text_encoder"):
        wanted = getattr(origin, part).state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in getattr(made, part).state_dict().items())
    shutil.rmtree(tmp_path / "checkpoint")
    trained(frozen, tmp_path)  # a finished run without a VAE of its own can be opened again
    assert (tmp_path / "checkpoint").exists()


def test_bad_origins_stop_before_training(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    def starting_from(**changes: Any) -> Recipe:
        stages = (recipe.stages[0], recipe.stages[1].model_copy(update=changes))
        return recipe.model_copy(update={"stages": stages})

    image_model = str(whole / "stages" / "1-t2i")
    with pytest.raises(CheckpointError, match=r"nothing/here: no checkpoint here"):
        trained(starting_from(spatial_from="nothing/here"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="stage 2-ti2v: temporal_from .* is an image model"):
        trained(starting_from(temporal_from=image_model), tmp_path / "run")
    wide = starting_from(spatial_from=image_model)
    wide = wide.model_copy(update={"model": wide.model.model_copy(update={"width": 64})})
    with pytest.raises(
        CheckpointError, match="stage 2-ti2v: spatial_from .*: its width is 32, the stage's model has 64"
    ):
        trained(wide, tmp_path / "run")
    assert not (tmp_path / "run").exists()


CAUSAL = SimpleNamespace(
    latent_channels=4, spatial_factor=4, causal=True, latent_frames=lambda frames: (frames - 1) // 4 + 1
)


def test_a_task_that_is_given_all_latent_frames(recipe: Recipe) -> None:
    """A VAE that codes four frames as one leaves fewer latent frames than the recipe has frames."""
    first, last = recipe.stages
    predict = last.model_copy(update={"task": "predict", "frames": 9, "name": "p"})
    with pytest.raises(ConfigError, match="stage p: task predict needs at least 5 latent frames, 9 frames are 3$"):
        check_vae(recipe.model_copy(update={"stages": (first, predict)}), SimpleNamespace(config=CAUSAL))


def test_what_a_causal_vae_cannot_be_given(recipe: Recipe) -> None:
    """Its latent frame 4 codes what lies before it too, which is not given: only beginnings can be."""
    first, last = recipe.stages
    mix = {"none": 0.2, "first 2": 0.2, "ends": 0.3, "random": 0.3}
    mixed = last.model_copy(update={"task": "mix", "givings": mix, "frames": 17, "name": "m"})
    with pytest.raises(ConfigError, match="stage m: the VAE is causal, .* as 'ends', 'random' would; its givings are"):
        check_vae(recipe.model_copy(update={"stages": (first, mixed)}), SimpleNamespace(config=CAUSAL))
    leading = mixed.model_copy(update={"givings": {"none": 0.5, "first 2": 0.5}})
    sampling = recipe.sampling.model_copy(update={"frames": 9})
    fits = recipe.model_copy(update={"stages": (first, leading), "sampling": sampling})
    check_vae(fits, SimpleNamespace(config=CAUSAL))


def test_components_that_do_not_fit_the_model(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    from_there = {"kind": "checkpoint", "path": whole / "checkpoint"}
    wide = recipe.model.model_copy(update={"text_width": 48})
    with pytest.raises(ConfigError, match="has width 24, the model takes text_width 48; set text_width = 24"):
        trained(recipe.model_copy(update={"model": wide, "text": FrozenText(**from_there)}), tmp_path)
    deep = recipe.model.model_copy(update={"latent_channels": 8})
    with pytest.raises(ConfigError, match="the VAE has 4 latent channels, the model takes 8; set latent_channels = 4"):
        trained(recipe.model_copy(update={"model": deep, "vae": FrozenVae(**from_there)}), tmp_path)
    coarse = recipe.model.model_copy(update={"patch": (1, 3)})
    with pytest.raises(ConfigError, match="stage 1-t2i: resolution 32x32 is not a multiple of 12 pixels"):
        trained(recipe.model_copy(update={"model": coarse, "vae": FrozenVae(**from_there)}), tmp_path)
    long = recipe.model.model_copy(update={"patch": (2, 2)})
    with pytest.raises(ConfigError, match="3 frames are 3 latent frames, not a multiple of the patch 2"):
        trained(recipe.model_copy(update={"model": long, "vae": FrozenVae(**from_there)}), tmp_path)
    small = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"height": 36})})
    with pytest.raises(ConfigError, match=r"\[sampling\] resolution 36x32 is not a multiple of 8 pixels"):
        trained(small.model_copy(update={"vae": FrozenVae(**from_there)}), tmp_path)
    with pytest.raises(ConfigError, match=r"text\.max_tokens is 7, the encoder of .* has 16; leave it out"):
        trained(recipe.model_copy(update={"text": FrozenText(**from_there, max_tokens=7)}), tmp_path)


def test_batches_that_processes_cannot_share(recipe: Recipe) -> None:
    three = Team(rank=0, world=3, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="vae: batch 4 is not divisible by 3 processes; make it a multiple of 3"):
        check(recipe, three)
    fits = recipe.model_copy(update={"vae": recipe.vae.model_copy(update={"batch": 6})})
    with pytest.raises(ConfigError, match="stage 1-t2i: batch 4 is not divisible by 3 processes"):
        check(fits, three)


def test_broken_samples_are_listed(recipe: Recipe, tmp_path: Path) -> None:
    from stiv_deploy.stiv_ref.training import trainer

    opened = trainer.open_source

    def breaking(*arguments: Any) -> Any:
        source = opened(*arguments)
        source.broken = lambda: ["b.mp4: no frames", "a.mp4: truncated"]
        return source

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "open_source", breaking)
        trained(recipe.model_copy(update={"stages": (recipe.stages[0].model_copy(update={"steps": 1}),)}), tmp_path)
    assert (tmp_path / "broken.txt").read_text() == "b.mp4: no frames\na.mp4: truncated\n"


def test_samples_are_drawn_and_change_nothing(runs: Any, recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    drawing = recipe.model_copy(
        update={"logging": recipe.logging.model_copy(update={"sample_every": 4, "sample_count": 2})}
    )
    trained(drawing, tmp_path)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "1-t2i-0000004.png",
        "1-t2i-0000005.png",
        "2-ti2v-0000004.png",
        "2-ti2v-0000005.png",
        "index.png",
    ]
    assert runs.losses(tmp_path) == runs.losses(whole)
