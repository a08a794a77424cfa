"""Skipped blocks of the reference: the line through two residuals, in the model and in the sampling loop."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stiv_deploy.stiv_ref.block import additive_mask
from stiv_deploy.stiv_ref.flow import schedule
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, Solver, sample
from stiv_deploy.stiv_ref.skipping import Skipping
from stiv_deploy.stiv_ref.text import TextStates

ModelFactory = Callable[..., Stiv]
EPS = 2.0**-52


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def line(known: list[tuple[float, Tensor]], time: float) -> Tensor:
    """Newton's form of the line through two residuals."""
    (before_time, before), (last_time, last) = known
    return last + (time - last_time) * (last - before) / (last_time - before_time)


@settings(max_examples=40)
@given(
    times=st.lists(st.integers(0, 99), min_size=3, max_size=6, unique=True).map(
        lambda values: sorted(each / 100 for each in values)
    )
)
def test_it_is_the_line_through_the_last_two_at_any_times(times: list[float]) -> None:
    """Errors of the products and their sum: of some units of 2^-52 of the weights, 1 + 2 ahead at most."""
    skipping, known = Skipping(times[-1:]), []
    for index, time in enumerate(times[:-1]):
        first, last = normal(2, 3, seed=index), normal(2, 3, seed=100 + index)
        skipping.begin(time)
        assert skipping.guess() is None
        skipping.remember(first, last)
        known.append((time, last - first))
    skipping.begin(times[-1])
    guessed, wanted = skipping.guess(), line(known[-2:], times[-1])
    ahead = (times[-1] - times[-2]) / (times[-2] - times[-3])
    assert guessed is not None
    size = max(each.abs().max().item() for _, each in known[-2:])
    torch.testing.assert_close(guessed, wanted, rtol=0, atol=8 * EPS * (1 + 2 * ahead) * size)


def test_residuals_that_change_evenly_are_met_even_several_skips_ahead() -> None:
    """Steps in a row that are skipped lie on one line; no guess is taken for a residual."""
    slope, start = normal(3, seed=1), normal(3, seed=2)
    skipping = Skipping([0.5, 0.9])
    for time in (0.125, 0.25):
        skipping.begin(time)
        skipping.remember(torch.zeros(3, dtype=torch.float64), start + time * slope)
    for time in (0.5, 0.9):
        skipping.begin(time)
        guessed = skipping.guess()
        assert guessed is not None
        torch.testing.assert_close(guessed, start + time * slope, rtol=0, atol=64 * EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residuals_are_kept_as_the_tokens_are_and_guessed_in_single_precision(dtype: torch.dtype) -> None:
    first, last = normal(2, 4, 5).to(dtype), normal(2, 4, 5, seed=1).to(dtype)
    skipping, known = Skipping([0.75]), []
    for time, (one, two) in ((0.25, (first, last)), (0.5, (last, first))):
        skipping.begin(time)
        skipping.remember(one, two)
        known.append((time, (two.double() - one.double()).to(dtype).double()))
    skipping.begin(0.75)
    guessed = skipping.guess()
    assert guessed is not None
    assert guessed.dtype == torch.float32
    assert torch.equal(guessed.double(), line(known, 0.75)), "twice a short number and another one: exact"


class ByHand:
    """The parts of ``model`` called one by one for one text."""

    def __init__(self, model: Stiv, text: TextStates, micro: Tensor) -> None:
        self.model, self.text, self.micro = model, text, micro

    def tokens(self, latents: Tensor, time: float) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens in front of the blocks and behind them, and the condition."""
        model, tables = self.model, self.model.rope_tables(latents.shape)
        timestep = latents.new_full((len(latents),), time)
        first, modulation, condition = model.embed(latents, timestep, self.micro, self.text.pooled, tables)
        text_k, text_v = model.text_kv(self.text.states)
        x = first
        for index, block in enumerate(model.blocks):
            x = block(x, modulation, text_k[index], text_v[index], additive_mask(self.text.mask).double(), tables)
        return first, x, condition

    def velocity(self, latents: Tensor, tokens: Tensor, condition: Tensor) -> Tensor:
        return self.model.unpatchify(self.model.head(tokens, condition), latents.shape)


def text_of(model: Stiv, batch: int, seed: int) -> TextStates:
    width = model.config.text_width
    mask = torch.ones(batch, 5, dtype=torch.int64)
    return TextStates(normal(batch, 5, width, seed=seed), mask, normal(batch, width, seed=seed + 1))


def test_the_model_skips_its_blocks_alone(random_model: ModelFactory) -> None:
    model, micro = random_model(), torch.ones(2, 6, dtype=torch.float64)
    hand = ByHand(model, text_of(model, 2, 5), micro)
    skipping, known = Skipping([0.7]), []
    for seed, time in enumerate((0.2, 0.35)):
        latents = normal(2, 3, 4, 4, 6, seed=seed)
        timestep = latents.new_full((2,), time)
        skipping.begin(time)
        found = model(latents, timestep, micro, *hand.text, skipping=skipping)
        assert torch.equal(found, model(latents, timestep, micro, *hand.text)), "it only listens"
        first, last, _ = hand.tokens(latents, time)
        known.append((time, last - first))
    latents = normal(2, 3, 4, 4, 6, seed=9)
    skipping.begin(0.7)
    found = model(latents, latents.new_full((2,), 0.7), micro, *hand.text, skipping=skipping)
    first, last, condition = hand.tokens(latents, 0.7)
    wanted = hand.velocity(latents, first + line(known, 0.7), condition)
    # A sum of a few products in front of a norm and two linears of width 16: far below 1e-12 of values near 1.
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert (found - hand.velocity(latents, last, condition)).abs().max() > 1e-3


@pytest.mark.parametrize("mode", [GuidanceMode.NONE, GuidanceMode.JIT])
def test_a_run_with_skipped_steps_is_its_definition(random_model: ModelFactory, mode: GuidanceMode) -> None:
    """Euler's steps, each guidance branch along its own residuals."""
    model, micro = random_model(), torch.ones(1, 6, dtype=torch.float64)
    texts = [text_of(model, 1, 5), text_of(model, 1, 15)][: 1 + (mode is GuidanceMode.JIT)]
    noise, none = 0.5 * normal(1, 2, 4, 4, 4), torch.zeros(1, 2, dtype=torch.bool)
    skipped, scale, times = (2, 4, 5), 2.5, schedule(7, 2.0, 1.0).tolist()
    hands: list[tuple[ByHand, list[tuple[float, Tensor]]]] = [(ByHand(model, text, micro), []) for text in texts]
    latents = noise
    for step, (time, following) in enumerate(pairwise(times)):
        branches = []
        for hand, known in hands:
            first, last, condition = hand.tokens(latents, time)
            if step in skipped:
                last = first + line(known[-2:], time)
            else:
                known.append((time, last - first))
            branches.append(hand.velocity(latents, last, condition))
        guided = branches[0] if len(branches) == 1 else branches[1] + scale * (branches[0] - branches[1])
        latents = latents + (following - time) * guided
    inputs = SamplingInputs(noise, torch.zeros_like(noise), none, texts[0], texts[-1], micro)
    values: dict[str, Any] = {"steps": 7, "guidance_mode": mode, "guidance_scale": scale, "time_shift": 2.0}
    settings = SamplingSettings(**values, renorm=False, solver=Solver.EULER, skipped_steps=skipped)
    found = sample(model, inputs, settings)
    torch.testing.assert_close(found, latents, rtol=1e-10, atol=1e-10)
    without = sample(model, inputs, SamplingSettings(**values, renorm=False, solver=Solver.EULER))
    assert (found - without).abs().max() > 1e-3
