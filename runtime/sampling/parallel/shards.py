"""Who has what of a clip, and what moves between devices when that changes: arithmetic only.

Attention in space needs all tokens of a frame, everything that follows it in a block all frames of a position. So the
devices of a group share the frames of x, [rows, frames, tokens, width], in the first half of a block, and its positions
in the second; twice a block each sends every other what that needs next (*dynamic sequence parallelism*, arXiv
2403.10266). A device always sends its part of the others' parts: of m bytes of x, m / p * (p - 1) / p.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple


class Span(NamedTuple):
    """Indices from ``start`` up to ``stop``, which is none of them."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many."""
        return self.stop - self.start


def spans(total: int, parts: int) -> tuple[Span, ...]:
    """``total`` things in order shared out among ``parts``: the first get one more where they cannot all get as many.

    Parts are empty where there are more of them than things.
    """
    least, more = divmod(total, parts)
    sizes = [least + (part < more) for part in range(parts)]
    return tuple(Span(*ends) for ends in pairwise(accumulate(sizes, initial=0)))


class Place(NamedTuple):
    """Where a block of bytes lies in a buffer: its first byte, and the bytes from a run, and from a plane, to the next.

    A plane is a whole number of runs apart, as copies of CUDA want it.
    """

    start: int
    pitch: int
    plane: int


class Move(NamedTuple):
    """One copy between two buffers: ``depth`` planes of ``height`` runs of ``width`` bytes, of one rank for another."""

    source: int
    target: int
    width: int
    height: int
    depth: int
    origin: Place
    goal: Place

    @property
    def nbytes(self) -> int:
        """Bytes that it moves."""
        return self.width * self.height * self.depth

    @property
    def reversed(self) -> "Move":
        """The same bytes back."""
        return self._replace(source=self.target, target=self.source, origin=self.goal, goal=self.origin)


Moves = tuple[Move, ...]


def _kept(moves: Iterable[Move]) -> Moves:
    return tuple(move for move in moves if move.nbytes)


def to_positions(ranks: Sequence[int], rows: int, frames: int, tokens: int, width: int) -> Moves:
    """From shares of the frames, [rows, its frames, tokens], to shares of the positions, [rows, frames, its tokens].

    Of tokens of ``width`` bytes, among ``ranks``. The other way is each of them :attr:`Move.reversed`.
    """
    times, places = spans(frames, len(ranks)), spans(tokens, len(ranks))
    return _kept(
        Move(
            source=source,
            target=target,
            width=place.size * width,
            height=time.size,
            depth=rows,
            origin=Place(place.start * width, tokens * width, time.size * tokens * width),
            goal=Place(time.start * place.size * width, place.size * width, frames * place.size * width),
        )
        for source, time in zip(ranks, times, strict=True)
        for target, place in zip(ranks, places, strict=True)
    )


def to_frames(ranks: Sequence[int], rows: int, frames: int, tokens: int, width: int) -> Moves:
    """From shares of the positions to shares of the frames."""
    return back(to_positions(ranks, rows, frames, tokens, width))


def back(moves: Moves) -> Moves:
    """The way back of ``moves``."""
    return tuple(move.reversed for move in moves)


def group_rows(rows: int, groups: int, group: int) -> int:
    """How many of ``rows`` rows are of ``group``: row r is of group r mod ``groups``, whatever else there is."""
    return len(range(group, rows, groups))


def share_frames(groups: Sequence[Sequence[int]], rows: int, frames: int, factor: int, width: int) -> Moves:
    """From the leader's [rows, frames * factor] to each rank's [rows of its group, its frames * factor].

    Of frames of ``width`` bytes, ``factor`` of them to a token.
    """
    return _kept(
        Move(
            source=0,
            target=rank,
            width=width,
            height=factor * time.size,
            depth=group_rows(rows, len(groups), group),
            origin=Place((group * frames + time.start) * factor * width, width, len(groups) * frames * factor * width),
            goal=Place(0, width, factor * time.size * width),
        )
        for group, ranks in enumerate(groups)
        for rank, time in zip(ranks, spans(frames, len(ranks)), strict=True)
    )


def share_numbers(groups: Sequence[Sequence[int]], rows: int, width: int) -> Moves:
    """From the leader's [rows] to each rank's [rows of its group], of numbers of ``width`` bytes."""
    count = len(groups)
    return _kept(
        Move(
            source=0,
            target=rank,
            width=width,
            height=group_rows(rows, count, group),
            depth=1,
            origin=Place(group * width, count * width, rows * count * width),
            goal=Place(0, width, rows * width),
        )
        for group, ranks in enumerate(groups)
        for rank in ranks
    )


def sent(moves: Iterable[Move]) -> int:
    """Bytes that leave a device."""
    return sum(move.nbytes for move in moves if move.source != move.target)


def switch_bytes(sequence: int, rows: int, frames: int, tokens: int, width: int) -> int:
    """Bytes that leave the devices of a group in one switch of x, of tokens of ``width`` bytes: in closed form.

    All of x but what a device keeps: its own frames of its own positions.
    """
    kept = sum(a.size * b.size for a, b in zip(spans(frames, sequence), spans(tokens, sequence), strict=True))
    return rows * width * (frames * tokens - kept)
