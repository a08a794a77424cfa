"""Warm-up, samples and the probe, with clips that take what a table says."""

from collections.abc import Iterator, Sequence

import pytest
from measured import WORK, a_sample

from stiv_deploy.runtime import GenerationRequest
from stiv_deploy.runtime.command.bench.measure import (
    LEAST_WARM,
    MOST_WARM,
    Requests,
    known,
    probe,
    samples,
    settled,
    warm_up,
)
from stiv_deploy.runtime.command.bench.record import Sample
from stiv_deploy.runtime.command.bench.statistics import percentile


class Table:
    """Takes the seconds of a list in turns."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.seconds, self.asked = seconds, list[list[GenerationRequest]]()

    def make(self, requests: Sequence[GenerationRequest]) -> Sample:
        self.asked.append(list(requests))
        return a_sample(next(self.seconds))


class Keeping:
    """Keeps what it made, as a cache of results would."""

    def __init__(self) -> None:
        self.kept: set[str] = set()

    def make(self, requests: Sequence[GenerationRequest]) -> Sample:
        key = str([each.to_json() for each in requests])
        seconds = 0.01 if key in self.kept else 1.0
        self.kept.add(key)
        return a_sample(seconds)


def requests(batch: int = 1) -> Requests:
    return Requests(GenerationRequest(prompt=""), ("one", "two", "three"), batch)


def quiet() -> None:
    pass


def test_seeds_are_new_and_prompts_take_turns() -> None:
    ask = requests(2)
    asked = [each for _ in range(3) for each in ask()]
    assert [each.seed for each in asked] == [*range(6)]
    assert [each.prompt for each in asked] == ["one", "two", "three"] * 2


def test_warm_up_ends_when_it_gets_no_faster() -> None:
    falling = Table(iter([*(2.0 - 0.1 * index for index in range(10)), *[1.0] * 40]))
    found = warm_up(falling, requests(), WORK, quiet)
    assert found.stable
    assert len(found.seconds) == 15  # three of 1.0, of which no median is 5 % less than that of the three before
    assert len(warm_up(Table(iter([1.0] * 9)), requests(), WORK, quiet).seconds) == LEAST_WARM


def test_warm_up_gives_up_on_what_always_gets_faster() -> None:
    found = warm_up(Table(0.9**index for index in range(100)), requests(), WORK, quiet)
    assert (found.stable, len(found.seconds)) == (False, MOST_WARM)


@pytest.mark.parametrize(("seconds", "done"), [([3, 2, 1, 1, 1, 1], False), ([1, 1, 1, 5, 5, 5], True)])
def test_getting_slower_is_settled_too(seconds: list[float], done: bool) -> None:
    assert settled(seconds) == done


def test_samples_are_counted_and_differ() -> None:
    heard: list[int] = []
    table = Table(iter([1.0, 2.0, 3.0]))
    made = samples(table, requests(), 3, lambda: heard.append(1))
    assert ([each.seconds for each in made], len(heard)) == ([1.0, 2.0, 3.0], 3)
    assert len({each[0].seed for each in table.asked}) == 3


@pytest.mark.parametrize(
    ("spread", "taken"),
    [(0.0, 6), (0.01, 6), (1.0, 60)],
    ids=["equal", "near", "far apart"],
)
def test_there_are_more_samples_until_the_median_is_known(spread: float, taken: int) -> None:
    table = Table(iter([1.0, 1 + spread] * 40))
    assert len(samples(table, requests(), 6, quiet, 60)) == taken


def test_samples_end_as_soon_as_the_interval_is_narrow() -> None:
    """Ten that are far apart, then all alike: of so many the interval lies between two of the latter."""
    seconds = [*(1.5 + 0.1 * index for index in range(10)), *[1.0] * 90]
    made = samples(Table(iter(seconds)), requests(), 6, quiet, 100)
    assert 20 < len(made) < 60
    assert known(percentile([each.seconds for each in made], 0.5))
    assert not known(percentile([each.seconds for each in made[:-1]], 0.5))


def test_the_probe_finds_results_that_are_kept() -> None:
    assert probe(Keeping(), requests()).ratio.high < 0.05
    fair = probe(Table(iter([1.0, 1.01] * 50)), requests())
    assert fair.ratio.low > 0.95


def test_the_probe_looks_not_at_prompts_and_files() -> None:
    class Texts(Keeping):
        def make(self, requests: Sequence[GenerationRequest]) -> Sample:
            text = 10.0 * super().make(requests).seconds
            return a_sample(1.0 + text, text=text, write=0.1)

    assert probe(Texts(), requests()).ratio.value == pytest.approx(1.0)
