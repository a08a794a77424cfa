"""The study of skipped blocks: which steps it skips, what stands for them, and what it compares them with."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stiv_deploy.stiv_ref.flow import schedule
from stiv_deploy.stiv_ref.generation import sampling_inputs
from stiv_deploy.stiv_ref.sampler import SamplingSettings, Solver, sample

Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def skips(study: Load) -> ModuleType:
    return study("skips")


@pytest.fixture(scope="module")
def script(study: Load) -> ModuleType:
    return study("residual_skip")


def test_a_run_that_skips_nothing_is_the_reference(skips: ModuleType, study: Load) -> None:
    from stiv_deploy.stiv_ref.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(study("grounds").ground_of("digits").checkpoint)
    inputs = sampling_inputs(checkpoint, ["digit three moving left"], [0], None, frames=2)
    settings, evaluated = SamplingSettings(steps=3, guidance_scale=2.0, solver=Solver.AB2), {}
    right = sample(checkpoint.model, inputs, settings)
    for _ in range(2):  # computed, then taken from what is known
        model = skips.Skipping(checkpoint.model, (), 0, evaluated)
        torch.testing.assert_close(sample(model, inputs, settings), right, rtol=0, atol=0)
        assert len(model.norms) == model.done == len(evaluated) == 3
    skipped = sample(skips.Skipping(checkpoint.model, (2,), 1, evaluated), inputs, settings)
    assert torch.isfinite(skipped).all()
    assert not torch.equal(skipped, right)
    assert len(evaluated) == 3, "the beginning is known, and what is skipped is not kept"


def test_residuals_on_a_line_are_found(skips: ModuleType) -> None:
    def line(time: float) -> torch.Tensor:
        return torch.tensor([1.0, 2.0]) + time * torch.tensor([3.0, -1.0])

    known = [(time, line(time)) for time in (0.25, 0.5)]
    torch.testing.assert_close(skips.extrapolated(known, 0.8, 1), line(0.8))
    torch.testing.assert_close(skips.extrapolated(known, 0.8, 0), line(0.5))
    torch.testing.assert_close(skips.extrapolated(known[1:], 0.8, 1), line(0.5))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(4, 40), st.floats(0.5, 8), st.floats(0, 0.5), st.data())
def test_no_rule_skips_where_none_may(
    skips: ModuleType, steps: int, shift: float, budget: float, data: st.DataObject
) -> None:
    ratios = data.draw(st.lists(st.floats(0.5, 2), min_size=steps, max_size=steps))
    times = schedule(steps, shift).tolist()
    for mask in (
        skips.every(2, steps, shift),
        skips.every(3, steps, shift),
        skips.within_budget(budget, ratios, steps, shift),
    ):
        assert all(2 <= step < steps and step >= 0.2 * steps and times[step] >= 0.12 for step in mask)
        rows = "".join("x" if step in mask else " " for step in range(steps)).split()
        assert max(map(len, rows), default=0) <= skips.LONGEST


def test_a_budget_is_spent_by_ratios_that_are_off(skips: ModuleType) -> None:
    assert skips.within_budget(0.1, [1.0] * 12, 12, 1.0) == (3, 4, 5, 7, 8, 9, 11), "three in a row, then one in full"
    assert skips.within_budget(0.1, [1.06] * 12, 12, 1.0) == (3, 5, 7, 9, 11), "1.06, and 1.06^2 is too much"
    assert skips.within_budget(0.05, [1.06] * 12, 12, 1.0) == ()


def test_ratios_of_norms(skips: ModuleType) -> None:
    assert skips.norm_ratios([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0])]) == [1.0, 1.5]


def test_a_skipped_evaluation_costs_next_to_nothing_where_there_are_many_blocks(skips: ModuleType) -> None:
    from stiv_deploy.stiv_ref.config import model_config

    tiny, large = model_config("tiny"), model_config("XL")
    assert skips.fixed_share(large, (20, 4, 16, 16), 77) < skips.fixed_share(tiny, (8, 4, 8, 8), 16) < 0.01


def test_steps_left_out_leave_the_other_times(script: ModuleType, study: Load, tmp_path: Path) -> None:
    run = script.Run(solver=Solver.AB2, steps=8, shift=2.0, chosen=(3, 5))
    times = schedule(8, 2.0)
    torch.testing.assert_close(run.times(), times[[0, 1, 2, 4, 6, 7, 8]])
    assert run.skips == ()
    skipping = script.replace(run, order=1)
    torch.testing.assert_close(skipping.times(), times)
    assert skipping.skips == (3, 5)
    clips = script.Clips(study("grounds").ground_of("digits").checkpoint, [0], script.SMALLEST, tmp_path)
    assert clips.evaluations(run) == 6
    assert 6 < clips.evaluations(skipping) < 6.02


def test_typical_is_not_the_worst(script: ModuleType) -> None:
    assert script.typical([0.01, 0.04]) == pytest.approx(0.02)
