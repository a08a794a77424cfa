"""The study of fitted weights: what guesses stand for, what is fitted to a run, and what runs are compared with."""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stiv_deploy.stiv_ref.flow import schedule
from stiv_deploy.stiv_ref.generation import sampling_inputs
from stiv_deploy.stiv_ref.model import TextKV
from stiv_deploy.stiv_ref.sampler import SamplingSettings, Solver, sample

Load = Callable[[str], ModuleType]
GRID = (4, 1.0, 1.0)
TOLERANCE = 4 * 128 * torch.finfo(torch.float32).eps
"""Latents of size 1 after four steps, in each of which every one of at most 128 numbers of a token is rounded once more
than in the reference; guidance and fitted weights go by differences that are smaller than what they are of."""


@pytest.fixture(scope="module")
def guesses(study: Load) -> ModuleType:
    return study("guesses")


@pytest.fixture(scope="module")
def runs(study: Load) -> ModuleType:
    return study("trials")


@pytest.fixture(scope="module")
def script(study: Load) -> ModuleType:
    return study("fitted_weights")


@pytest.fixture(scope="module")
def trials(study: Load, runs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = study("grounds").ground_of("digits").checkpoint
    return runs.Trials(path, [0, 1], 6, 1.0, tmp_path_factory.mktemp("trials"))


# Guesses


def test_a_model_that_guesses_nothing_is_the_reference(guesses: ModuleType, trials: Any) -> None:
    inputs = sampling_inputs(trials.judging.checkpoint, ["digit three moving left"], [0], None, frames=2)
    settings = SamplingSettings(steps=3, guidance_scale=2.0, solver=Solver.AB2)
    right = sample(trials.model, inputs, settings)
    for model in (guesses.SkippedBlocks(trials.model, (), {}), guesses.ReusedDifference(trials.model, ())):
        torch.testing.assert_close(sample(model, inputs, settings), right, rtol=0, atol=TOLERANCE)
        assert model.done == 3


def test_the_nearest_pair_is_that_of_least_squares(guesses: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    one, two, other = (torch.randn(3, 4, 5, generator=draw) for _ in range(3))
    assert guesses.nearest((one, two), 1.5 * one - 0.5 * two) == pytest.approx((1.5, -0.5), rel=1e-6)
    columns = np.stack([each.numpy().ravel().astype(np.float64) for each in (one, two)], axis=1)
    normal = np.linalg.solve(columns.T @ columns, columns.T @ other.numpy().ravel())
    assert guesses.nearest((one, two), other) == pytest.approx(tuple(normal), rel=1e-6)


def test_known_pairs_take_the_place_of_the_blocks(
    guesses: ModuleType, trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, passed = trials.judging.inputs, []
    through = guesses.through
    monkeypatch.setattr(guesses, "through", lambda *given: passed.append(1) or through(*given))
    settings = SamplingSettings(steps=4, guidance_scale=2.0, solver=Solver.AB2)
    finds = guesses.SkippedBlocks(trials.model, (2,), {})
    found = sample(finds, inputs, settings)
    assert list(finds.pairs) == [2]
    assert len(passed) == 4, "a pair is fitted to what the blocks add"
    knows = guesses.SkippedBlocks(trials.model, (2,), finds.pairs)
    torch.testing.assert_close(sample(knows, inputs, settings), found, rtol=0, atol=0)
    assert len(passed) == 4 + 3
    assert not torch.equal(found, sample(trials.model, inputs, settings))


def test_residuals_on_a_line_have_the_pair_of_a_line(
    guesses: ModuleType, trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, heard = torch.Generator().manual_seed(0), []
    start, slope = torch.randn(2, trials.model.config.width, generator=draw)

    def through(_model: Any, first: Tensor, *_: Any) -> Tensor:
        heard.append(first)
        return first + start + len(heard) * slope

    monkeypatch.setattr(guesses, "through", through)
    model = guesses.SkippedBlocks(trials.model, (2,), {})
    sample(model, trials.judging.inputs, SamplingSettings(steps=3, guidance_scale=2.0))
    # Residuals are what is left of tokens of size 1 to 10 by subtraction: their roundings are a few units of fp32.
    assert model.pairs[2] == pytest.approx((2.0, -1.0), abs=1e-5)


class Sum:
    """Stands for a model: what it gives is the sum of all that it takes, and it counts rows."""

    rows = 0

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        micro: Tensor,
        states: Tensor,
        mask: Tensor,
        pooled: Tensor,
        **more: Any,
    ) -> Tensor:
        self.rows += len(latents)
        text = more["text_kv"]
        own = sum(each.flatten(1).sum(1) for each in (timestep[:, None], micro, states, mask, pooled))
        return latents * (own + (text.k + text.v).sum(dim=(0, 2)))[:, None]


def test_a_reused_difference_is_the_last_one(guesses: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    kv = TextKV(*(torch.rand(2, 4, 3, generator=draw) for _ in range(2)))

    def inputs(time: float) -> tuple[Tensor, ...]:
        return (torch.rand(4, 5, generator=draw), torch.full((4,), time), *(torch.rand(4, 6) for _ in range(4)))

    model = Sum()
    reusing = guesses.ReusedDifference(model, (1,))
    before, now = inputs(0.1), inputs(0.2)
    both = Sum()(*before, text_kv=kv)
    torch.testing.assert_close(reusing(*before, text_kv=kv), both, rtol=0, atol=0)
    found, right = reusing(*now, text_kv=kv), Sum()(*now, text_kv=kv)[:2]
    torch.testing.assert_close(found[:2], right, rtol=0, atol=0)
    torch.testing.assert_close(found[2:], right - (both[:2] - both[2:]))
    assert model.rows == 4 + 2


# Runs and what is fitted to them


def test_what_runs_cost(runs: ModuleType) -> None:
    grid, times = (6, 2.0, 3.0), schedule(6, 2.0, 3.0).tolist()
    whole = runs.Run(grid=grid)
    left_out, skipped, reused = (runs.Run(grid=grid, chosen=(3, 5), how=how) for how in runs.How)
    assert whole.times() == skipped.times() == reused.times() == times
    assert left_out.times() == [times[step] for step in (0, 1, 2, 4, 6)]
    assert [run.evaluations for run in (whole, left_out, skipped, reused)] == [6, 4, 4, 6]
    assert [run.rows for run in (whole, left_out, skipped, reused)] == [12, 8, 8, 10]
    assert len({run.name for run in (whole, left_out, skipped, reused)}) == 4


def test_the_reference_goes_where_a_fit_has_led(runs: ModuleType, trials: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Tensor] = []
    rolled = runs.rolled
    monkeypatch.setattr(runs, "rolled", lambda *given: ended.append(rolled(*given)))
    for how, clips in zip(runs.How, ((), (0, 1), (1,)), strict=True):
        run = runs.Run(grid=GRID, clips=clips, chosen=(2,), how=how)
        fit = trials.fit(run)
        assert len(fit.weights) == len(run.times()) - 2
        assert set(fit.pairs) == ({2} if how is runs.How.SKIPPED else set())
        same = SimpleNamespace(inputs=runs.some(trials.fitting.inputs, clips or (0, 1)))
        with monkeypatch.context() as those_fitted_to:
            those_fitted_to.setattr(trials, "judging", same)
            found = torch.from_numpy(trials.latents(run, fit))
        torch.testing.assert_close(found, ended[-1], rtol=0, atol=TOLERANCE)


def test_some_clips_are_themselves(runs: ModuleType, trials: Any) -> None:
    inputs = trials.fitting.inputs
    found = runs.some(inputs, (1,))
    assert torch.equal(found.noise, inputs.noise[1:])
    assert torch.equal(found.text.states, inputs.text.states[1:])
    np.testing.assert_array_equal(trials.path((1,)).at(1.0), trials.states[-1][1:])


def test_along_an_exact_flow_of_second_order_the_fit_is_ab2(runs: ModuleType) -> None:
    draw = np.random.default_rng(0)
    curve, slope, start = draw.standard_normal((3, 2, 1, 2, 3))
    fine, times = schedule(12, 2.0).tolist(), schedule(5, 1.5).tolist()

    def at(time: float) -> np.ndarray:
        return start + slope * time + curve * time**2

    path = runs.ExactPath(fine, (0, 1))
    for step, time in enumerate(fine[1:], 1):
        path(step, at(fine[step - 1]), at(time))
    fit = runs.AlongFit(times, path, (0, 1))
    for step, (time, end) in enumerate(zip(times, times[1:], strict=False), 1):
        goes_on = fit(step, at(time), at(time) + (end - time) * (slope + 2 * curve * time))
        np.testing.assert_allclose(goes_on, at(end), rtol=0, atol=1e-6)  # a rounding to fp32 of what is below 8
    lengths = np.diff(times)
    ratios = lengths[1:] / lengths[:-1]
    np.testing.assert_allclose(fit.weights, np.stack([1 + ratios / 2, -ratios / 2], axis=1), rtol=0, atol=1e-6)


# What is compared


def test_the_best_costs_no_more(script: ModuleType, runs: ModuleType) -> None:
    few, some, many = (runs.Run(grid=(steps, 1.0, 1.0)) for steps in (2, 3, 5))
    errors = {few: 0.2, some: 0.3, many: 0.1}
    trials = SimpleNamespace(error=errors.__getitem__)

    def best(run: Any) -> Any:
        return script.best(trials, run, list(errors), lambda each: each.rows)

    assert best(many) is many
    assert best(runs.Run(grid=(4, 1.0, 1.0))) is few
    assert best(runs.Run(grid=(1, 1.0, 1.0))) is few, "all cost more: the cheapest"


def test_each_question_is_asked_of_runs_that_differ_in_it_alone(script: ModuleType, runs: ModuleType) -> None:
    trials = SimpleNamespace(error=lambda run: 1 / run.rows)
    found = list(script.compared(trials, script.Plan()))
    skips = [each for each in found if "left out" in each.what]
    assert [each.run.evaluations for each in skips] == [9, 10, 12, 13, 11, 9]
    for each in found:
        assert each.run != each.other
        assert each.other.rows <= each.run.rows
    for each in skips:
        assert script.replace(each.run, how=runs.How.LEFT_OUT) == each.other
    reused = [each.run.rows for each in found if each.run.how is runs.How.REUSED]
    assert reused[:2] == [21, 21]
