"""A graph of a bundle cut into its modules, at the scopes that the export recorded in its nodes.

A *cut* is the one float value that enters a module, or the one that leaves it. Between cuts lie *pieces*: what a module
computes, or what the code around it does before it. Each is a graph of its own, with inputs and one output, at the one
size that the graph is given here. Sub-graphs are made by :class:`onnx.utils.Extractor`: Polygraphy's surgeon would need
onnx-graphsurgeon, which reads weights of 8 and 16 bits through numpy.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.utils import Extractor

from stiv_deploy.export.graphs.nvfp4_graph import ROUND
from stiv_deploy.export.graphs.passes import NAME_SCOPES

FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
"""ONNX element types that can be cut at, by the names of the contract."""
DEQUANTIZE = "DequantizeLinear"
QUANTIZERS = frozenset({"QuantizeLinear", DEQUANTIZE, ROUND})


class Ends(NamedTuple):
    """The values that enter and leave a module; ``entering`` is None where nothing with a fraction does."""

    entering: str | None
    leaving: str


class Value(NamedTuple):
    """Shape of a value, and its type by the contract's name; empty for one without fractions."""

    dtype: str
    shape: tuple[int, ...]


class Piece(NamedTuple):
    """What computes one value from the cuts before it.

    ``module`` holds it, by its dotted name in the graph (empty: the graph itself). ``before`` is the module that the
    value goes into where the piece is no module of its own, or the graph's output.
    """

    value: str
    module: str
    before: str
    operators: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def quantized(self) -> bool:
        """Whether something in it runs in 8 or 4 bits."""
        return not QUANTIZERS.isdisjoint(self.operators)


class CutGraph:
    """The graph in the file ``path`` at the size that the ``shapes`` of its inputs say."""

    def __init__(self, path: Path, shapes: Mapping[str, Iterable[int]]) -> None:
        self.folder = path.parent
        self.model = sized(onnx.load(path, load_external_data=False), shapes)
        graph = self.model.graph
        self.nodes = list(graph.node)
        self.inputs = [value.name for value in graph.input]
        self.outputs = [value.name for value in graph.output]
        weights = {tensor.name for tensor in graph.initializer}
        found = _values([*graph.input, *graph.value_info, *graph.output])
        self.values = {name: value for name, value in found if value.dtype and name not in weights}
        self._made = {name: index for index, node in enumerate(self.nodes) for name in node.output}
        self._scopes = [scopes_of(node) for node in self.nodes]

    def ends(self, names: Iterable[str]) -> dict[str, Ends]:
        """Of the modules called ``names`` those that can be cut out: they have nodes, and one float on either side."""
        found = {name: self._ends(name) for name in names}
        return {name: ends for name, ends in found.items() if ends is not None}

    def _ends(self, name: str) -> Ends | None:
        own = [node for node, scopes in zip(self.nodes, self._scopes, strict=True) if scopes[-1:] == [name]]
        made = {value for node in own for value in node.output}
        entering = {value for node in own for value in node.input if value in self.values} - made
        used = {value for node in self.nodes if node not in own for value in node.input} | {*self.outputs}
        leaving = {value for value in made & used if value in self.values}
        if len(leaving) != 1 or len(entering) > 1 or any(self._dequantized(value) for value in entering):
            return None
        return Ends(next(iter(entering), None), leaving.pop())

    def _dequantized(self, value: str) -> bool:
        """Whether a neighbour's 8 bits come in, which two modules share."""
        return value in self._made and self.nodes[self._made[value]].op_type == DEQUANTIZE

    def pieces(self, cuts: Mapping[str, Ends]) -> list[Piece]:
        """All pieces between ``cuts`` and up to the graph's outputs, in the order of the file."""
        inside = {ends.leaving: name for name, ends in cuts.items()}
        ahead = {ends.entering: name for name, ends in cuts.items() if ends.entering and ends.entering not in inside}
        ahead |= {name: name for name in self.outputs if name not in inside}
        values = sorted((each for each in (*inside, *ahead) if each in self._made), key=self._made.__getitem__)
        stops = {*self.inputs, *(value for ends in cuts.values() for value in ends if value)}
        return [self._piece(value, inside.get(value), ahead.get(value, ""), stops - {value}) for value in values]

    def _piece(self, value: str, module: str | None, before: str, stops: set[str]) -> Piece:
        indices, inputs = self._slice(value, stops)
        named = [self._scopes[index][-1] for index in indices if self._scopes[index]]
        operators = dict.fromkeys(self.nodes[index].op_type for index in indices)
        where = module if module is not None else ([""] + named)[-1]
        return Piece(value, where, "" if module is not None else before, tuple(operators), inputs)

    def _slice(self, value: str, stops: set[str]) -> tuple[list[int], tuple[str, ...]]:
        """Nodes that ``value`` follows from, and which of ``stops`` they read."""
        reached: set[int] = set()
        read: set[str] = set()
        waiting = [value]
        while waiting:
            name = waiting.pop()
            if name in stops:
                read.add(name)
            elif name in self._made and self._made[name] not in reached:
                reached.add(self._made[name])
                waiting += filter(None, self.nodes[self._made[name]].input)
        return sorted(reached), tuple(sorted(read))

    def model_of(self, piece: Piece) -> onnx.ModelProto:
        """The piece as a model, with its weights inside."""
        return self._cut(piece.inputs, [piece.value])

    def whole(self) -> onnx.ModelProto:
        """The graph itself at this size, with its weights inside."""
        return self._cut(self.inputs, self.outputs)

    def _cut(self, inputs: Iterable[str], outputs: Iterable[str]) -> onnx.ModelProto:
        model = Extractor(self.model).extract_model(list(inputs), list(outputs))
        onnx.load_external_data_for_model(model, str(self.folder))
        return model


def sized(model: onnx.ModelProto, shapes: Mapping[str, Iterable[int]]) -> onnx.ModelProto:
    """``model`` for inputs of ``shapes``, with the shape of every value; what computes sizes gives way to numbers."""
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, shapes[value.name], strict=True):
            dim.dim_value = size
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    while True:  # a number in one place lets the next shape be inferred
        model = onnx.shape_inference.infer_shapes(model)
        if not _ask_no_shapes(model.graph) + _compute_numbers(model):
            return model


def _ask_no_shapes(graph: onnx.GraphProto) -> int:
    """Put numbers in the place of nodes that ask for a known shape; how many there were."""
    known = dict(_values([*graph.input, *graph.value_info, *graph.output]))
    asking = [node for node in graph.node if node.op_type == "Shape" and node.input[0] in known]
    for node in asking:
        part = {attribute.name: attribute.i for attribute in node.attribute}
        numbers = np.array(known[node.input[0]].shape[part.get("start") : part.get("end")], dtype=np.int64)
        graph.initializer.append(numpy_helper.from_array(numbers, node.output[0]))
        graph.node.remove(node)
    return len(asking)


def _compute_numbers(model: onnx.ModelProto) -> int:
    """Compute the nodes that read whole numbers only, none of them an input; how many there were."""
    graph = model.graph
    known = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT64}
    names, nodes = set(known), []
    for node in graph.node:
        if node.input and all(name in names for name in node.input):
            nodes.append(node)
            names.update(node.output)
    if not nodes:
        return 0
    made = [onnx.ValueInfoProto(name=name) for node in nodes for name in node.output]
    small = onnx.helper.make_graph(nodes, "numbers", [], made, list(known.values()))
    found = ReferenceEvaluator(onnx.helper.make_model(small, opset_imports=model.opset_import)).run(None, {})
    for value, numbers in zip(made, found, strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(numbers), value.name))
    for node in nodes:
        graph.node.remove(node)
    return len(nodes)


def _values(infos: Iterable[onnx.ValueInfoProto]) -> Iterator[tuple[str, Value]]:
    """Values whose whole shape is known, by name."""
    for info in infos:
        kind = info.type.tensor_type
        dims = kind.shape.dim
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            yield info.name, Value(FLOATS.get(kind.elem_type, ""), tuple(dim.dim_value for dim in dims))


def scopes_of(node: onnx.NodeProto) -> list[str]:
    """Names of the modules around a node, outermost first."""
    written = next((each.value for each in node.metadata_props if each.key == NAME_SCOPES), "[]")
    return list(ast.literal_eval(written))
