"""The velocity model over several devices, in the place of the one of a single device."""

import weakref
from collections.abc import Mapping
from functools import partial

import numpy as np

from stiv_deploy.runtime.backends.base import Buffer, Call
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.sampling.denoiser import RowModel
from stiv_deploy.runtime.sampling.parallel.messages import Message
from stiv_deploy.runtime.sampling.parallel.rank import Rank, Work
from stiv_deploy.runtime.sampling.parallel.shards import group_rows
from stiv_deploy.runtime.sampling.parallel.team import Team, size_message
from stiv_deploy.runtime.sampling.text_stage import TextRow


class ParallelDenoiser(RowModel):
    """Rows of the model, dealt out to the devices of ``team``; ``model_input`` and ``velocity`` are the leader's.

    Row r is computed by group r mod groups, whatever other rows there are.
    """

    captures = False

    def __init__(self, team: Team, manifest: Manifest, dims: dict[str, int], *, capture: bool = True) -> None:
        super().__init__(team.backend, manifest, dims)
        self.team = team
        self._capture = capture
        placement = team.placement.fitting(dims["token_frames"], dims["tokens"])
        self.work = Work(team.new_key(), dims, placement)
        self._ranks = range(placement.size)
        rows, latents = dims["model_batch"], self.tensor("head", "model_input").sized(dims)
        self.model_input, self.velocity = (self.backend.empty(latents, "float32") for _ in range(2))
        self._own = Rank(self.backend, manifest, self.work, team.transport)
        self.timed = {name: self.backend.empty((rows,), "float32") for name in self._own.timed}
        self._given: dict[int, Mapping[str, np.ndarray]] = {}
        team.tell(self._ranks, size_message(self.work))
        weakref.finalize(self, _forget, team, self._own, self._ranks).atexit = False

    def calls(self, rows: int, **instead: Buffer) -> dict[str, Call]:
        """As :meth:`RowModel.calls` says: what the leader does, the first of which lets the others begin."""
        placement = self.work.placement
        busy = [rank for rank in self._ranks if group_rows(rows, placement.guidance, placement.group_of(rank))]
        key = {"key": self.work.key, "rows": rows}
        self.team.tell(busy, Message("bind", {**key, "capture": int(self._capture)}))
        leader = {"model_input": self.model_input, "velocity": self.velocity, **self.timed, **instead}
        own = self._own.calls(rows, leader, capture=self._capture)
        calls: dict[str, Call] = {"begin": partial(self.team.tell, busy, Message("run", key)), **own}
        return {name: self.team.guarded(call) for name, call in calls.items()}

    def set_row(self, row: int, text: TextRow, micro: np.ndarray) -> None:
        """As :meth:`RowModel.set_row` says."""
        buffers = {"pooled": text.pooled, "text_mask": text.mask, "text_k": text.k, "text_v": text.v}
        given = {name: self._bytes(buffer) for name, buffer in buffers.items()}
        self._give(row, {**given, "micro": micro.astype(np.float32).view(np.uint8)})

    def _bytes(self, buffer: Buffer) -> np.ndarray:
        return self.backend.read(buffer.raw)

    def _give(self, row: int, given: Mapping[str, np.ndarray]) -> None:
        """Send what ``row`` is given to the devices of its group."""
        self._given[row] = given
        groups = self.work.placement.groups
        own, group = row // len(groups), groups[row % len(groups)]
        if 0 in group:
            self._own.set_row(own, given)
        self.team.tell(group, Message("row", {"key": self.work.key, "row": own}, given))

    def move_row(self, target: int, source: int) -> None:
        """As :meth:`RowModel.move_row` says; the other row may be of another group, so it is given anew."""
        self._give(target, self._given[source])
        self.backend.copy(self.model_input[target], self.model_input[source])


def _forget(team: Team, own: Rank, ranks: range) -> None:
    """Free a work on all devices, unless they are gone."""
    own.free()
    team.forget(ranks, own.work.key)
