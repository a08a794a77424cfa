"""An exported program in operators that the exporter can translate, without tracing it a second time.

``torch.onnx.export`` has PyTorch decompose what it has no translation for, which traces the whole program anew and
takes longer than the first trace. In the graphs of a bundle that is a handful of shape operators and abbreviations:
they are rewritten where they stand, into what the decomposition makes of them. A program with anything else in it is
decomposed by PyTorch.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any
from unittest.mock import patch

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten
Table = Mapping[Any, Any]
"""What decomposes each operator that has no translation, as the exporter hands it to PyTorch."""


@contextmanager
def rewritten_if_possible(program: ExportedProgram, known: Callable[[Any], bool]) -> Iterator[None]:
    """Inside, what ``torch.onnx.export`` has ``program`` decompose is only rewritten, where that is enough.

    ``known`` says whether the exporter has a translation of an operator.
    """
    decompose = program.run_decompositions

    def decomposed(table: Table) -> ExportedProgram:
        return rewrite(program) if rewritable(program, table, known) else decompose(dict(table))

    with patch.object(program, "run_decompositions", decomposed):
        yield


def rewritable(program: ExportedProgram, table: Table, known: Callable[[Any], bool]) -> bool:
    """Whether every operator of ``program`` is translated as it stands or rewritten here, and none writes in place."""

    def fits(node: Node) -> bool:
        target = node.target
        if node.op != "call_function" or target in REWRITES or target in ASSERTIONS:
            return node.op == "call_function"
        writes = isinstance(target, OpOverload) and target._schema.is_mutable
        return known(target) and target not in table and not writes

    nodes = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    return all(fits(node) for node in nodes if node.users or node.is_impure())


def rewrite(program: ExportedProgram) -> ExportedProgram:
    """``program`` itself, with the operators of :data:`REWRITES` in others' words; nodes keep their names."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target in ASSERTIONS:
            graph.erase_node(node)
        elif node.target in REWRITES:
            with graph.inserting_before(node):
                node.target, node.args, node.kwargs = REWRITES[node.target](node, *node.args, **node.kwargs)
    graph.eliminate_dead_code()
    return program


Size = int | Node
"""A size that is fixed, or the node that takes it."""
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An operator with its arguments and its options."""


def _to_copy(_: Node, x: Node, dtype: Any, *_rest: Any, **_options: Any) -> Call:
    return aten._to_copy.default, (x,), {"dtype": dtype}


def _power(_: Node, x: Node) -> Call:
    return aten.pow.Tensor_Scalar, (x, 2), {}


def _difference(_: Node, x: Node, other: Any, alpha: Any = 1) -> Call:
    return aten.sub.Tensor, (other, x), {} if alpha == 1 else {"alpha": alpha}


def _flatten(node: Node, x: Node, start_dim: int = 0, end_dim: int = -1) -> Call:
    sizes = _sizes(node, x)
    first, last = start_dim % len(sizes), end_dim % len(sizes)
    whole = reduce(partial(_times, node), sizes[first : last + 1])
    return aten.reshape.default, (x, [*sizes[:first], whole, *sizes[last + 1 :]]), {}


def _unflatten(node: Node, x: Node, dim: int, sizes: list[Size]) -> Call:
    outer = _sizes(node, x)
    dim %= len(outer)
    return aten.reshape.default, (x, [*outer[:dim], *sizes, *outer[dim + 1 :]]), {}


def _sizes(node: Node, x: Node) -> list[Size]:
    """Sizes of a tensor of the trace, as ``node`` needs them."""
    return [
        size if isinstance(size, int) else _new(node, aten.sym_size.int, (x, dim), size)
        for dim, size in enumerate(x.meta["val"].shape)
    ]


def _times(node: Node, a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    value = operator.mul(*(each if isinstance(each, int) else each.meta["val"] for each in (a, b)))
    return _new(node, operator.mul, (a, b), value)


def _new(node: Node, target: Any, arguments: tuple[Any, ...], value: Any) -> Node:
    """A node in front of ``node``, where that stands in the source; ``value`` is what it says in the trace."""
    new = node.graph.call_function(target, arguments)
    new.meta = node.meta | {"val": value}
    return new


ASSERTIONS = frozenset({aten._assert_scalar.default, aten._assert_tensor_metadata.default})
"""What a trace assumed of sizes and types; the exporter drops it too."""
REWRITES: Mapping[Any, Callable[..., Call]] = {
    aten.to.dtype: _to_copy,
    aten.square.default: _power,
    aten.rsub.Scalar: _difference,
    aten.flatten.using_ints: _flatten,
    aten.unflatten.int: _unflatten,
}
"""What stands in the graphs of a bundle and has no translation, or one that forgets sizes that the trace knows."""
