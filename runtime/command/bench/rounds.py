"""Rounds of turns: contestants in processes that take turns, and are started again, in the other order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from stiv_deploy.runtime.command.bench.machine import LoadMeter, own_seconds
from stiv_deploy.runtime.command.bench.measure import known, warmed
from stiv_deploy.runtime.command.bench.rivals import Order, Rival, rival
from stiv_deploy.runtime.command.bench.statistics import Estimate, mean_of_rounds, ratio_of_turns
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.progress import Progress

TURNS = 6
"""Of a round."""
LEAST_ROUNDS, MOST_ROUNDS = 4, 12
"""Where their number is not given: as many as it takes until the ratios are known well enough."""
Asking = Callable[[], list[GenerationRequest]]


class Round(NamedTuple):
    """What each took, by name, in warm-up and in the turns, and the share of all cores that others kept busy."""

    warm_up: Mapping[str, Sequence[float]]
    seconds: Mapping[str, Sequence[float]]
    others: float


@contextmanager
def started(orders: Mapping[str, Order], progress: Progress) -> Iterator[list[Rival]]:
    """A process of each of ``orders``, in their order, for as long as the block."""
    with ExitStack() as open_ones:
        rivals: list[Rival] = []
        for name, order in orders.items():
            progress(f"starting {name}", len(rivals), len(orders))
            rivals.append(open_ones.enter_context(rival(name, order)))
        yield rivals


def by_rounds(orders: Mapping[str, Order], requests: Asking, count: int | None, progress: Progress) -> list[Round]:
    """``count`` rounds, or None: until the ratios over the first of ``orders`` are known, or there were enough."""
    rounds: list[Round] = []
    while len(rounds) < (count or LEAST_ROUNDS) or (count is None and _goes_on(rounds, orders)):
        names = list(orders) if len(rounds) % 2 == 0 else list(orders)[::-1]
        with started({name: orders[name] for name in names}, progress) as rivals:
            rounds.append(_round(rivals, requests, partial(progress, f"round {len(rounds) + 1}")))
    return rounds


def ratio_of(rounds: Sequence[Round], name: str, base: str) -> Estimate:
    """Of the seconds of ``name`` over those of ``base``, in two rounds or more."""
    found = mean_of_rounds([ratio_of_turns(each.seconds[name], each.seconds[base]) for each in rounds])
    assert found is not None, "one round alone"
    return found


def _goes_on(rounds: Sequence[Round], orders: Mapping[str, Order]) -> bool:
    base = next(iter(orders))
    return len(rounds) < MOST_ROUNDS and not all(known(ratio_of(rounds, name, base)) for name in orders)


def _round(rivals: Sequence[Rival], requests: Asking, news: Callable[[int, int], object]) -> Round:
    news(0, TURNS)
    warm = {each.name: warmed(partial(_asked, each, requests), lambda: None) for each in rivals}
    meter = LoadMeter(own=lambda: own_seconds() + sum(each.cpu_seconds for each in rivals))
    return Round(warm, _turns(rivals, requests, news), meter.others())


def _asked(one: Rival, requests: Asking) -> float:
    return one.make(requests())


def _turns(rivals: Sequence[Rival], requests: Asking, news: Callable[[int, int], object]) -> dict[str, list[float]]:
    """Samples of each, there and back again. Within a turn all make the same clips."""
    seconds: dict[str, list[float]] = {each.name: [] for each in rivals}
    for turn in range(TURNS):
        asked = requests()
        for one in rivals if turn % 2 == 0 else reversed(rivals):
            seconds[one.name].append(one.make(asked))
        news(turn + 1, TURNS)
    return seconds
