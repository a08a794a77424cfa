"""Large frames through the VAE piece by piece, so that memory does not grow with the frame.

A frame is cut into overlapping tiles of equal size. Where two overlap, the result crosses over from one to the other
along a straight line in the middle half of the overlap; the quarter next to a tile's edge, where the tile misses its
neighbour's pixels, is not used at all. So a decoder that looks at most a quarter of the overlap far gives the same
video with tiles as without. Others (group norms, attention over the frame) differ a little from tile to tile, which
the crossing hides. A VAE that codes every frame on its own also takes a few frames at a time, a causal one all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.backends.pieces import Bind, PieceCoder
from stiv_deploy.runtime.bundle.contract import GraphSpec, ModelFacts, dimensions
from stiv_deploy.runtime.bundle.manifest import Bucket
from stiv_deploy.runtime.errors import RequestError

PIXELS_AT_ONCE = 2**20
"""Pixels of a frame, times latent frames, that a VAE codes in one call unless told otherwise: 4 frames of 512x512.

The decoder of Stable Diffusion takes some 2 KiB a pixel in float32, so that this is about 2 GiB.
"""
TILE = 512
"""Height and width of a tile in pixels unless told otherwise: what image VAEs are trained and used at."""
OVERLAP = 4
"""A tile's overlap with the next one is this part of it: a quarter."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Equal pieces of one axis of ``total`` latents: ``size`` each, from ``starts``."""

    total: int
    size: int
    starts: tuple[int, ...]

    def slices(self, unit: int) -> list[slice]:
        """The pieces along an axis of ``unit`` values per latent."""
        return [slice(start * unit, (start + self.size) * unit) for start in self.starts]

    def windows(self, unit: int) -> list[np.ndarray]:
        """Weight of every value of each piece, fp32 [size * unit], which sum to one at every value of the axis."""
        values = np.arange(self.total * unit) + 0.5
        reached = [np.ones_like(values), *(self._crossing(index, unit, values) for index in range(1, len(self.starts)))]
        shares = [now - after for now, after in zip(reached, [*reached[1:], np.zeros_like(values)], strict=True)]
        return [share[part].astype(np.float32) for share, part in zip(shares, self.slices(unit), strict=True)]

    def _crossing(self, index: int, unit: int, values: np.ndarray) -> np.ndarray:
        """0 before the crossing from piece ``index - 1`` to ``index``, 1 after it, a straight line inside.

        It is half as wide as the shortest overlap, or as the distance of the two pieces where that is less: then no
        two crossings meet, however far the pieces overlap.
        """
        left, right = self.starts[index - 1], self.starts[index]
        centre = (right + left + self.size) / 2
        width = min(_overlap(self.size) / 2, right - left)
        return np.clip((values / unit - centre) / width + 0.5, 0, 1)


def _overlap(size: int) -> int:
    """Least overlap of pieces of ``size`` latents."""
    return max(1, size // OVERLAP)


def tiles(total: int, size: int) -> Cut:
    """As few overlapping pieces as cover ``total``, evenly spread; ``size`` is at least 2 where it is less."""
    if size >= total:
        return Cut(total=total, size=total, starts=(0,))
    count = 1 + -(-(total - size) // (size - _overlap(size)))
    starts = tuple(index * (total - size) // (count - 1) for index in range(count))
    return Cut(total=total, size=size, starts=starts)


def chunks(total: int, size: int) -> Cut:
    """Pieces one after another, for axes whose values are coded on their own; the last goes back to be whole."""
    size = min(size, total)
    return Cut(total=total, size=size, starts=tuple(min(start, total - size) for start in range(0, total, size)))


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """How latents [B, T, C, h, w] are cut: videos, frames, rows and columns."""

    batch: Cut
    frames: Cut
    height: Cut
    width: Cut

    @property
    def tiled(self) -> bool:
        """Whether frames are cut."""
        return len(self.height.starts) > 1 or len(self.width.starts) > 1

    def piece(self, model: ModelFacts) -> dict[str, int]:
        """Symbol values of the contract for one piece."""
        return dimensions(
            model,
            batch=self.batch.size,
            model_batch=self.batch.size,
            video_frames=model.video_frames(self.frames.size),
            height=self.height.size * model.spatial_factor,
            width=self.width.size * model.spatial_factor,
            text_tokens=model.max_text_tokens,
        )


def check_tile(model: ModelFacts, bucket: Bucket, tile: int | None) -> None:
    """Raise :class:`RequestError` if ``tile`` pixels are no tile that the graphs of ``bucket`` can take."""
    unit = model.pixel_multiple
    least = max(bucket.height.min, bucket.width.min, 2 * model.spatial_factor)
    least = -(-least // unit) * unit
    if tile is not None and tile != 0 and (tile < least or tile % unit):
        raise RequestError(
            f"decode_tile is {tile}; this bundle takes {least} or more in multiples of {unit}, or 0 for whole frames"
        )


def plan_tiles(
    model: ModelFacts,
    bucket: Bucket,
    dims: dict[str, int],
    tile: int | None = None,
    pixels: int = PIXELS_AT_ONCE,
    devices: int = 1,
) -> TilePlan:
    """The plan for a video of ``dims`` that ``bucket`` holds.

    ``tile`` is the height and width of a tile in pixels (see :func:`check_tile`), 0 for the whole video at once, and
    ``None`` for what fits ``pixels``: whole frames, else tiles, and as many frames and videos as there is room for. No
    piece is smaller than the bucket's smallest video. For several ``devices`` frames are cut to a piece for each.
    """
    height, width, frames, batch = (dims[name] for name in ("latent_height", "latent_width", "frames", "batch"))
    factor, whole = model.spatial_factor, tile == 0
    together = frames if model.causal_vae else 1
    if tile is None:
        tile = 0 if height * width * factor**2 * together <= pixels else _automatic(model, bucket)
    sides = {"height": height, "width": width}
    rows, columns = (tiles(total, tile // factor if tile else total) for total in sides.values())
    room = pixels // (rows.size * columns.size * factor**2)
    at_once = frames if whole or model.causal_vae else max(room, 1, model.latent_frames(bucket.frames.min))
    if devices > 1 and not (whole or model.causal_vae):
        at_once = min(at_once, max(-(-frames // devices), model.latent_frames(bucket.frames.min)))
    at_once = min(frames, at_once)
    videos = batch if whole else max(room // at_once, bucket.batch.min)
    return TilePlan(batch=chunks(batch, videos), frames=chunks(frames, at_once), height=rows, width=columns)


def _automatic(model: ModelFacts, bucket: Bucket) -> int:
    """The usual tile, in pixels, as the bucket and the transformer's patches allow it."""
    unit = model.pixel_multiple
    return -(-max(TILE, bucket.height.min, bucket.width.min) // unit) * unit


Begin = Callable[[np.ndarray], Callable[[], np.ndarray]]
"""Begins to code a piece on another device; what it returns waits for the result, which is there until the next one."""


class TiledGraph:
    """The ``decoder`` or ``image_encoder`` of one video size, bound to buffers of one piece of ``plan``.

    ``after`` is a graph that takes its result on the device, and what binds it; of frames that are cut there is none,
    as tiles are blended on the host. ``others`` are more devices, with the same graphs, that pieces are shared with.
    """

    def __init__(
        self,
        backend: Backend,
        spec: GraphSpec,
        bind: Bind,
        model: ModelFacts,
        plan: TilePlan,
        after: tuple[GraphSpec, Bind] | None = None,
        others: Sequence[Begin] = (),
    ) -> None:
        assert after is None or not plan.tiled
        (source,), (target,) = spec.inputs, spec.outputs
        self.plan = plan
        self._shape = target.sized(plan.piece(model))
        self._code = PieceCoder(backend, [(spec, bind), *([after] if after else [])], plan.piece(model))
        self._others = tuple(others)
        self._units = tuple(_units(model, shape) for shape in (source.shape, target.shape))

    def __call__(self, given: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Code ``given`` [B, T or F, ...]; yields videos, frames and their result, one chunk after another.

        Where chunks meet at the end, the last one yields some videos or frames again, with equal values. A result is
        there until the next is asked for.
        """
        (before, space), (after, _) = self._units
        frames = list(zip(self._frames(before), self._frames(after), strict=True))
        chunks = [(rows, source, target) for rows in self.plan.batch.slices(1) for source, target in frames]
        coded = self._coded(piece for rows, source, _ in chunks for piece in self._pieces(given[rows, source], space))
        for rows, _, target in chunks:
            yield rows, target, self._joined(coded)

    def _frames(self, unit: int) -> list[slice]:
        """The frames of each chunk; of a causal VAE the only one is all."""
        return [slice(None)] if len(self.plan.frames.starts) == 1 else self.plan.frames.slices(unit)

    def _pieces(self, chunk: np.ndarray, unit: int) -> Iterator[np.ndarray]:
        """What is coded at a time of one chunk of videos and frames: its tiles, or all of it."""
        if not self.plan.tiled:
            yield chunk
            return
        for tile in self._tiles(unit):
            yield chunk[..., *tile]

    def _coded(self, pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Results of ``pieces``, in order; as many at a time as there are devices."""
        while some := list(islice(pieces, 1 + len(self._others))):
            waiting = [begin(piece) for begin, piece in zip(self._others, some[1:], strict=False)]
            yield self._code(some[0])
            for wait in waiting:
                yield wait()

    def _joined(self, coded: Iterator[np.ndarray]) -> np.ndarray:
        """The result of one chunk: its tiles, blended."""
        if not self.plan.tiled:
            return next(coded)
        space = self._units[1][1]
        size = (self.plan.height.total * space, self.plan.width.total * space)
        result = np.zeros((*self._shape[:3], *size), dtype=np.float32)
        for target, window in zip(self._tiles(space), self._windows(space), strict=True):
            result[..., *target] += next(coded) * window
        return result

    def _tiles(self, unit: int) -> list[tuple[slice, slice]]:
        columns = self.plan.width.slices(unit)
        return [(row, column) for row in self.plan.height.slices(unit) for column in columns]

    def _windows(self, unit: int) -> Iterator[np.ndarray]:
        """Weights fp32 [height, width] of every tile."""
        columns = self.plan.width.windows(unit)
        return (row[:, None] * column for row in self.plan.height.windows(unit) for column in columns)


def _units(model: ModelFacts, shape: tuple[Any, ...]) -> tuple[int, int]:
    """Frames and pixels per latent of a tensor of the contract: 1 for latents, the VAE's factors for video."""
    return (model.temporal_factor, model.spatial_factor) if "video_frames" in shape else (1, 1)
