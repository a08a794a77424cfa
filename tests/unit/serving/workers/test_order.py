"""Who is next: priority, deadline, age; and sizes by turns."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stiv_deploy.serving.store.jobs import Job
from stiv_deploy.serving.workers.order import AGEING, Turns, rank

JOB = Job(id="a", owner="me", created=0.0, frames=1, height=2, width=2, rows=1, evaluations=1, steps=1)


def job(name: str, **changes: object) -> Job:
    return dataclasses.replace(JOB, id=name, **changes)


def order(now: float, *jobs: Job) -> str:
    return "".join(each.id for each in sorted(jobs, key=lambda each: rank(each, now)))


def test_priority_then_deadline_then_age() -> None:
    jobs = (job("d", created=1.0), job("c"), job("b", created=2.0, due=50.0), job("a", created=3.0, priority=1))
    assert order(4.0, *jobs) == "abcd"


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
