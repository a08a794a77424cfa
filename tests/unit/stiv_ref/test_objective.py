"""The training objective: draws that depend on the sample alone, given frames, masked tokens, dropped text."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stiv_deploy.stiv_ref.conditioning import replace_frames
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.objective import (
    Draws,
    Objective,
    draw,
    drop_text,
    kept_tokens,
    sample_generator,
    token_weights,
    training_loss,
)
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, guided_velocity
from stiv_deploy.stiv_ref.tasks import TaskName
from stiv_deploy.stiv_ref.text import TextStates

ModelFactory = Callable[..., Stiv]
SHAPE = (3, 4, 4, 6)  # T, C, h, w
TOKENS = 6


def draws_of(objective: Objective, samples: range, step: int = 0) -> Draws:
    return draw(objective, SHAPE, TOKENS, [sample_generator(7, 1, step, index) for index in samples])


def text_of(batch: int, seed: int = 0) -> TextStates:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, 5, 12, generator=generator, dtype=torch.float64)
    return TextStates(states, torch.ones(batch, 5, dtype=torch.int64), states.mean(1))


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_draws_do_not_depend_on_how_the_batch_is_cut(mask_ratio: float) -> None:
    """One process, two processes, micro-batches: sample 5 is sample 5."""
    objective = Objective(task="ti2v", mask_ratio=mask_ratio)
    whole = draws_of(objective, range(8))
    parts = [draws_of(objective, range(0, 3)), draws_of(objective, range(3, 8))]
    for name in ("timestep", "noise", "given", "zeroed", "drop_text", *(["keep"] if mask_ratio else [])):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    assert (whole.keep is None) == (mask_ratio == 0)


def test_draws_differ_by_seed_stage_step_and_sample() -> None:
    seeds = [(0, 1, 0, 0), (1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (1, 0, 0, 0)]
    values = {torch.rand(1, generator=sample_generator(*seed)).item() for seed in seeds}
    assert len(values) == len(seeds)


@pytest.mark.parametrize("task", ["t2i", "t2v"])
def test_tasks_without_image_are_given_no_frame(task: str) -> None:
    draws = draws_of(Objective(task=task, text_dropout=0.3), range(200))
    assert not draws.given.any()
    assert draws.drop_text.float().mean().item() == pytest.approx(0.3, abs=0.13)  # 4 sigma of 200 draws


def test_image_to_video_is_given_the_first_frame_and_loses_images_and_texts_at_their_rates() -> None:
    objective = Objective(task="ti2v", text_dropout=0.2, image_dropout=0.3, joint_dropout=0.5)
    draws = draws_of(objective, range(2000))
    lost = ~draws.given[:, 0]
    assert not draws.given[:, 1:].any()
    four_sigma = 4 * (0.25 / 2000) ** 0.5
    assert lost.float().mean().item() == pytest.approx(0.3, abs=four_sigma)
    assert draws.drop_text.float().mean().item() == pytest.approx(0.2, abs=four_sigma)
    assert (lost & draws.drop_text).float().mean().item() > 0.15 - four_sigma


def test_by_default_image_and_text_are_dropped_independently_at_the_papers_rates() -> None:
    objective = Objective(task="ti2v")
    assert (objective.text_dropout, objective.image_dropout) == (0.1, 0.08)
    draws = draws_of(objective.model_copy(update={"text_dropout": 0.4, "image_dropout": 0.3}), range(4000))
    lost = ~draws.given[:, 0]
    for images in (lost, ~lost):
        share = draws.drop_text[images].float().mean().item()
        assert share == pytest.approx(0.4, abs=5 * (0.24 / images.sum().item()) ** 0.5)


@pytest.mark.parametrize(("task", "shown"), [("predict", [1, 1, 1]), ("interpolate", [1, 0, 1])])
def test_other_tasks_are_given_their_frames_together(task: str, shown: list[int]) -> None:
    draws = draws_of(Objective(task=task, text_dropout=0.2, image_dropout=0.3), range(50))
    patterns = {tuple(row) for row in draws.given.int().tolist()}
    assert patterns == {(0, 0, 0), tuple(shown)}


def test_a_mix_gives_each_its_share_and_dropout_takes_all_of_a_samples_frames() -> None:
    shares = {"none": 0.4, "first": 0.3, "ends": 0.3}
    objective = Objective(givings=shares, text_dropout=0.2, image_dropout=0.3)
    count = 2_000
    patterns = Counter(tuple(row) for row in draws_of(objective, range(count)).given.int().tolist())
    wanted = {(0, 0, 0): 0.4 + 0.6 * 0.3, (1, 0, 0): 0.3 * 0.7, (1, 0, 1): 0.3 * 0.7}
    assert set(patterns) == set(wanted)
    for pattern, share in wanted.items():
        assert abs(patterns[pattern] / count - share) <= 5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_what_is_given_is_drawn_last(mask_ratio: float) -> None:
    """So that a recipe with a mix has the times, noise, texts and masks that it had with one giving."""
    single, mixed = (
        draws_of(Objective.model_validate({**which, "mask_ratio": mask_ratio}), range(8))
        for which in ({"task": "ti2v"}, {"givings": {"first": 0.5, "random": 0.5}})
    )
    for name in ("timestep", "noise", "drop_text", *(["keep"] if mask_ratio else [])):
        assert torch.equal(getattr(single, name), getattr(mixed, name)), name
    assert not torch.equal(single.given, mixed.given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"give a task \(t2i, t2v, .*all\), or givings with the share of each"),
        ({"task": "mix"}, "or givings with the share of each"),
        ({"task": "ti2v", "givings": {"first": 1.0}}, "task ti2v has givings of its own; take out task, or givings"),
    ],
)
def test_a_task_or_a_mix(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Objective.model_validate(values)


@pytest.mark.parametrize("name", ["first", "ends", "random"])
def test_loss_leaves_out_what_is_given_of_each_sample(
    random_model: ModelFactory, latents: torch.Tensor, name: str
) -> None:
    """Against the formula written out, sample by sample, since every sample is given other frames."""
    model, draws = random_model(), draws_of(Objective(givings={"none": 0.5, name: 0.5}, image_dropout=0), range(2))
    t = draws.timestep.double()[:, None, None, None, None]
    noised = t * latents + (1 - t) * draws.noise.double()
    noised[draws.given] = latents[draws.given]
    velocity = model(noised, draws.timestep.double(), torch.ones(2, 6), *text_of(2))
    error = (velocity - (latents - draws.noise.double())).square()
    wanted = [error[sample][~draws.given[sample]].mean() for sample in range(2)]
    torch.testing.assert_close(loss_of(model, latents, draws), torch.stack(wanted).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("task", ["ti2v", "predict", "interpolate", "views"])
def test_what_dropout_shows_is_what_the_unconditional_branch_of_generation_sees(
    latents: torch.Tensor, task: Any
) -> None:
    """At the given frames of the same clip, noise and time."""
    objective = Objective(task=task, image_dropout=1)
    draws = draws_of(objective, range(2))
    draws = replace(draws, timestep=torch.full((2,), 0.25).double(), noise=draws.noise.double())
    model = Seeing()
    training_loss(model, latents, text_of(2), torch.ones(2, 6), draws)  # type: ignore[arg-type]
    mask = objective.kind.shown(0, SHAPE[0]).repeat(2, 1)
    inputs = SamplingInputs(draws.noise, latents, mask, text_of(2), text_of(2), torch.ones(2, 6))
    settings = SamplingSettings(unseen=objective.kind.unseen)
    guided_velocity(model, inputs, settings)(replace_frames(draws.noise, latents, mask), 0.25, 1.0)  # type: ignore[arg-type]
    trained, sampled = model.seen[0], model.seen[1].chunk(2)
    (blind,) = [each for each in sampled if not torch.equal(each[mask], latents[mask])]
    assert torch.equal(trained[mask], blind[mask])
    assert bool(trained[mask].any()) == (task != "views")


class Seeing:
    """A model that keeps what it is shown, and answers with it."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.config = SimpleNamespace(student=None)

    def text_kv(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def __call__(self, latents: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.seen.append(latents)
        return latents


def test_a_view_that_is_dropped_is_out_of_the_loss(random_model: ModelFactory, latents: torch.Tensor) -> None:
    draws = draws_of(Objective(task="views", image_dropout=0.5), range(16))
    assert torch.equal(draws.given[:, 0], ~draws.zeroed[:, 0])
    assert 0 < draws.zeroed[:, 0].sum() < 16
    assert not (draws.given | draws.zeroed)[:, 1:].any()
    lost = draws_of(Objective(task="views", image_dropout=1), range(2))
    other = latents.clone()
    other[:, 0] += 1
    model = random_model()
    assert torch.equal(loss_of(model, latents, lost), loss_of(model, other, lost))


@given(tokens=st.integers(1, 64), ratio=st.floats(0, 0.99))
def test_kept_tokens_are_distinct_sorted_and_as_many_as_asked(tokens: int, ratio: float) -> None:
    count = kept_tokens(tokens, ratio)
    assert 1 <= count <= tokens
    assert abs(count - tokens * (1 - ratio)) <= 0.5 or count == 1
    if ratio:
        keep = draw(Objective(task="t2v", mask_ratio=ratio), SHAPE, tokens, [sample_generator(0, 1, 0, 0)]).keep
        assert keep is not None
        assert keep.shape == (1, count)
        assert (keep.diff() > 0).all()


def test_weights_of_kept_and_masked_tokens() -> None:
    weights = token_weights(torch.tensor([[0, 2], [1, 3]]), 4, 0.25)
    assert weights.tolist() == [[1, 0.25, 1, 0.25], [0.25, 1, 0.25, 1]]


def test_dropped_texts_are_the_null_text() -> None:
    text, null = text_of(3), text_of(1, seed=1)
    null = null._replace(mask=torch.tensor([[1, 0, 0, 0, 0]]))
    got = drop_text(text, null, torch.tensor([False, True, False]))
    for name in ("states", "mask", "pooled"):
        value = getattr(got, name)
        assert torch.equal(value[[0, 2]], getattr(text, name)[[0, 2]])
        assert torch.equal(value[1], getattr(null, name)[0])


def loss_of(model: Stiv, latents: torch.Tensor, draws: Draws, weight: float = 0.1) -> torch.Tensor:
    double = replace(draws, timestep=draws.timestep.double(), noise=draws.noise.double())
    batch = len(latents)
    return training_loss(model, latents, text_of(batch), torch.ones(batch, 6), double, weight)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_loss_is_the_error_of_the_velocity(random_model: ModelFactory, latents: torch.Tensor) -> None:
    """Against the formulas written out: x_t, v, mean over what is not given."""
    model, draws = random_model(), draws_of(Objective(task="ti2v", image_dropout=0.0, joint_dropout=0.0), range(2))
    t = draws.timestep.double()[:, None, None, None, None]
    noised = t * latents + (1 - t) * draws.noise.double()
    noised[:, 0] = latents[:, 0]
    velocity = model(noised, draws.timestep.double(), torch.ones(2, 6), *text_of(2))
    wanted = (velocity - (latents - draws.noise.double()))[:, 1:].square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(loss_of(model, latents, draws), wanted.float(), rtol=1e-6, atol=0)


def test_masked_loss_weighs_tokens(random_model: ModelFactory, latents: torch.Tensor) -> None:
    """The loss is linear in the weight of masked tokens up to its normalization: (a + w b) / (k + w m)."""
    model = random_model(blocks=3, full_blocks=2)
    draws = draws_of(Objective(task="t2v", mask_ratio=0.5), range(2))
    kept_only, all_equal = (loss_of(model, latents, draws, weight).double() for weight in (0.0, 1.0))
    masked_only = 2 * all_equal - kept_only  # 3 of 6 tokens are masked
    wanted = (kept_only + 0.1 * masked_only) / 1.1
    torch.testing.assert_close(loss_of(model, latents, draws, 0.1).double(), wanted, rtol=1e-6, atol=0)


def test_what_masked_tokens_hold_has_no_influence_on_the_kept(
    random_model: ModelFactory, latents: torch.Tensor
) -> None:
    model = random_model(blocks=3, full_blocks=2)
    keep = torch.tensor([[0, 2, 5], [0, 2, 5]])
    inputs = (torch.tensor([0.2, 0.6]).double(), torch.ones(2, 6), *text_of(2))
    tokens = model.patchify(latents)
    tokens[:, :, [1, 3, 4]] += 1
    changed = model.unpatchify(tokens, latents.shape)
    assert torch.equal(model(latents, *inputs, keep=keep), model(changed, *inputs, keep=keep))
    assert not torch.equal(model(latents, *inputs), model(changed, *inputs))


def test_keeping_all_tokens_is_not_masking(random_model: ModelFactory, latents: torch.Tensor) -> None:
    model = random_model(blocks=3, full_blocks=1)
    inputs = (torch.tensor([0.2, 0.6]).double(), torch.ones(2, 6), *text_of(2))
    everything = torch.arange(TOKENS).expand(2, -1)
    torch.testing.assert_close(model(latents, *inputs, keep=everything), model(latents, *inputs))


def test_masks_need_full_blocks(random_model: ModelFactory, latents: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="full_blocks"):
        loss_of(random_model(), latents, draws_of(Objective(task="t2v", mask_ratio=0.5), range(2)))


def test_a_sample_may_have_a_task_of_its_own() -> None:
    objective = Objective(task="predict", image_dropout=0.5)
    tasks: list[TaskName | None] = ["views", None] * 16
    draws = draw(objective, (6, 2, 2, 2), 4, [sample_generator(0, 1, 0, index) for index in range(32)], tasks)
    given, zeroed = draws.given[:, :5].long().sum(1), draws.zeroed.long().sum(1)
    assert set((given + zeroed)[::2].tolist()) == {1}
    assert set(zeroed[::2].tolist()) == {0, 1}
    assert set(given[1::2].tolist()) == {0, 4}
    assert not zeroed[1::2].any()
