"""What one device does for a clip that several make: its rows, its frames and positions, and the graphs over them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from stiv_deploy.runtime.backends.base import ITEM_BYTES, Backend, Buffer, Call, run_in_order
from stiv_deploy.runtime.bundle.contract import TensorSpec, block_names, half_names
from stiv_deploy.runtime.bundle.engine_files import shard
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.sampling.denoiser import TIMED
from stiv_deploy.runtime.sampling.parallel.placement import Placement
from stiv_deploy.runtime.sampling.parallel.shards import (
    Moves,
    back,
    group_rows,
    share_frames,
    share_numbers,
    spans,
    to_frames,
    to_positions,
)
from stiv_deploy.runtime.sampling.parallel.transport import Part, Transport
from stiv_deploy.runtime.sampling.replay import Replay
from stiv_deploy.runtime.sampling.rope import rope_tables

Dims = Mapping[str, int]
GIVEN = ("micro", "pooled", "text_mask", "text_k", "text_v")
"""What a row is given once, when it joins."""


@dataclass(frozen=True)
class Work:
    """Clips of one size on the devices of ``placement``: ``dims`` are those of all of it, as one device would have it.

    Exchanges of different works have different names: ``key`` tells them apart.
    """

    key: int
    dims: Dims
    placement: Placement

    def exchanges(self, rows: int, width: int, latents: TensorSpec, factor: int) -> dict[str, Moves]:
        """What moves in an evaluation of ``rows`` rows, by what it is; of tokens of ``width`` bytes.

        ``latents`` are what the model sees, ``factor`` frames of them to a token. ``to_positions`` and ``to_frames``
        are of all groups, and happen in every block.
        """
        groups, dims = self.placement.groups, self.dims
        frames, tokens = dims["token_frames"], dims["tokens"]
        size = latents.sized(dict(dims))
        frame = ITEM_BYTES[latents.dtype] * int(np.prod(size[2:]))
        given = share_frames(groups, rows, frames, factor, frame)
        counts = [group_rows(rows, len(groups), group) for group in range(len(groups))]
        shared = [(ranks, count, frames, tokens, width) for ranks, count in zip(groups, counts, strict=True) if count]
        return {
            "model_input": given,
            "timed": share_numbers(groups, rows, 4),
            "to_positions": tuple(move for each in shared for move in to_positions(*each)),
            "to_frames": tuple(move for each in shared for move in to_frames(*each)),
            "velocity": back(given),
        }


class Rank:
    """The share of one device in ``work``: buffers for its rows, and graphs bound to them.

    ``x`` lies in four buffers: shares of the frames before and after the first half of a block, shares of the positions
    before and after the second. Where a group is one device blocks are whole, and two buffers do.
    """

    def __init__(self, backend: Backend, manifest: Manifest, work: Work, transport: Transport) -> None:
        self.backend, self.manifest, self.work = backend, manifest, work
        self.model, self.specs = manifest.model, manifest.specs
        self.transport = transport
        placement, dims = work.placement, work.dims
        rank = transport.rank
        group = placement.group_of(rank)
        self.group, self._index = placement.groups[group], rank % placement.sequence
        self._rows_of = partial(group_rows, groups=placement.guidance, group=group)
        own = {"model_batch": self._rows_of(dims["model_batch"])}
        times, places = (spans(dims[name], placement.sequence)[self._index] for name in ("token_frames", "tokens"))
        self._in_frames = {**dims, **own, **shard(self.model, "token_frames", times.size)}
        self._in_positions = {**dims, **own, **shard(self.model, "tokens", places.size)}
        self._buffers = dict(self._allocated()) if own["model_batch"] else {}
        whole = rope_tables(self.model, dict(dims))
        mine = {name: np.ascontiguousarray(whole[name][slice(*times)]) for name in whole if name.startswith("temporal")}
        self._tables, self._frame_tables = (
            {name: backend.upload(table) for name, table in tables.items()} for tables in (whole, mine)
        )

    def _allocated(self) -> Iterator[tuple[str, Buffer]]:
        """Buffers of this device's rows, by name."""
        specs = self.specs
        named = {tensor.name: tensor for graph in ("embed", "head") for tensor in specs[graph].inputs}
        named |= {tensor.name: tensor for graph in ("embed", "head") for tensor in specs[graph].outputs}
        named |= {tensor.name: tensor for tensor in (*specs["text_encoder"].outputs, *specs["block_00"].inputs)}
        named |= {tensor.name: tensor for tensor in specs["text_kv"].outputs}  # of all blocks
        for name in (*self.timed, *GIVEN, "model_input", "velocity", "x", "modulation", "condition"):
            yield name, self._empty(named[name], self._in_frames)
        for name in ("x_frames",) if self.whole else ("x_frames", "x_positions", "y_positions"):
            yield name, self._empty(named["x"], self._in_frames if name == "x_frames" else self._in_positions)

    def _empty(self, tensor: TensorSpec, dims: Dims) -> Buffer:
        return self.backend.empty(tensor.sized(dict(dims)), tensor.dtype)

    @property
    def whole(self) -> bool:
        """Whether this device has all frames and positions of its rows."""
        return self.work.placement.sequence == 1

    @property
    def timed(self) -> list[str]:
        """Numbers of every evaluation, one a row."""
        return [tensor.name for tensor in self.specs["embed"].inputs if tensor.name in TIMED]

    def set_row(self, row: int, given: Mapping[str, np.ndarray]) -> None:
        """Give ``row`` of this device's its text and micro-conditions: bytes of :data:`GIVEN`, uint8 [n] each."""
        for name in ("micro", "pooled", "text_mask"):
            self._write(self._buffers[name][row], given[name])
        for name in ("text_k", "text_v"):
            for buffer, part in zip(self._blocks(name), np.split(given[name], self.model.blocks), strict=True):
                self._write(buffer[row], part)

    def _blocks(self, name: str) -> list[Buffer]:
        return [self._buffers[name][index] for index in range(self.model.blocks)]

    def _write(self, buffer: Buffer, raw: np.ndarray) -> None:
        self.backend.write(buffer.raw, raw)

    def calls(self, rows: int, leader: Mapping[str, Buffer] | None = None, *, capture: bool = True) -> dict[str, Call]:
        """What this device does in an evaluation of ``rows`` rows of all of the work, by name, in order.

        On the leader, whose buffers ``leader`` are: ``model_input`` and the numbers of each row, given out, and
        ``velocity``, which comes back. With ``capture`` each graph is replayed where the backend records calls.
        """
        count = self._rows_of(rows)
        if not count and leader is None:
            return {}
        exchange = _Exchanges(self, rows, leader or {})
        calls: dict[str, Call] = {}
        own = self._first(count)
        calls["share inputs"] = exchange.share(["model_input", *self.timed], own)
        if count:
            calls |= {
                name: call if name.startswith(_Exchanges.NAMES) else Replay(self.backend, {name: call}, capture=capture)
                for name, call in self._model(count, own, exchange).items()
            }
        calls["gather velocity"] = exchange.gather("velocity", own.get("velocity"))
        return calls

    def _first(self, count: int) -> dict[str, Buffer]:
        """Buffers of the first ``count`` rows, but for the text of blocks."""
        some = {name: buffer for name, buffer in self._buffers.items() if name not in ("text_k", "text_v")}
        return {name: buffer.first(count) for name, buffer in some.items()} if count else {}

    def _model(self, count: int, own: dict[str, Buffer], exchange: "_Exchanges") -> dict[str, Call]:
        """``embed``, blocks or their halves with what moves between them, and ``head``."""
        frame_tables = self._tables | self._frame_tables
        calls = {"embed": self._bind("embed", frame_tables | own)}
        x, other = own["x"], own["x_frames"]
        for index, names in enumerate(self._names()):
            text = {name: self._blocks(name)[index].first(count) for name in ("text_k", "text_v")}
            if len(names) == 1:
                calls[names[0]] = self._bind(names[0], self._tables | own | text | {"x": x, "x_out": other})
                x, other = other, x
                continue
            spatial, mixed = names
            before, after = own["x_positions"], own["y_positions"]
            calls[spatial] = self._bind(spatial, frame_tables | own | {"x": x, "x_out": other})
            calls[f"to_positions_{index:02d}"] = exchange.switch("to_positions", index, other, before)
            calls[mixed] = self._bind(mixed, self._tables | own | text | {"x": before, "x_out": after})
            calls[f"to_frames_{index:02d}"] = exchange.switch("to_frames", index, after, x)
        return calls | {"head": self._bind("head", own | {"x": x})}

    def _names(self) -> list[tuple[str, ...]]:
        """Graphs of each block."""
        count = self.model.blocks
        return [(name,) for name in block_names(count)] if self.whole else list(half_names(count))

    def _bind(self, graph: str, known: Mapping[str, Buffer]) -> Call:
        spec = self.specs[graph]
        inputs, outputs = (
            {tensor.name: known[tensor.name] for tensor in tensors} for tensors in (spec.inputs, spec.outputs)
        )
        return self.backend.bind(graph, inputs, outputs)

    def run(self, calls: Mapping[str, Call]) -> None:
        """Make ``calls``."""
        run_in_order(list(calls.values()))

    def free(self) -> None:
        """Let go of what others may still hold of this device."""
        self.transport.forget(f"{self.work.key}/")


class _Exchanges:
    """Binds the exchanges of one number of rows, with the leader's buffers where this is the leader."""

    NAMES = ("share ", "to_positions_", "to_frames_", "gather ")

    def __init__(self, rank: Rank, rows: int, leader: Mapping[str, Buffer]) -> None:
        self._rank, self._rows, self._leader = rank, rows, leader
        x, latents = (
            next(each for each in rank.specs["head"].inputs if each.name == name) for name in ("x", "model_input")
        )
        width = rank.model.width * ITEM_BYTES[x.dtype]
        self._moves = rank.work.exchanges(rows, width, latents, rank.model.patch[0])

    def share(self, names: Sequence[str], own: Mapping[str, Buffer]) -> Call:
        """The leader's buffers of ``names`` to ``own``."""
        parts = [Part(self._moves.get(name, self._moves["timed"]), self._lead(name), own.get(name)) for name in names]
        return self._bound("inputs", parts)

    def gather(self, name: str, own: Buffer | None) -> Call:
        """``own`` to the leader's buffer ``name``."""
        return self._bound(name, [Part(self._moves[name], own, self._lead(name))])

    def _lead(self, name: str) -> Buffer | None:
        return self._leader[name].first(self._rows) if self._leader else None

    def switch(self, kind: str, index: int, source: Buffer, target: Buffer) -> Call:
        """Between two shares of x, in block ``index``, within this rank's group."""
        rank = self._rank
        moves = tuple(move for move in self._moves[kind] if move.source in rank.group)
        return self._bound(f"{kind} {index}", [Part(moves, source, target)])

    def _bound(self, name: str, parts: Sequence[Part]) -> Call:
        return self._rank.transport.bind(f"{self._rank.work.key}/{self._rows}/{name}", parts)
