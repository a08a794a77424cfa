"""Whether a clip is what was wanted: one value of what its pixels show, and tables over many.

The limits are those at which true clips pass and planted faults (``faults.py``) do not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.data.world.captions import COLOURS, Colour, Size, Told
from stiv_deploy.stiv_ref.data.world.clips import WorldClip
from stiv_deploy.stiv_ref.data.world.movement import movement
from stiv_deploy.stiv_ref.data.world.reading import Reading, pixels_of, read
from stiv_deploy.stiv_ref.data.world.shapes import REACH
from stiv_deploy.stiv_ref.world_settings import SHAPES, SIDE, Motion, Shape

BIG_FROM = 9.5
"""Radius in pixels of a picture of :data:`SIDE` from which on an object is big."""
SPEED_SHARE, SPEED_PIXELS, GROWTH_PIXELS = 0.25, 0.1, 0.03
"""How far a speed may be off: so much of it, and so many pixels a frame, or of the radius a frame."""
JUMP = 1.0
"""Pixels of a picture of :data:`SIDE` by which no step may be longer than the usual one."""
RESIZING = ("grow", "shrink")
RESIZED = 1.25
"""Largest over smallest radius of an object that neither grows nor shrinks."""
RESIDUAL, FLICKER = 0.03, 0.04
"""Most that the background may differ from its median over time, and the clip from frame to frame; of full brightness.
"""
SEAM = 3.0
"""How many times the usual change between frames a change at a seam may be, of the background."""
LEAST_CHANGE = 1 / 128
"""Of full brightness: a usual change below counts as so much."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a clip should show, ``None`` for what is left open; ``speed`` in pixels a frame; ``seams``: the numbers of
    the frames that begin a new chunk.
    """

    colour: Colour | None = None
    shape: Shape | None = None
    size: Size | None = None
    motion: Motion | None = None
    speed: float | None = None
    seams: tuple[int, ...] = ()


def wanted_of(clip: WorldClip) -> Wanted:
    """All of what a clip shows."""
    return Wanted(**vars(clip.scene.truth), speed=clip.speed)


def asked(told: Told) -> Wanted:
    """What a caption tells."""
    return Wanted(**vars(told))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a clip shows, and whether that is what was wanted; ``None`` where nothing was, or it cannot be judged.

    ``frames`` is the share of frames that show the wanted shape and colour, ``identity`` whether all do; ``kept``
    whether all show the same shape, colour and, unless it grows or shrinks, size, whatever was wanted; ``smooth``
    whether no step is much longer than the usual one. ``residual``: of the background over time; ``flicker``: from
    frame to frame; both are root mean squares of full brightness. ``seam``: the background's largest change at a seam,
    relative to the usual one; what the object does there is ``smooth`` and ``kept``. ``match`` is the median soft IoU
    with the shape.
    """

    seen: Told | None
    match: float
    speed: float
    jump: float
    residual: float
    flicker: float
    seam: float | None
    frames: float
    identity: bool
    kept: bool
    smooth: bool | None
    still: bool | None
    steady: bool | None
    seamless: bool | None
    colour: bool | None
    shape: bool | None
    size: bool | None
    motion: bool | None
    pace: bool | None

    @property
    def right(self) -> bool:
        """Whether everything that was judged is right."""
        return all(getattr(self, name) is not False for name in JUDGED)


JUDGED = (
    "colour", "shape", "size", "motion", "pace", "identity", "kept", "smooth", "still", "steady", "seamless",
)  # fmt: skip
"""What of :class:`Scores` is right or wrong."""
MEASURED = ("frames", "match", "jump", "residual", "flicker", "seam")
"""What of :class:`Scores` is a number."""


def score(frames: NDArray[np.generic], wanted: Wanted) -> Scores:
    """Score frames uint8, or floats in [0, 1], [F, H, H, 3]; ``ValueError`` for another shape."""
    pixels = pixels_of(frames)
    side, count = pixels.shape[1], len(pixels)
    reading = read(frames)
    moved = movement(reading, side) if count > 1 else None
    seen = _seen(reading, side, moved.motion if moved else None)
    right = _right_frames(reading, wanted)
    residual, flicker = _unrest(pixels, reading) if count > 1 else (0.0, 0.0)
    seam = _seam(pixels, reading, wanted.seams)
    return Scores(
        seen=seen,
        match=float(np.median(reading.match)),
        speed=moved.speed if moved else 0.0,
        jump=moved.jump if moved else 0.0,
        residual=residual,
        flicker=flicker,
        seam=seam,
        frames=float(right.mean()),
        identity=bool(right.all()),
        kept=_kept(reading, resized=(wanted.motion or (moved and moved.motion)) in RESIZING),
        smooth=moved.jump <= JUMP * side / SIDE if moved else None,
        still=residual <= RESIDUAL if moved else None,
        steady=flicker <= FLICKER if moved else None,
        seamless=None if seam is None else seam <= SEAM,
        colour=_same(wanted.colour, seen.colour if seen else None),
        shape=_same(wanted.shape, seen.shape if seen else None),
        size=_same(wanted.size, seen.size if seen else None),
        motion=_same(wanted.motion, moved.motion) if moved else None,
        pace=_pace(wanted, moved.speed, side) if moved else None,
    )


def _same(wanted: str | None, seen: str | None) -> bool | None:
    return None if wanted is None else wanted == seen


def _seen(reading: Reading, side: int, motion: Motion | None) -> Told | None:
    """What most frames show; ``None`` if most show nothing."""
    shown = reading.shown
    if shown.mean() < 0.5:
        return None
    radius = float(np.median(reading.radius[shown])) * SIDE / side
    return Told(
        shape=SHAPES[int(np.bincount(reading.shapes[shown]).argmax())],
        colour=tuple(COLOURS)[int(np.bincount(reading.colours[shown]).argmax())],
        size="big" if radius >= BIG_FROM else "small",
        motion=motion,
    )


def _right_frames(reading: Reading, wanted: Wanted) -> NDArray[np.bool_]:
    right = reading.shown.copy()
    if wanted.shape is not None:
        right &= reading.shapes == SHAPES.index(wanted.shape)
    if wanted.colour is not None:
        right &= reading.colours == tuple(COLOURS).index(wanted.colour)
    return right


def _kept(reading: Reading, *, resized: bool) -> bool:
    if not reading.shown.all():
        return False
    one = len(set(reading.shapes.tolist())) == len(set(reading.colours.tolist())) == 1
    return one and (resized or float(reading.radius.max()) <= RESIZED * float(reading.radius.min()))


def _pace(wanted: Wanted, speed: float, side: int) -> bool | None:
    if wanted.speed is None:
        return None
    pixels = GROWTH_PIXELS if wanted.motion in RESIZING else SPEED_PIXELS
    return abs(speed - wanted.speed) <= SPEED_SHARE * wanted.speed + pixels * side / SIDE


def _behind(pixels: NDArray[np.float32], reading: Reading) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Some of the pixels [F, h, w, 3], and which of them the object is not in [F, h, w]: the background is soft."""
    every = max(1, pixels.shape[1] // 32)
    some = np.s_[:, every // 2 :: every, every // 2 :: every]
    return pixels[some], ~_around(reading, pixels.shape[1])[some]


def _unrest(pixels: NDArray[np.float32], reading: Reading) -> tuple[float, float]:
    """Residual of the background; flicker: of its pixels, or of the object's colour if that is more."""
    grid, free = _behind(pixels, reading)
    always = free.all(0)
    values = grid[:, always] if always.any() else grid[:, :1, :1].reshape(len(grid), 1, 3)
    residual = _rms(values - np.median(values, axis=0))
    found = reading.rgb[reading.found]
    return residual, max(_trembling(values), _trembling(found[:, None]))


def _around(reading: Reading, side: int) -> NDArray[np.bool_]:
    """Pixels [F, H, W] that the object, or its edge, may be in."""
    places = np.arange(side) + 0.5
    reach = (REACH * reading.radius + 2 * side / SIDE)[:, None]
    across, down = (np.abs(places - middle[:, None]) <= reach for middle in (reading.x, reading.y))
    return across[:, None, :] & down[:, :, None] & reading.found[:, None, None]


def _trembling(values: NDArray[np.floating]) -> float:
    """Root mean square of how far each of ``values`` [F, N, 3] is from the mean of its neighbours in time."""
    if len(values) < 3:
        return 0.0
    return _rms(values[1:-1] - (values[:-2] + values[2:]) / 2)


def _rms(values: NDArray[np.floating]) -> float:
    return math.sqrt(float(np.square(values).mean()))


def _seam(pixels: NDArray[np.float32], reading: Reading, seams: Sequence[int]) -> float | None:
    """The background's largest change at a seam, relative to the median of all other changes from frame to frame."""
    if bad := [seam for seam in seams if not 0 < seam < len(pixels)]:
        raise ValueError(f"{bad[0]} is no seam of {len(pixels)} frames; a chunk begins at 1 to {len(pixels) - 1}")
    if not seams:
        return None
    grid, free = _behind(pixels, reading)
    both = free[1:] & free[:-1]
    steps = np.abs(np.diff(grid, axis=0)).mean(-1)
    changes = (steps * both).sum((1, 2)) / np.maximum(both.sum((1, 2)), 1)
    others = np.delete(changes, np.array(seams) - 1)
    usual = float(np.median(others)) if len(others) else 0.0
    return float(max(changes[seam - 1] for seam in seams)) / max(usual, LEAST_CHANGE)


Table = dict[str, float]


def aggregate(scores: Sequence[Scores]) -> Table:
    """Percent of what is right among what was judged, means of what is a number; what was never judged is left out."""
    table: Table = {"clips": float(len(scores))}
    for name in (*JUDGED, "right"):
        values = [value for each in scores if (value := getattr(each, name)) is not None]
        if values:
            table[name] = round(100 * sum(values) / len(values), 1)
    for name in MEASURED:
        numbers = [value for each in scores if (value := getattr(each, name)) is not None and math.isfinite(value)]
        if numbers:
            table[f"mean_{name}"] = round(sum(numbers) / len(numbers), 4)
    return table


def markdown(tables: dict[str, Table]) -> str:
    """Rows by name, percents and means as columns, as a Markdown table."""
    columns = list(dict.fromkeys(name for table in tables.values() for name in table))
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    rows = ((name, [f"{table[key]:g}" if key in table else "" for key in columns]) for name, table in tables.items())
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows), ""])
