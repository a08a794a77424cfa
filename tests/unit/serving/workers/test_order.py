"""Who is next: priority, deadline, age; and sizes by turns."""

import dataclasses
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stiv_deploy.serving.store.jobs import Job
from stiv_deploy.serving.workers.order import AGEING, STRETCH, Turns, order_of

JOB = Job(id="a", owner="me", created=0.0, frames=1, height=2, width=2, rows=1, evaluations=1, steps=1)


def job(name: str, **changes: object) -> Job:
    return dataclasses.replace(JOB, id=name, **changes)


def order(now: float, *jobs: Job, alone: Callable[[Job], float | None] = lambda _: None) -> str:
    found = order_of(jobs, alone)
    return "".join(each.id for each in sorted(jobs, key=lambda each: found.rank(each, now)))


def test_priority_then_deadline_then_age() -> None:
    jobs = (job("d", created=1.0), job("c"), job("b", created=2.0, due=50.0), job("a", created=3.0, priority=1))
    assert order(4.0, *jobs) == "abcd"


def test_short_ones_first_until_long_ones_have_waited_in_proportion() -> None:
    long, short = job("l", evaluations=30), job("s", created=10.0)
    assert order(20.0, long, short, alone=lambda each: 0.1 * each.evaluations) == "sl"
    late = job("s", created=0.1 * STRETCH * 30)
    assert order(40.0, long, late, alone=lambda each: 0.1 * each.evaluations) == "ls"


def test_a_place_stays_though_costs_change() -> None:
    found = order_of([JOB], lambda _: 1.0)
    found.see([JOB, job("b", created=1.0)], lambda _: 2.0)
    assert [found.urgency(each)[2] for each in (JOB, job("b"))] == [STRETCH, 1.0 + 2 * STRETCH]


def test_nobody_waits_for_ever() -> None:
    old, urgent = job("o"), job("u", priority=2, created=3 * AGEING)
    assert order(3 * AGEING, urgent, old) == "ou"
    assert order(1.0, dataclasses.replace(urgent, created=1.0), old) == "uo"


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 3.0), min_size=2, max_size=4), st.floats(0.1, 2.0))
def test_turns_share_time_whatever_a_piece_costs(costs: list[float], quantum: float) -> None:
    """After any number of pieces, lanes that always have work differ by at most a quantum and a piece each."""
    turns: Turns[int] = Turns(quantum)
    spent: Counter[int] = Counter()
    for _ in range(300):
        lane = turns.next(range(len(costs)))
        turns.spend(lane, costs[lane])
        spent[lane] += costs[lane]
    assert max(spent.values()) - min(spent[lane] for lane in range(len(costs))) <= 2 * (quantum + max(costs)) + 1e-6


def test_a_lane_alone_goes_on_and_who_comes_owes_nothing() -> None:
    turns: Turns[str] = Turns(1.0)
    for _ in range(10):
        assert turns.next(["a"]) == "a"
        turns.spend("a", 5.0)
    assert turns.next(["a", "b"]) == "b"


@pytest.mark.parametrize("lanes", [["b"], ["b", "c"]])
def test_who_has_no_work_is_forgotten(lanes: list[str]) -> None:
    turns: Turns[str] = Turns(1.0)
    assert turns.next(["a"]) == "a"
    turns.spend("a", 100.0)
    assert turns.next(lanes) == "b"
    assert turns.next(["a"]) == "a"
