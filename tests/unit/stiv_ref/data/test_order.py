"""The order of samples: epochs without repeats, buckets by their shares, everything a function of the step."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.stiv_ref.data.order import Order

counts = st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any)


def drawn(order: Order, step: int) -> list[tuple[int, int]]:
    """(bucket, member) of all samples of a step."""
    return [(order.bucket(step), next(order.candidates(step, index))) for index in range(order.batch)]


@given(counts, st.integers(1, 5), st.integers(0, 100), st.integers(1, 3))
def test_a_round_shows_every_member_equally_often(members: list[int], batch: int, seed: int, stage: int) -> None:
    order = Order(members, seed=seed, stage=stage, batch=batch)
    steps = sum(members)
    for first in (0, steps):
        seen = Counter(each for step in range(first, first + steps) for each in drawn(order, step))
        assert seen == {(bucket, member): batch for bucket, count in enumerate(members) for member in range(count)}


@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 50))
def test_every_epoch_has_every_member_once(count: int, batch: int, seed: int) -> None:
    order = Order([count], seed=seed, stage=1, batch=batch)
    steps = -(-3 * count // batch)
    members = [member for step in range(steps) for _, member in drawn(order, step)]
    for epoch in range(3):
        assert sorted(members[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(counts, st.integers(1, 4), st.integers(0, 40))
def test_stand_ins_are_all_other_members_once_in_the_order_of_the_epoch(
    members: list[int], batch: int, step: int
) -> None:
    order = Order(members, seed=3, stage=1, batch=batch)
    count = members[order.bucket(step)]
    lists = [list(order.candidates(step, index)) for index in range(batch)]
    for candidates in lists:
        assert sorted(candidates) == list(range(count))


def test_the_stand_in_is_the_next_of_the_permutation() -> None:
    order = Order([10], seed=0, stage=1, batch=10)
    firsts = [next(order.candidates(0, index)) for index in range(10)]
    for index in range(10):
        assert list(order.candidates(0, index)) == firsts[index:] + firsts[:index]


@given(counts, st.integers(0, 60))
def test_a_resumed_run_has_the_same_order(members: list[int], step: int) -> None:
    def order() -> Order:
        return Order(members, seed=5, stage=2, batch=3)

    whole = order()
    before = [drawn(whole, each) for each in range(step + 1)]
    assert drawn(order(), step) == before[step]


def test_epochs_stages_and_seeds_are_shuffled_differently() -> None:
    def first_epoch(seed: int, stage: int, epoch: int) -> list[int]:
        order = Order([40], seed=seed, stage=stage, batch=40)
        return [member for _, member in drawn(order, epoch)]

    orders = [first_epoch(*words) for words in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]]
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(40)) not in orders


def test_buckets_take_turns_unevenly_within_a_round() -> None:
    order = Order([30, 10], seed=0, stage=1, batch=2)
    turns = [order.bucket(step) for step in range(400)]
    assert [Counter(turns[at : at + 4]) for at in range(0, 400, 4)] == [Counter({0: 3, 1: 1})] * 100
    assert len({tuple(turns[at : at + 4]) for at in range(0, 400, 4)}) == 4  # the rare one comes at every place


def test_an_empty_bucket_is_never_chosen() -> None:
    order = Order([0, 5, 0], seed=0, stage=1, batch=1)
    assert {order.bucket(step) for step in range(50)} == {1}
    assert len(list(islice(order.candidates(0, 0), 10))) == 5


def test_no_members_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="no members"):
        Order([0, 0], seed=0, stage=1, batch=1)
