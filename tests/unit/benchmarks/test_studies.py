"""The studies' own parts: draws, training loop, variants, measurements and records, each against what must hold."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from stiv_deploy.stiv_ref.digit_canvas import SIZE
from stiv_deploy.stiv_ref.errors import DivergedError, StivRefError
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.initialization import is_temporal
from stiv_deploy.stiv_ref.objective import Objective
from stiv_deploy.stiv_ref.sampler import SamplingSettings
from stiv_deploy.stiv_ref.text import TextStates

ALL = (
    "image_conditioning",
    "guidance_modes",
    "motion_staleness",
    "progressive",
    "causal_time",
    "cfg_renorm",
    "residual_skip",
    "fitted_weights",
)
WITH_CONFLICTS = ("image_conditioning", "guidance_modes")
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def harness(study: Load) -> ModuleType:
    return study("harness")


@pytest.fixture(scope="module")
def evaluation(study: Load) -> ModuleType:
    return study("evaluation")


@pytest.fixture(scope="module")
def frozen(harness: ModuleType) -> object:
    return harness.frozen_parts()


@pytest.fixture(scope="module")
def world(harness: ModuleType) -> object:
    return harness.frozen_parts("world")


@pytest.fixture(scope="module")
def digits(frozen: object) -> object:
    return frozen.ground


def tiny_training(harness: ModuleType, steps: int = 3) -> object:
    return harness.Training(phases=(harness.video("ti2v", steps, batch=2),), stage=9, warmup=1)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


# Training loop


def test_captions_are_encoded_as_the_encoder_does(frozen: object, world: object) -> None:
    from stiv_deploy.stiv_ref.checkpoint import load_checkpoint
    from stiv_deploy.stiv_ref.text import tokenize

    longest = ((frozen, "digit two moving up"), (world, "the small magenta triangle is going back and forth"))
    for parts, prompt in longest:
        checkpoint = load_checkpoint(parts.ground.checkpoint)
        prompts = ["", prompt, "digit seven", prompt]
        truth = checkpoint.text_encoder(*tokenize(checkpoint.tokenizer, prompts))
        found = parts.text(prompts)
        length = found.mask.shape[1]
        torch.testing.assert_close(found.states, truth.states[:, :length])
        torch.testing.assert_close(found.pooled, truth.pooled)
        assert truth.mask[:, length:].sum() == 0
        assert truth.mask.sum(1).max() <= length
    assert len(frozen.ground.captions()) == 51


def test_training_is_fixed_by_its_seed(digits: object, harness: ModuleType, frozen: object) -> None:
    training = tiny_training(harness, steps=2)
    runs = []
    for seed in (0, 0, 1):
        model = harness.mini(digits, seed=0)
        runs.append((harness.train(model, training, frozen, seed), weights(model)))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)
    assert runs[0][0] != runs[2][0]


def test_training_lowers_the_loss(digits: object, harness: ModuleType, frozen: object) -> None:
    training = harness.Training(phases=(harness.t2i(25, batch=8),), stage=9, warmup=5)
    losses = harness.train(harness.mini(digits, temporal=False), training, frozen, 0)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_observer_sees_averaged_weights_and_leaves_no_trace(
    digits: object, harness: ModuleType, frozen: object
) -> None:
    training, seen, finals = tiny_training(harness), [], []
    for observed in (True, False):
        model = harness.mini(digits)
        options = {"observe": lambda step, model=model: seen.append((step, weights(model))), "every": 2}
        harness.train(model, training, frozen, 0, **(options if observed else {}))
        finals.append(weights(model))
    assert [step for step, _ in seen] == [0, 2, 3]
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=0)
    torch.testing.assert_close(seen[-1][1], finals[0], rtol=0, atol=0)


def test_divergence_is_an_error(digits: object, harness: ModuleType, frozen: object) -> None:
    model = harness.mini(digits)
    torch.nn.init.constant_(model.head.out.weight, float("nan"))
    with pytest.raises(DivergedError, match="loss is nan at step 0"):
        harness.train(model, tiny_training(harness), frozen, 0)


def test_learning_rate(harness: ModuleType) -> None:
    training = harness.Training(phases=(harness.t2i(60), harness.t2i(40)), stage=1, learning_rate=1.0, warmup=10)
    rates = [training.rate(step) for step in range(training.steps)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.05)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)


def test_compute_is_counted_in_tokens(harness: ModuleType) -> None:
    assert harness.video("t2v", 3, batch=2).cost == 3 * 2 * 8 * 16
    assert harness.video("t2v", 3, batch=2, size=48).cost == 3 * 2 * 8 * 36
    assert harness.t2i(3, batch=2).cost == pytest.approx(0.8 * 3 * 2 * 16)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 1.0])
def test_dropouts_are_possible(harness: ModuleType, dropout: float) -> None:
    objective = harness.video("ti2v", 1, image_dropout=dropout).objective
    assert objective.joint_dropout * objective.image_dropout <= objective.text_dropout


def test_carry_over_splits_space_and_time(digits: object, harness: ModuleType) -> None:
    image, low, model = (
        harness.mini(digits, temporal=False, seed=1),
        harness.mini(digits, seed=2),
        harness.mini(digits, seed=3),
    )
    harness.carry_over(image.state_dict(), model)
    harness.carry_over(low.state_dict(), model, only=is_temporal)
    for name, value in model.state_dict().items():
        source = low if is_temporal(name) else image
        torch.testing.assert_close(value, source.state_dict()[name], rtol=0, atol=0)
    assert any(is_temporal(name) for name in model.state_dict())
    assert not any(is_temporal(name) for name in image.state_dict())


# Variants


def inputs_of(batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 8, 4, 8, 8, generator=generator)
    text = torch.randn(batch, 5, 96, generator=generator)
    return latents, torch.full((batch,), 0.3), torch.zeros(batch, 6), text, torch.ones(batch, 5).long(), text.mean(1)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Zero-initialized gates and outputs would hide what a variant does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def test_causal_attention_sees_no_later_frame(digits: object, harness: ModuleType, study: Load) -> None:
    causal = study("variants").CausalStiv
    for build, blind in ((causal, True), (None, False)):
        model = randomized(harness.mini(digits, build=build) if build else harness.mini(digits))
        latents, *rest = inputs_of()
        changed = latents.clone()
        changed[:, 5:] += 1
        with torch.no_grad():
            difference = (model(latents, *rest) - model(changed, *rest)).abs().amax(dim=(0, 2, 3, 4))
        assert (bool((difference[:5] == 0).all())) is blind
        assert (difference[5:] > 0).all()


def test_causal_attention_is_full_attention_for_the_last_frame(study: Load) -> None:
    from stiv_deploy.stiv_ref.block import SelfAttention

    attention = study("variants").CausalAttention(24, 2)
    full = SelfAttention(24, 2)
    full.load_state_dict(attention.state_dict())
    x, angle = torch.randn(3, 6, 24), torch.randn(6, 6)
    found, truth = (module(x, angle.cos(), angle.sin()) for module in (attention, full))
    torch.testing.assert_close(found[:, -1], truth[:, -1])
    assert not torch.allclose(found[:, 0], truth[:, 0])


@pytest.mark.parametrize("name", ["ImageCrossStiv", "LargeImageCrossStiv"])
def test_image_tokens_reach_the_output_only_if_seen(
    digits: object, harness: ModuleType, study: Load, name: str
) -> None:
    variants = study("variants")
    model = randomized(harness.mini(digits, build=getattr(variants, name)))
    latents, timestep, micro, *text = inputs_of()
    states = TextStates(*text)
    clean = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    given = torch.zeros(2, 8, dtype=torch.bool)
    given[0, 0] = True
    with torch.no_grad():
        outputs = []
        for image in (clean, clean + 1):
            shown, replaced = variants.by_cross_attention(model, states, image, given)
            assert not replaced.any()
            outputs.append(model(latents, timestep, micro, *shown))
        without = model(latents, timestep, micro, *states)
    assert not torch.allclose(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=0, atol=0)
    torch.testing.assert_close(outputs[0][1], without[1])


def test_image_tokens_are_the_patches_and_their_places(study: Load, harness: ModuleType) -> None:
    tokens = study("variants").ImageTokens(harness.MINI, large=False)
    latents = torch.randn(1, 4, 8, 8)
    found = tokens(latents)
    assert found.shape == (1, 16, 96)
    swapped = latents.clone()
    swapped[..., :2, :2], swapped[..., :2, 2:4] = latents[..., :2, 2:4], latents[..., :2, :2]
    other = tokens(swapped)
    torch.testing.assert_close(other[:, 2:], found[:, 2:])
    assert not torch.allclose(other[:, :2], found[:, [1, 0]])  # a patch is told where it is


# Measurements


def test_scores_of_real_digits(digits: object) -> None:
    for size in (SIZE, 48):
        clips = digits.clips(20, 0, digits.shape._replace(size=size))
        video = clips.video.numpy()
        found = clips.scores(video, image=True)
        assert found["digit"] >= 95
        assert found["direction"] == 100
        assert found["motion"] == pytest.approx(100, abs=1)
        assert (found["stale"], found["empty"]) == (0, 0)
        assert min(found["psnr"]) > 100
        assert np.all(np.diff(found["psnr_to_first"][:4]) < 0)
        assert np.mean(clips.right(video)) == pytest.approx(found["both"] / 100, abs=1e-6)


def test_a_still_is_stale_and_darkness_empty(digits: object) -> None:
    clips = digits.clips(4, 0, digits.shape)
    still = np.repeat(clips.video.numpy()[:, :1], 8, axis=1)
    found = clips.scores(still, image=True)
    assert (found["stale"], found["motion"]) == (100, pytest.approx(0, abs=1e-6))
    assert min(found["psnr_to_first"]) > 100
    dark = clips.scores(np.full_like(still, -1), image=False)
    assert (dark["empty"], dark["motion"]) == (100, 0)


def test_half_speed_is_fifty_percent(digits: object) -> None:
    clips = digits.clips(3, 0, digits.shape)
    slow = clips.video.numpy()[:, [0, 0, 1, 1, 2, 2, 3, 3]]
    assert clips.scores(slow, image=False)["motion"] == pytest.approx(50, abs=4)


def test_scores_in_the_world(world: object) -> None:
    """Of true clips all is right but that they differ in speed; of repeated first frames all but their motion is."""
    ground = world.ground
    for shape in (ground.shape, ground.shipped):
        clips = ground.clips(10, 1, shape)
        video = clips.video.numpy()
        assert video.shape == (10, shape.frames, 3, shape.size, shape.size)
        moving = [clip.scene.track.motion != "stay" for clip in clips.truth]
        real = clips.scores(video, image=True)
        assert {real[key] for key in ground.columns if key != "speed"} == {100}
        assert real["speed"] == pytest.approx(100, abs=1)
        assert min(real["psnr"]) > 100
        assert all(clips.right(video))
        still = np.repeat(video[:, :1], shape.frames, axis=1)
        found = clips.scores(still, image=False)
        assert (found["stale"], found["speed"]) == (100, pytest.approx(0, abs=1e-6))
        assert (found["colour"], found["smooth"]) == (100, 100)
        assert found["motion"] == pytest.approx(100 * (1 - np.mean(moving)))
        assert [not right for right in clips.right(still)] == moving


def test_held_out_clips_of_the_world_tell_their_motion_and_differ_by_seed(world: object) -> None:
    ground = world.ground
    found = [clip for seed in (0, 1) for clip in ground.clips(12, seed, ground.shape).truth]
    assert len({clip.index for clip in found}) == 24
    assert all(clip.caption.told.motion for clip in found)


def test_conflicts_are_of_the_world_alone(world: object, digits: object) -> None:
    ground = world.ground
    asked = ground.conflicts(4, 1, ground.shape)
    assert asked.followed(asked.video.numpy()) == {"picture": 100, "words": 0, "neither": 0}
    assert asked.captions != [each.clip.caption.text for each in asked.found]
    assert digits.conflicts(4, 1, digits.shape) is None


def test_both_grounds_draw_what_training_takes(world: object, digits: object) -> None:
    for ground in (world.ground, digits):
        for shape in (ground.shape, ground.shape._replace(frames=1)):
            one, again, other = (ground.draw(3, shape, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
            assert one.video.shape == (3, shape.frames, 3, shape.size, shape.size)
            assert -1 <= one.video.min() < one.video.max() <= 1
            assert one.captions == again.captions != other.captions
            assert torch.equal(one.video, again.video)


def test_psnr_by_frame(study: Load) -> None:
    truth = np.zeros((2, 3, 3, 4, 4), np.float32)
    video = truth + np.array([0.02, 0.2, 3.0], np.float32)[None, :, None, None, None]  # the last is clipped to 1
    assert study("fidelity").psnr_by_frame(video, truth) == pytest.approx([40, 20, 10 * np.log10(4)], abs=1e-2)


def test_generated_clips_keep_a_replaced_frame_and_depend_on_seed_alone(
    digits: object, evaluation: ModuleType, harness: ModuleType, frozen: object
) -> None:
    model = randomized(harness.mini(digits)).eval()
    clips = digits.clips(3, 0, digits.shape)
    settings = SamplingSettings(steps=2, guidance_mode=GuidanceMode.JIT, guidance_scale=2.0)
    results = [
        evaluation.generate(model, frozen, clips, settings, evaluation.Trial(clips=3, batch=batch), 4, image=True)
        for batch in (3, 2)
    ]
    with torch.no_grad():
        clean = frozen.vae.encode(clips.video)
    torch.testing.assert_close(results[0][1][:, 0], clean[:, 0], rtol=0, atol=0)
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-4)
    other, _ = evaluation.generate(model, frozen, clips, settings, evaluation.Trial(clips=3), 5, image=True)
    assert abs(other - results[0][0]).max() > 0.01


def test_held_out_loss_of_zero_velocity(
    digits: object, evaluation: ModuleType, harness: ModuleType, frozen: object
) -> None:
    """A fresh model predicts zero: its loss is the mean square of data minus noise, at every time alike."""
    phase = harness.video("t2v", 1)
    found = evaluation.held_out_loss(harness.mini(digits), frozen, phase, clips=4)
    with torch.no_grad():
        latents = frozen.vae.encode(digits.clips(4, 77, digits.shape).video)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(77))
    truth = float((latents - noise).square().mean())
    assert found["by_time"] == pytest.approx([truth] * len(evaluation.LOSS_TIMES), rel=1e-5)
    assert np.mean(found["by_frame"]) == pytest.approx(truth, rel=1e-5)


def test_results_and_parts_of_the_world_are_kept_apart(study: Load, world: object, digits: object) -> None:
    grounds, work = study("grounds"), Path("work")
    assert [grounds.suffixed("name", each) for each in (digits, world.ground)] == ["name", "name-world"]
    assert [grounds.folder_of(each, work) for each in (digits, world.ground)] == [work, work / "world"]


# Records and reports


def test_parts_are_kept_for_the_same_settings_only(study: Load, tmp_path: Path) -> None:
    records, made = study("records"), []

    def make() -> dict[str, int]:
        made.append(1)
        return {"value": len(made)}

    assert records.part(tmp_path, "a", 1, make) == records.part(tmp_path, "a", 1, make) == {"value": 1}
    assert records.part(tmp_path, "a", 2, make) == {"value": 2}
    (tmp_path / "a.json").write_text("{ torn")
    assert records.part(tmp_path, "a", 2, make) == {"value": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_weights_are_kept_whole(study: Load, tmp_path: Path) -> None:
    base, path = study("base"), tmp_path / "deep" / "x.safetensors"

    def fails() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.kept_or_made(path, fails)
    assert not path.exists()
    made = base.kept_or_made(path, lambda: ({"w": torch.ones(2)}, {"seconds": 1.5}))
    kept = base.kept_or_made(path, fails)
    torch.testing.assert_close(made, kept)
    assert base.notes_of(path) == {"seconds": 1.5}


@pytest.mark.parametrize("given", ["", "a", "1,1", "-1", "0,,1"])
def test_bad_seeds(study: Load, given: str) -> None:
    with pytest.raises(StivRefError, match="different whole numbers"):
        study("records").seeds_of(given)


@pytest.mark.parametrize("given", ["", "a", "2,2", "1", "inf", "nan", "2,"])
def test_bad_scales(study: Load, given: str) -> None:
    with pytest.raises(StivRefError, match="different numbers above 1"):
        study("records").scales_of(given)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([5.0, 5.1, 4.9], [1.0, 1.0, 1.1], "clear"),
        ([1.0, 3.0, 9.0], [0.9, 2.0, 1.0], "likely"),
        ([1.0, 2.0, 3.0], [2.0, 1.0, 3.5], "too small to say"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "no difference"),
        ([1.0], [2.0], "one seed"),
    ],
)
def test_verdicts(study: Load, first: list[float], second: list[float], expected: str) -> None:
    assert study("report").verdict(first, second) == expected


def test_guidances_leave_out_what_is_the_same(study: Load) -> None:
    """SIT-CFG with equal scales is JIT-CFG: not run twice."""
    names = [one.name for one in study("guidance_modes").guidances((1.5, 2.0, 4.0))]
    assert names[:4] == ["none", "jit 1.5", "jit 2", "jit 4"]
    pairs = ((1.5, 1), (2, 1), (4, 1), (2, 1.5), (4, 1.5), (2, 4))
    assert names[4:] == [f"sit {text}, image {image}" for text, image in pairs]


def test_arms_of_progressive_spend_the_same(study: Load, digits: object) -> None:
    progressive = study("progressive")
    plan = progressive.plan_on(digits)
    totals = [plan.earlier(name) + plan.last(name).cost for name in progressive.ORDER]
    step = plan.last("scratch").phases[0].step_cost
    assert max(totals) - min(totals) <= step
    assert plan.last("progressive").steps == plan.last_steps


def test_progressive_starts_from_its_sources(
    study: Load, harness: ModuleType, frozen: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    progressive, digits = study("progressive"), frozen.ground
    image, low = harness.mini(digits, temporal=False, seed=1).state_dict(), harness.mini(digits, seed=2).state_dict()
    monkeypatch.setattr(progressive, "image_model", lambda *arguments: image)
    monkeypatch.setattr(progressive, "base", lambda task, *arguments: low)
    plan = progressive.plan_on(digits)
    made = {name: progressive.start(name, 0, frozen, plan, tmp_path).state_dict() for name in progressive.ORDER}
    temporal = [name for name in low if is_temporal(name)]
    torch.testing.assert_close({n: made["progressive"][n] for n in temporal}, {n: low[n] for n in temporal})
    torch.testing.assert_close({n: made["progressive"][n] for n in image}, dict(image))
    mixed = made["progressive, text from T2V"]
    for name, value in mixed.items():
        text = any(part in name for part in ("cross", "text_", "pooled"))
        torch.testing.assert_close(value, (low if text or name in temporal else image)[name], rtol=0, atol=0)
    torch.testing.assert_close(dict(made["whole T2V"]), dict(low))
    torch.testing.assert_close(dict(made["scratch"]), dict(harness.mini(digits, seed=0).state_dict()))


def test_objectives_of_base_and_arms(study: Load, digits: object) -> None:
    base = study("base")
    recipe = base.recipe_on(digits)
    tasks = [phase.objective for training in (recipe.t2i, recipe.t2v) for phase in training.phases]
    assert [one.task for one in tasks] == ["t2i", "t2v", "t2v"]
    assert all(isinstance(one, Objective) for one in tasks)
    arms = study("ti2v").ARMS
    assert arms["no image dropout"].training(digits, 1, 1).phases[0].objective.image_dropout == 0


@pytest.mark.slow
@pytest.mark.parametrize("ground", ["digits", "world"])
def test_smallest_form_of_every_study(study: Load, tmp_path: Path, ground: str) -> None:
    """All, as commands, sharing their bases: result files with every arm, and a second run makes nothing anew."""
    for name in ALL:
        module, app, out = study(name), typer.Typer(), tmp_path / f"{name}.json"
        app.command()(module.main)
        arguments = ["--smallest", "--ground", ground, "--work", str(tmp_path / "work"), "--out", str(out)]
        first = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert first.exit_code == 0, first.output
        found = json.loads(out.read_text())
        assert found["seeds"] == [0]
        assert found["comparisons"]
        assert all(one["verdict"] == "one seed" for one in found["comparisons"])
        text = out.with_suffix(".md").read_text()
        assert ("| neither % |" in text) == (ground == "world" and name in WITH_CONFLICTS)
        assert "**Question.**" in text
        assert out.with_suffix(".png").stat().st_size > 5_000
        for picture in tmp_path.glob(f"{name}*.png"):
            assert picture.name in text
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()}
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()}
