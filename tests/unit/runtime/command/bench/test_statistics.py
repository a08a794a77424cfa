"""Percentiles and their intervals, against scipy, tables and what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stiv_deploy.runtime.command.bench.statistics import (
    block_length,
    interval_ranks,
    least_samples,
    mean_of_rounds,
    nearest_rank,
    percentile,
    ratio,
    ratio_of_turns,
)

SHARES = st.sampled_from([0.05, 0.25, 0.5, 0.9, 0.99])


@given(st.integers(1, 400), SHARES)
def test_the_interval_holds_by_the_binomial_distribution(count: int, share: float) -> None:
    ranks = interval_ranks(count, share)
    assert (ranks is None) == (count < least_samples(share))
    if ranks is not None:
        low, high = ranks
        inside = stats.binom.cdf(high - 1, count, share) - stats.binom.cdf(low - 1, count, share)
        assert inside >= 0.95 - 1e-9
        assert stats.binom.cdf(low, count, share) > 0.025 - 1e-9, "one rank nearer would be too near"
        assert low <= nearest_rank(count, share) <= high


@pytest.mark.parametrize(("share", "least"), [(0.5, 6), (0.9, 36), (0.1, 36), (0.99, 368)])
def test_least_samples_are_those_of_the_extremes(share: float, least: int) -> None:
    # the largest of n samples lies below the percentile p with probability p**n, which must be at most 2.5 %
    assert least_samples(share) == least
    assert max(share, 1 - share) ** least <= 0.025 < max(share, 1 - share) ** (least - 1)


def test_a_table_of_the_median() -> None:
    # Hahn and Meeker, Statistical Intervals, and any table of the sign test
    assert [interval_ranks(count, 0.5) for count in (5, 6, 10, 20)] == [None, (1, 6), (2, 9), (6, 15)]


def test_percentiles_are_samples() -> None:
    found = percentile([5.0, 1.0, 4.0, 2.0, 3.0, 6.0], 0.5)
    assert found is not None
    assert (found.value, found.low, found.high) == (3.0, 1.0, 6.0)
    assert percentile([1.0] * 35, 0.9) is None
    assert nearest_rank(100, 0.9) == 90


def test_intervals_cover_what_they_say() -> None:
    random = np.random.default_rng(0)
    truth = math.exp(stats.norm.ppf(0.9))
    found = [percentile(list(random.lognormal(size=60)), 0.9) for _ in range(400)]
    covered = np.mean([each.low <= truth <= each.high for each in found if each is not None])
    assert covered > 0.93  # 0.95 less two standard errors of 400 trials


def test_equal_work_has_the_ratio_one_inside_and_other_work_has_not() -> None:
    random = np.random.default_rng(1)
    one, other = (list(1 + 0.02 * random.standard_normal(40)) for _ in range(2))
    same = ratio(one, other)
    assert same.low < 1 < same.high
    assert same.half_width < 0.03
    faster = ratio([0.8 * each for each in one], other)
    assert faster.high < 0.85
    assert faster.value == pytest.approx(0.8 * same.value)


def test_bootstrapped_ratios_cover_what_they_say() -> None:
    random = np.random.default_rng(2)
    hits = 0
    for seed in range(60):
        ours, base = random.normal(2.0, 0.1, 30), random.normal(1.0, 0.1, 30)
        found = ratio(list(ours), list(base), seed=seed)
        hits += found.low <= 2.0 <= found.high
    assert hits >= 52  # 57 expected of 60; fewer than 52 has a probability below 1 %


def wandering(random: np.random.Generator, count: int = 80, memory: float = 0.8) -> list[float]:
    """Times of a machine that remembers: each is for four fifths what the last one was beyond or below 1."""
    noise, found = 0.05 * (1 - memory**2) ** 0.5 * random.standard_normal(count + 100), [0.0]
    for each in noise:
        found.append(memory * found[-1] + each)
    return [1 + each for each in found[-count:]]


def test_of_a_machine_that_wanders_blocks_are_drawn() -> None:
    """Drawn one by one, they tell equal work apart in 27 of these 60 trials; as blocks in 13, where 3 were promised."""
    random = np.random.default_rng(3)
    hits = sum(
        found.low <= 1 <= found.high
        for found in (ratio(wandering(random), wandering(random), seed=seed) for seed in range(60))
    )
    assert hits >= 45


def test_blocks_are_of_one_where_samples_are_independent() -> None:
    random = np.random.default_rng(4)
    lengths = [block_length(random.normal(size=60)) for _ in range(200)]
    assert np.mean(np.array(lengths) == 1) > 0.9
    assert block_length(np.ones(40)) == block_length(np.arange(3.0)) == 1
    assert block_length(np.repeat(random.normal(size=12), 5)) >= 4


def test_rounds_of_turns_tell_equal_work_on_a_machine_that_wanders() -> None:
    """Processes are a percent apart for as long as they live; the machine wanders by 5 % in the time of a round."""
    random = np.random.default_rng(5)
    found = []
    for _ in range(200):
        ratios = []
        for _ in range(4):
            machine = np.asarray(wandering(random, count=12, memory=0.95))
            ours, base = random.normal(1, 0.01, 2)
            noise = random.normal(1, 0.01, (2, 6))
            ratios.append(ratio_of_turns(ours * machine[::2] * noise[0], base * machine[1::2] * noise[1]))
        found.append(mean_of_rounds(ratios))
    assert np.mean([each.low <= 1 <= each.high for each in found if each is not None]) > 0.92  # 0.95 less 2 errors


def test_turns_are_divided_pair_by_pair() -> None:
    assert ratio_of_turns([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0


@pytest.mark.parametrize("count", range(2, 13))
def test_the_interval_of_rounds_is_students(count: int) -> None:
    ratios = list(np.random.default_rng(count).lognormal(0.1, 0.02, count))
    found, logs = mean_of_rounds(ratios), np.log(ratios)
    assert found is not None
    low, high = stats.t.interval(0.95, count - 1, logs.mean(), stats.sem(logs))
    assert (found.value, found.low, found.high) == pytest.approx(np.exp([logs.mean(), low, high]), rel=1e-6)


def test_one_round_has_no_interval() -> None:
    assert mean_of_rounds([1.0]) is None
