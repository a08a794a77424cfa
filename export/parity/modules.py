"""The error of every module of one graph, each alone: on what the reference really feeds it, against what it gives.

The graph is cut (:mod:`~stiv_deploy.export.parity.cuts`) where values enter and leave the reference's modules. These
values come from one run of the reference, rounded to the graph's type. Every piece then starts from them, in the graph
as in the reference in float64 and in the bundle's precision: an error stays in the piece that makes it, and the first
piece beyond its bound is the one to look at.

Bounds are those of the parity ladder. Pieces with 8-bit operators are compared with the fake-quantized reference that
computes in float32, as golden answers are: by the draws of :mod:`~stiv_deploy.export.graphs.draws`, and never tighter
than in 16 bits, as one module sums fewer flipped codes than a block.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor

from stiv_deploy.export.graphs.draws import DRAWS, quantized_gate, rel_l2
from stiv_deploy.export.graphs.golden import wiggled
from stiv_deploy.export.parity.cuts import CutGraph, Ends, Piece
from stiv_deploy.export.parity.ladder import Sides, gate_of
from stiv_deploy.export.parity.lean import OneAtATime
from stiv_deploy.export.parity.oracle import Oracle, Tensors
from stiv_deploy.export.parity.traffic import Forced, Traffic, leaves_of, root_of, traffic
from stiv_deploy.runtime.bundle.contract import Frozen, Precision

Run = Callable[[onnx.ModelProto, dict[str, np.ndarray]], list[np.ndarray]]
"""Runs a model on inputs, and returns its outputs."""


class ModuleRow(Frozen):
    """The error of one piece of a graph: what a module computes, or what the code around it does before it.

    ``module`` holds the piece (empty: the graph itself); ``before`` is what its value goes into where it is no module
    of its own. ``rel_l2`` is the error, ``plain_torch`` that of plain PyTorch in the same precision, both relative L2.
    """

    module: str
    before: str
    operators: tuple[str, ...]
    rel_l2: float | None
    plain_torch: float
    bound: float
    passed: bool


class Judge(NamedTuple):
    """What a value is to be, and how far from it passes."""

    truth: Tensor
    yardstick: float
    bound: float


class Measured(NamedTuple):
    """One piece with its row and what it was held against."""

    piece: Piece
    row: ModuleRow
    judge: Judge


class Modules:
    """The pieces of ``graph`` in the file of ``cut``, on the inputs ``given``."""

    def __init__(self, cut: CutGraph, graph: str, given: Tensors, sides: Sides, precision: Precision) -> None:
        self.cut, self.graph, self.given, self.precision = cut, graph, given, precision
        self._draws = sides.draws if sides.draws is not None and sides.draws.judge(graph) else None
        self._truth, self._plain = (alone(side, graph) for side in (sides.truth, sides.plain))
        self.cuts, self.forced = self._forced(alone(self._draws.wide, graph) if self._draws else self._truth)
        self._exact = self._judges()
        self._quantized = self._quantized_judges() if self._draws else {}

    def _forced(self, source: Oracle) -> tuple[dict[str, Ends], Tensors]:
        """Where the graph can be cut, and the values there in the graph's types, from a run of ``source``."""
        ends = self.cut.ends(leaves_of(root_of(self._truth, self.graph)))
        free = traffic(source, self.graph, self.given, ends)
        cuts = {name: each for name, each in ends.items() if self._fits(name, each, free)}
        values = values_of(cuts, free)
        return cuts, {
            name: values[name].to(getattr(torch, self.cut.values[name].dtype)).contiguous()
            for ends in cuts.values()
            for name in ends
            if name
        }

    def _fits(self, name: str, ends: Ends, free: Traffic) -> bool:
        """Whether a module was called once, with tensors of the shapes that the graph has."""
        pairs = ((ends.entering, free.entering.get(name)), (ends.leaving, free.leaving.get(name)))
        return free.calls[name] == 1 and all(
            tensor is not None and tuple(tensor.shape) == self.cut.values[value].shape
            for value, tensor in pairs
            if value
        )

    def _values(self, oracle: Oracle, given: Mapping[str, Tensor], forced: Mapping[str, Tensor]) -> Tensors:
        """The value at every cut and output as ``oracle`` computes it from ``given`` and the ``forced`` values."""
        pairs = {
            name: Forced(forced[ends.entering] if ends.entering else None, forced[ends.leaving])
            for name, ends in self.cuts.items()
        }
        return values_of(self.cuts, traffic(oracle, self.graph, given, self.cuts, pairs))

    def _judges(self) -> dict[str, Judge]:
        truth, plain = (self._values(side, self.given, self.forced) for side in (self._truth, self._plain))
        errors = {name: rel_l2(plain[name], truth[name]) for name in truth}
        return {name: Judge(truth[name], error, gate_of("op", self.precision, error)) for name, error in errors.items()}

    def _quantized_judges(self) -> dict[str, Judge]:
        assert self._draws is not None
        plain, wide = (alone(side, self.graph) for side in (self._draws.plain, self._draws.wide))
        truth = self._values(wide, self.given, self.forced)
        draws = [self._values(plain, self.given, self.forced)]
        for seed in range(1, DRAWS):
            moved = (wiggled(each, self.precision, seed) for each in (self.given, self.forced))
            draws.append(self._values(wide, *moved))
        return {name: self._judge(truth[name], [draw[name] for draw in draws]) for name in truth}

    def _judge(self, truth: Tensor, draws: list[Tensor]) -> Judge:
        errors = [rel_l2(draw, truth) for draw in draws]
        bound = max(quantized_gate(self.precision, errors), gate_of("op", self.precision, errors[0]))
        return Judge(truth, statistics.fmean(errors), bound)

    def judge(self, piece: Piece) -> Judge:
        """What ``piece`` is held against."""
        return (self._quantized if piece.quantized else self._exact)[piece.value]

    def feed(self, piece: Piece) -> dict[str, np.ndarray]:
        """The inputs of ``piece``; bfloat16, which numpy has not, as float32."""
        values = self.given | self.forced
        return {name: as_array(values[name]) for name in piece.inputs}

    def measure(self, run: Run) -> Iterator[Measured]:
        """Every piece in the order of the graph."""
        for piece in self.cut.pieces(self.cuts):
            judge = self.judge(piece)
            (found,) = run(self.cut.model_of(piece), self.feed(piece))
            error = rel_l2(torch.from_numpy(found), judge.truth)
            row = ModuleRow(
                module=piece.module,
                before=piece.before,
                operators=piece.operators,
                rel_l2=error if np.isfinite(error) else None,
                plain_torch=judge.yardstick,
                bound=judge.bound,
                passed=error <= judge.bound,
            )
            yield Measured(piece, row, judge)


def values_of(cuts: Mapping[str, Ends], seen: Traffic) -> Tensors:
    """Tensors by the names of the graph's values; what leaves one module and enters the next is the first one's."""
    entering = {ends.entering: seen.entering[name] for name, ends in cuts.items() if ends.entering}
    return {**seen.outputs, **entering, **{ends.leaving: seen.leaving[name] for name, ends in cuts.items()}}


def alone(oracle: Oracle, graph: str) -> Oracle:
    """The oracle that runs ``graph``: of one that holds a graph at a time, the one that it holds."""
    return oracle.of(graph) if isinstance(oracle, OneAtATime) else oracle


def as_array(value: Tensor) -> np.ndarray:
    """``value`` for numpy."""
    return (value.float() if value.dtype == torch.bfloat16 else value).contiguous().numpy()
