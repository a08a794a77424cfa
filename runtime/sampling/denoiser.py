"""The velocity model of one video size: ``embed``, blocks and ``head`` over rows whose buffers are allocated once.

A row is one guidance branch of one sample. Graphs are bound to the first n rows, for as many n as are asked for, all
over the same memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from stiv_deploy.runtime.backends.base import Backend, Buffer, Call
from stiv_deploy.runtime.bundle.contract import TensorSpec, block_names
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.sampling.residuals import Residuals
from stiv_deploy.runtime.sampling.rope import rope_tables
from stiv_deploy.runtime.sampling.text_stage import TextRow


class RowModel(ABC):
    """The model over the rows of ``model_input``, at the numbers of ``timed``; it leaves the result in ``velocity``.

    All are buffers on ``backend``, for the most rows M = ``dims["model_batch"]``; graphs that it is not asked to run
    itself can be bound beside.
    """

    captures = True
    """Whether all of its calls may be captured together."""
    skips = False
    """Whether rows can skip the blocks, by :meth:`Denoiser.skipping_calls`."""
    model_input: Buffer
    velocity: Buffer
    timed: dict[str, Buffer]

    def __init__(self, backend: Backend, manifest: Manifest, dims: dict[str, int]) -> None:
        self.backend = backend
        self.model = manifest.model
        self.dims = dims
        self.specs = manifest.specs
        self._tables: Mapping[str, Buffer] = {}

    def tensor(self, graph: str, name: str) -> TensorSpec:
        """What the contract says of a tensor."""
        spec = self.specs[graph]
        return next(tensor for tensor in (*spec.inputs, *spec.outputs) if tensor.name == name)

    def bind(self, graph: str, **buffers: Buffer) -> Call:
        """Bind ``graph`` to ``buffers`` by name, the tables to this model's own."""
        spec, known = self.specs[graph], {**self._tables, **buffers}
        return self.backend.bind(
            graph,
            {tensor.name: known[tensor.name] for tensor in spec.inputs},
            {tensor.name: known[tensor.name] for tensor in spec.outputs},
        )

    @abstractmethod
    def calls(self, rows: int, **instead: Buffer) -> dict[str, Call]:
        """What computes ``velocity`` of the first ``rows`` rows, bound, by name in the order to run it in.

        It reads the buffers of ``instead``, by name, where its own would be read.
        """

    @abstractmethod
    def set_row(self, row: int, text: TextRow, micro: np.ndarray) -> None:
        """Give ``row`` its text and its micro-conditions, fp32 [6]."""

    @abstractmethod
    def move_row(self, target: int, source: int) -> None:
        """Put all that ``source`` is given, model input included, into ``target``."""


class Denoiser(RowModel):
    """Runs the transformer on the rows of ``model_input`` at their times and leaves the result in ``velocity``.

    Buffers, for the most rows M = ``dims["model_batch"]`` (see
    :func:`~stiv_deploy.runtime.bundle.contract.dimensions`): ``model_input`` and ``velocity`` fp32 [M, T, C, h, w],
    ``timed`` fp32 [M] each, by those names of :data:`TIMED` that the model has. Rows may hold anything until they are
    given text and micro-conditions: nobody takes the velocity of a row that no sample has.
    """

    def __init__(self, backend: Backend, manifest: Manifest, dims: dict[str, int]) -> None:
        super().__init__(backend, manifest, dims)
        timed = [("embed", each.name) for each in self.specs["embed"].inputs if each.name in TIMED]
        buffers = (*_ROW_BUFFERS, *timed)
        self._rows = {name: self._allocate(graph, name) for graph, name in buffers}
        self._text = {name: self._allocate("text_kv", name) for name in ("text_k", "text_v")}
        self._tables = {name: backend.upload(table) for name, table in rope_tables(self.model, dims).items()}
        self._spare_x = self._allocate("embed", "x")
        self.skips = manifest.skips
        self.model_input = self._rows["model_input"]
        self.timed = {name: self._rows[name] for _, name in timed}
        self.velocity = self._rows["velocity"]

    def _allocate(self, graph: str, name: str) -> Buffer:
        tensor = self.tensor(graph, name)
        return self.backend.empty(tensor.sized(self.dims), tensor.dtype)

    def calls(self, rows: int, **instead: Buffer) -> dict[str, Call]:
        """Graphs that compute ``velocity`` of the first ``rows`` rows, bound, by name in the order to run them in.

        They read the buffers of ``instead``, by name, where its own would be read.
        """
        first = self._first(rows, instead)
        x, spare = first.pop("x"), self._spare_x.first(rows)
        blocks, last, _ = self._blocks(rows, first, x, (spare, x))
        return {"embed": self.bind("embed", x=x, **first), **blocks, "head": self.bind("head", x=last, **first)}

    def skipping_calls(self, rows: int, *, blocks: bool, **instead: Buffer) -> dict[str, Call]:
        """As :meth:`calls`, but rows that ``skipped`` marks, of ``instead``, go on from their known residuals.

        Without ``blocks`` all of them must; with them every row's residual is left fresh, which says nothing of rows
        that skip. Of models with :attr:`skips` alone, as :attr:`residuals` are.
        """
        first = self._first(rows, instead)
        x, spares = self.residuals.first.first(rows), (first.pop("x"), self._spare_x.first(rows))
        computed, last, spare = dict[str, Call](), *spares  # where nobody looks at the last tokens they may be any
        if blocks:
            computed, last, spare = self._blocks(rows, first, x, spares)
            fresh = self.residuals.fresh.first(rows)
            computed |= {"residual": self.bind("residual", x=x, last=last, residual=fresh)}
        named = {f"residual_{place}": each.first(rows) for place, each in enumerate(self.residuals.known)}
        return {
            "embed": self.bind("embed", x=x, **first),
            **computed,
            "extrapolate": self.bind("extrapolate", x=x, last=last, x_out=spare, **named, **first),
            "head": self.bind("head", x=spare, **first),
        }

    @cached_property
    def residuals(self) -> Residuals:
        """What rows that skip the blocks go on from; allocated when the first one is to."""
        return Residuals(self.backend, self.tensor("residual", "x"), self.dims)

    def _first(self, rows: int, instead: Mapping[str, Buffer]) -> dict[str, Buffer]:
        return {name: buffer.first(rows) for name, buffer in (self._rows | dict(instead)).items()}

    def _blocks(
        self, rows: int, first: Mapping[str, Buffer], x: Buffer, spares: tuple[Buffer, Buffer]
    ) -> tuple[dict[str, Call], Buffer, Buffer]:
        """Blocks that read ``x``, and write the ``spares`` by turns; which of these has the result, and the other."""
        calls, (x_out, other) = {}, spares
        for index, name in enumerate(block_names(self.model.blocks)):
            text = {key: buffer[index].first(rows) for key, buffer in self._text.items()}
            calls[name] = self.bind(name, x=x, x_out=x_out, **first, **text)
            x, x_out, other = x_out, other, x_out
        return calls, other, x_out

    def set_row(self, row: int, text: TextRow, micro: np.ndarray) -> None:
        """Give ``row`` its text and its micro-conditions, fp32 [6]."""
        self.backend.write(self._rows["micro"][row], micro)
        self.backend.copy(self._rows["pooled"][row], text.pooled)
        self.backend.copy(self._rows["text_mask"][row], text.mask)
        for name, own in (("text_k", text.k), ("text_v", text.v)):
            for block in range(self.model.blocks):
                self.backend.copy(self._text[name][block][row], own[block])

    def move_row(self, target: int, source: int) -> None:
        """Put all that ``source`` is given, model input included, into ``target``."""
        for name in ("micro", "pooled", "text_mask", "model_input"):
            self.backend.copy(self._rows[name][target], self._rows[name][source])
        for buffer in self._text.values():
            for block in range(self.model.blocks):
                self.backend.copy(buffer[block][target], buffer[block][source])
        if "residuals" in vars(self):
            self.residuals.move_row(target, source)


TIMED = {"timestep": "timestep", "guidance": "scale", "target_time": "next_timestep"}
"""What ``embed`` takes of every evaluation, a number for each row: which field of
:class:`~stiv_deploy.runtime.sampling.solvers.Evaluation` it is. All but the time are of students."""
_ROW_BUFFERS = (
    ("text_encoder", "pooled"),
    ("embed", "model_input"),
    ("embed", "micro"),
    ("embed", "x"),
    ("embed", "modulation"),
    ("embed", "condition"),
    ("block_00", "text_mask"),
    ("head", "velocity"),
)
"""Graph and tensor of each buffer whose first axis is the rows."""
