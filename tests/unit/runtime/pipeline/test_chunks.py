"""Chunks: every position is made once, after all that it is given."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.chunks import Chunk, filled_in, filled_total, key_frames, rolled_on


def walked(chunks: Iterable[Chunk], known: set[int]) -> set[int]:
    """All positions that are known in the end."""
    for chunk in chunks:
        given_here = {chunk.start + place for place in chunk.given}
        made = {chunk.start + place for place in chunk.kept}
        assert given_here <= known
        assert made
        assert not made & known
        assert set(chunk.given) | set(chunk.kept) <= set(range(chunk.frames))
        assert list(chunk.given) == sorted(set(chunk.given))
        assert list(chunk.kept) == sorted(set(chunk.kept))
        known = known | made
    return known


@given(known=st.integers(0, 40), more=st.integers(0, 60), frames=st.integers(2, 20), data=st.data())
def test_rolling_on_makes_all_that_is_missing(known: int, more: int, frames: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, frames - 1))
    chunks = list(rolled_on(known, known + more, frames, overlap))
    assert walked(chunks, set(range(known))) == set(range(known + more))
    assert all(chunk.given == tuple(range(min(overlap, known))) for chunk in chunks[:1])
    assert len(chunks) <= 1 + -(-more // (frames - overlap))


@given(gaps=st.integers(1, 30), spacing=st.integers(2, 9), more=st.integers(0, 12))
def test_filling_in_makes_what_is_between(gaps: int, spacing: int, more: int) -> None:
    frames, total = spacing + 1 + more, filled_total(gaps + 1, spacing)
    chunks = list(filled_in(total, spacing, frames))
    assert walked(chunks, set(range(0, total, spacing))) == set(range(total))
    assert len(chunks) == -(-gaps // ((frames - 1) // spacing))
    for chunk in chunks:
        for place in chunk.kept:  # between two that are given
            below = place - place % spacing
            assert {below, below + spacing} <= set(chunk.given)


def test_every_second_frame_of_a_clip_of_eight() -> None:
    """Three gaps at a time; the last chunk reaches back, and beyond the end its frames are of no use."""
    assert list(filled_in(11, 2, 8)) == [
        Chunk(0, 8, (0, 2, 4, 6), (1, 3, 5)),
        Chunk(4, 8, (0, 2, 4, 6), (3, 5)),
    ]


def test_first_and_last_of_a_clip() -> None:
    assert list(filled_in(11, 5, 6)) == [Chunk(0, 6, (0, 5), (1, 2, 3, 4)), Chunk(5, 6, (0, 5), (1, 2, 3, 4))]


@pytest.mark.parametrize(
    ("total", "nearest"), [(380, "362 or 381"), (1, "20"), (19, "20"), (21, "20 or 39"), (38, "20 or 39")]
)
def test_the_nearest_number_of_frames_is_named(total: int, nearest: str) -> None:
    with pytest.raises(RequestError, match=f"{total} frames cannot be made .* nearest number is {nearest}$"):
        key_frames(total, 19)


@given(keys=st.integers(2, 40), spacing=st.integers(1, 40))
def test_numbers_that_can_be_reached(keys: int, spacing: int) -> None:
    assert key_frames(filled_total(keys, spacing), spacing) == keys
