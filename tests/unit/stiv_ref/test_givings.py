"""Givings: names, frames, shares; one frame at least is left to make, and a draw depends on its generator alone."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from stiv_deploy.stiv_ref.givings import Giving, Mix, drawn, frame_mask, giving

NAMES = st.one_of(
    st.sampled_from(["none", "first", "ends", "random"]),
    st.builds("{} {}".format, st.sampled_from(["first", "every"]), st.integers(2, 99)),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "frames", "shown"),
    [
        ("none", 6, []),
        ("first", 6, [0]),
        ("first 4", 6, [0, 1, 2, 3]),
        ("every 2", 6, [0, 2, 4]),
        ("every 2", 5, [0, 2, 4]),
        ("every 3", 8, [0, 3, 6]),
        ("every 9", 8, [0]),
        ("ends", 8, [0, 7]),
    ],
)
def test_frames_of_a_giving(name: str, frames: int, shown: list[int]) -> None:
    assert giving(name).frames(frames, generator(0)) == shown


@given(name=NAMES, more=st.integers(0, 20), seed=st.integers(0, 2**32))
def test_a_frame_is_always_left_and_the_same_seed_gives_the_same(name: str, more: int, seed: int) -> None:
    one = giving(name)
    frames = one.least_frames + more
    shown = one.frames(frames, generator(seed))
    assert shown == sorted(set(shown)) == one.frames(frames, generator(seed))
    assert set(shown) < set(range(frames))
    assert bool(shown) == (name != "none")
    assert not one.leading or shown == list(range(len(shown)))


@given(name=NAMES.filter(lambda name: name != "random"))
def test_one_frame_less_would_leave_none(name: str) -> None:
    one = giving(name)
    fewer = one.least_frames - 1
    assert one.frames(fewer, generator(0)) == list(range(fewer)) if fewer else one.least_frames == 1


def test_random_frames_are_uniform() -> None:
    """Of 4 frames: one, two or three, a third each; of those every choice as often. Five deviations of a binomial."""
    count, source = 6_000, generator(3)
    seen = Counter(tuple(giving("random").frames(4, source)) for _ in range(count))
    for many in (1, 2, 3):
        choices = list(combinations(range(4), many))
        wanted = 1 / 3 / len(choices)
        for choice in choices:
            assert abs(seen[choice] / count - wanted) < 5 * (wanted * (1 - wanted) / count) ** 0.5
    assert seen.total() == count


@pytest.mark.parametrize(
    "name", ["", "first 1", "first 0", "every 1", "every", "ends 2", "random 3", "First", "first  4", "x" * 99]
)
def test_other_names_are_told(name: str) -> None:
    with pytest.raises(ValueError, match="is no giving of frames; there are none, first, first K, every N, ends and"):
        giving(name)


@given(shares=st.dictionaries(NAMES, st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_shares_hold(shares: dict[str, int], seed: int) -> None:
    total, count, source = sum(shares.values()), 400, generator(seed)
    mix = TypeAdapter(Mix).validate_python({name: share / total for name, share in shares.items()})
    seen = Counter(drawn(mix, source) for _ in range(count))
    assert set(seen) <= set(mix)
    for (
        name,
        share,
    ) in mix.items():  # six deviations: an example in a million, times six names, times a hundred examples
        assert abs(seen[name] - count * share) <= 6 * (count * share * (1 - share)) ** 0.5 + 1


def test_a_single_giving_draws_nothing() -> None:
    source = generator(1)
    assert drawn({"every 2": 1.0}, source) == "every 2"
    assert giving("every 2").frames(4, source) == [0, 2]
    assert torch.equal(torch.rand(3, generator=source), torch.rand(3, generator=generator(1)))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({}, "at least 1 item"),
        ({"first": 0.5, "ends": 0.4}, "the shares add up to 0.9, not to 1"),
        ({"first": 1.5}, "less than or equal to 1"),
        ({"first": 0.0, "ends": 1.0}, "greater than 0"),
        ({"last": 1.0}, "'last' is no giving of frames"),
    ],
)
def test_mixes_that_are_none(mix: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Mix).validate_python(mix)


def test_names_mean_what_they_say() -> None:
    assert (giving("every 12"), giving("ends")) == (Giving("every", 12), Giving("ends"))
    assert frame_mask([0, 3], 4).tolist() == [True, False, False, True]
