"""Shares, and what moves between them: arithmetic, and tensors whose values say where they belong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stiv_deploy.runtime.sampling.parallel.shards import (
    Moves,
    back,
    group_rows,
    sent,
    share_frames,
    share_numbers,
    spans,
    switch_bytes,
    to_frames,
    to_positions,
)
from stiv_deploy.runtime.sampling.parallel.transport import block

PARTS = st.integers(1, 9)


def moved(moves: Moves, sources: dict[int, np.ndarray], targets: dict[int, np.ndarray]) -> None:
    """Carry out ``moves`` between arrays by rank; no byte may be written twice."""
    written = {rank: np.zeros(array.nbytes, bool) for rank, array in targets.items()}
    for move in moves:
        origin = block(sources[move.source].reshape(-1).view(np.uint8), move.origin, move)
        block(targets[move.target].reshape(-1).view(np.uint8), move.goal, move)[...] = origin
        once = block(written[move.target].view(np.uint8), move.goal, move)
        assert not once.any()
        once[...] = 1
    assert all(array.all() for array in written.values()), "every byte comes from somewhere"


@given(total=st.integers(0, 200), parts=st.integers(1, 64))
def test_shares_are_in_order_nothing_is_left_out_and_none_is_two_larger(total: int, parts: int) -> None:
    found = spans(total, parts)
    assert [index for span in found for index in range(*span)] == list(range(total))
    sizes = [span.size for span in found]
    assert len(found) == parts
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_twenty_frames_on_eight_devices() -> None:
    assert [span.size for span in spans(20, 8)] == [3, 3, 3, 3, 2, 2, 2, 2]


@settings(max_examples=150)
@given(
    parts=PARTS, rows=st.integers(1, 3), frames=st.integers(1, 11), tokens=st.integers(1, 13), width=st.integers(1, 3)
)
def test_both_switches_put_every_element_in_its_place(
    parts: int, rows: int, frames: int, tokens: int, width: int
) -> None:
    """Index-coded: uneven shares, more shares than frames or tokens, nothing that divides."""
    x = np.arange(rows * frames * tokens * width, dtype=np.int32).reshape(rows, frames, tokens, width)
    ranks = range(10, 10 + parts)
    by_frames = {
        rank: np.ascontiguousarray(x[:, slice(*span)]) for rank, span in zip(ranks, spans(frames, parts), strict=True)
    }
    right = {
        rank: np.ascontiguousarray(x[:, :, slice(*span)])
        for rank, span in zip(ranks, spans(tokens, parts), strict=True)
    }
    moves = to_positions(ranks, rows, frames, tokens, 4 * width)
    by_positions = {rank: np.full_like(array, -1) for rank, array in right.items()}
    moved(moves, by_frames, by_positions)
    again = {rank: np.full_like(array, -1) for rank, array in by_frames.items()}
    moved(to_frames(ranks, rows, frames, tokens, 4 * width), by_positions, again)
    for rank in ranks:
        np.testing.assert_array_equal(by_positions[rank], right[rank])
        np.testing.assert_array_equal(again[rank], by_frames[rank])
    assert sent(moves) == switch_bytes(parts, rows, frames, tokens, 4 * width) == sent(back(moves))


@given(st.integers(1, 8).flatmap(lambda parts: st.tuples(st.just(parts), st.integers(1, 4), st.integers(1, 4))))
def test_where_all_divides_a_device_sends_all_of_the_others_parts(sizes: tuple[int, int, int]) -> None:
    parts, frames, tokens = sizes
    total = 2 * 16 * (frames * parts) * (tokens * parts)
    assert switch_bytes(parts, 2, frames * parts, tokens * parts, 16) == total * (parts - 1) // parts


@settings(max_examples=100)
@given(
    groups=st.integers(1, 3),
    parts=st.integers(1, 5),
    rows=st.integers(1, 7),
    frames=st.integers(1, 7),
    factor=st.integers(1, 2),
)
def test_rows_and_frames_are_dealt_out_and_come_back(
    groups: int, parts: int, rows: int, frames: int, factor: int
) -> None:
    ranks = [range(group * parts, (group + 1) * parts) for group in range(groups)]
    whole = np.arange(rows * frames * factor * 6, dtype=np.float32).reshape(rows, frames * factor, 6)
    shares = {
        rank: np.ascontiguousarray(whole[group::groups, factor * span.start : factor * span.stop])
        for group, members in enumerate(ranks)
        for rank, span in zip(members, spans(frames, parts), strict=True)
    }
    moves = share_frames(ranks, rows, frames, factor, 24)
    found = {rank: np.full_like(share, -1) for rank, share in shares.items()}
    moved(moves, {0: whole}, found)
    for rank, share in shares.items():
        np.testing.assert_array_equal(found[rank], share)
    returned = np.full_like(whole, -1)
    moved(back(moves), shares, {0: returned})
    np.testing.assert_array_equal(returned, whole)


@given(groups=st.integers(1, 3), parts=st.integers(1, 4), rows=st.integers(1, 9))
def test_numbers_of_rows_go_to_all_of_their_group(groups: int, parts: int, rows: int) -> None:
    ranks = [range(group * parts, (group + 1) * parts) for group in range(groups)]
    numbers = np.arange(rows, dtype=np.float32)
    found = {
        rank: np.full(group_rows(rows, groups, group), -1, np.float32)
        for group in range(groups)
        for rank in ranks[group]
    }
    moved(share_numbers(ranks, rows, 4), {0: numbers}, found)
    for group in range(groups):
        for rank in ranks[group]:
            np.testing.assert_array_equal(found[rank], numbers[group::groups])


@pytest.mark.parametrize(("sequence", "sent_gb"), [(2, 5.8), (4, 4.3), (8, 2.5)])
def test_the_published_volume(sequence: int, sent_gb: float) -> None:
    """STIV-M at 512 px, two rows, 20 frames of 1024 tokens of width 3072 in 16 bits, 46 blocks: GB a device."""
    volume = 2 * 46 * switch_bytes(sequence, 2, 20, 1024, 3072 * 2) / sequence / 1e9
    assert volume == pytest.approx(sent_gb, abs=0.06)
