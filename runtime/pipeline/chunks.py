"""How a video longer than a clip is cut into clips, each given what is made already: positions and nothing else.

A timeline has positions 0, 1, 2, ... of latent frames. A chunk is a clip that lies on it. Two ways lead over a
timeline: *rolling on* from what is there, and *filling in* what lies between known positions. Prediction is the first;
interpolation is the second; long video is both, first key frames far apart, then what is between them (arXiv
2412.07730, section 5: a roll-out of all frames adds its errors up).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from stiv_deploy.runtime.errors import RequestError


@dataclass(frozen=True)
class Chunk:
    """A clip of ``frames`` frames, the first at position ``start``.

    ``given`` are those of its frames that are known before, ``kept`` those that it makes for the timeline; both are
    numbers in the clip, ascending. Frames that are neither are thrown away.
    """

    start: int
    frames: int
    given: tuple[int, ...]
    kept: tuple[int, ...]


def rolled_on(known: int, total: int, frames: int, overlap: int) -> Iterator[Chunk]:
    """Chunks from ``known`` positions to ``total``; each is given the last ``overlap`` positions, or all, if fewer."""
    while known < total:
        lap = min(overlap, known)
        kept = min(frames - lap, total - known)
        yield Chunk(known - lap, frames, tuple(range(lap)), tuple(range(lap, lap + kept)))
        known += kept


def filled_in(total: int, spacing: int, frames: int) -> Iterator[Chunk]:
    """Chunks that make all of ``total`` positions but the known ones, which are multiples of ``spacing``.

    The last position is known. A chunk keeps what lies between two known positions of its own.
    """
    gaps, at_once = (total - 1) // spacing, (frames - 1) // spacing
    done = 0
    while done < gaps:
        first = max(0, min(done, gaps - at_once))
        last = min(first + at_once, gaps)
        start = first * spacing
        given = tuple(place for place in range(0, frames, spacing) if start + place < total)
        made = range((done - first) * spacing, (last - first) * spacing)
        yield Chunk(start, frames, given, tuple(place for place in made if place % spacing))
        done = last


def filled_total(known: int, spacing: int) -> int:
    """Positions once ``spacing`` - 1 are filled in between all neighbours of ``known`` ones."""
    return (known - 1) * spacing + 1


def key_frames(total: int, spacing: int) -> int:
    """How many key frames, ``spacing`` apart, make a video of ``total`` frames; :class:`RequestError` if none do.

    The error names the nearest possible numbers.
    """
    if total > spacing and (total - 1) % spacing == 0:
        return (total - 1) // spacing + 1
    below = max(1, (total - 1) // spacing) * spacing + 1
    nearest = [below] if below >= total else [below, below + spacing]
    raise RequestError(
        f"{total} frames cannot be made of key frames {spacing} apart and what lies between them; the nearest number "
        f"is {' or '.join(map(str, nearest))}"
    )
