"""The load of a server in small, and what is told of it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest


@pytest.fixture
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("bench_serve")


@pytest.mark.alone
@pytest.mark.slow
def test_a_ladder_is_climbed(script: ModuleType, bundle_path: Path) -> None:
    plan = script.Plan(4, 0.5, 50.0, 0, {"short": 1, "long": 6}, rungs=("fifo", "deadlines"), repeats=1)
    first, result = (json.loads(json.dumps(found)) for found in plan.climb(bundle_path))
    assert (set(first["ratios"]), set(result["ratios"])) == ({"fifo"}, {"fifo", "deadlines"})
    for rung in result["rungs"].values():
        for load in ("burst", "poisson"):
            assert rung[load]["jobs"] == 4
            assert rung[load]["jobs_per_second"] > 0
        assert 0 < rung["occupancy"] <= 1
    assert result["ratios"]["fifo"]["burst"] == {"short_mean_times_lower": 1.0, "jobs_per_second": 1.0}


def test_the_same_seed_is_the_same_load(script: ModuleType) -> None:
    first, again = (script.drawn(200, np.full(200, 0.5), np.random.default_rng(3)) for _ in range(2))
    assert first == again
    assert [call.at for call in first[:3]] == [0.5, 1.0, 1.5]
    assert {call.kind for call in first} == {*script.KINDS}
    assert 0 < sum(call.cancel is not None for call in first) < 40


def test_what_is_told_of_a_load(script: ModuleType) -> None:
    """By hand: three short jobs, of which one is late, one refused and one cancelled, and a long one in time."""
    short, long = (script.Kind(length, False, True) for length in ("short", "long"))
    calls = [script.Call(kind, 0.0, None, due=10.0, id=name) for kind, name in (
        (short, "late"), (short, ""), (short, "gone"), (long, "done")
    )]  # fmt: skip
    ends = {"late": (10, 14.0, "completed"), "gone": (10, 11.0, "cancelled"), "done": (10, 18.0, "completed")}
    load = script.Load(calls, ends, seconds=8.0, peak={"server_mib": 99.6})
    found = script.summary(load, {short: 1.0, long: 2.0}, slo=4.5)
    assert (found["completed"], found["refused"], found["jobs_per_second"]) == (2, 1, 0.25)
    assert (found["goodput"], found["slo_attainment"]) == (0.25, round(2 / 3, 3))
    assert (found["times"]["short"]["mean"], found["times"]["all"]["p50"]) == (4.0, 6.0)
    assert found["peak_mib"] == {"server_mib": 100}
    assert script.summary(load, {short: 0.5, long: 2.0}, slo=4.5)["goodput"] == 0.125


def test_occupancy_and_quantiles_are_of_the_metrics(script: ModuleType) -> None:
    before = {("stiv_rows_total", "used"): 10.0, ("stiv_rows_total", "computed"): 20.0}
    after = {("stiv_rows_total", "used"): 40.0, ("stiv_rows_total", "computed"): 60.0}
    assert script.occupancy(before, after) == 0.75
    buckets = {("t_bucket", "0.1"): 90.0, ("t_bucket", "0.5"): 99.0, ("t_bucket", "+Inf"): 100.0}
    assert [script.quantile(buckets, "t", share) for share in (0.5, 0.99, 1.0)] == [0.1, 0.5, float("inf")]
    assert script.quantile({}, "t", 0.5) is None


def test_policies_differ_in_who_may_join(benchmark_module: Callable[[str], ModuleType]) -> None:
    policies = benchmark_module("policies")
    lanes = [SimpleNamespace(running=[SimpleNamespace(step=step) for step in steps]) for steps in ([], [0], [0, 3])]
    joins = policies.closed_once_it_runs(lambda _lane, _rows: True)
    assert [joins(lane, 2) for lane in lanes] == [True, True, False]
    assert [policies.one_at_a_time(lane, 2) for lane in lanes] == [True, False, False]
