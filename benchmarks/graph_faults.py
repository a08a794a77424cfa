"""Faults of a graph, to be planted into a copy of it: each changes one thing, as a wrong engine or a wrong file would.

Bits, rows or the scale of a weight, an attribute, an operator, the order of inputs, how a mask or a table is read; in
8 bits a quantizer's scale or place.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

Plant = Callable[[onnx.GraphProto, random.Random], str | None]
"""Plants one fault and says where; None where the graph has no place for it."""
SWAPPED = {"Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul", "Sin": "Cos", "Cos": "Sin", "Tanh": "Sigmoid"}
ORDERED = ("Sub", "Div", "MatMul", "Concat", "Where")
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def _weight(graph: onnx.GraphProto, chance: random.Random, dims: int) -> tuple[onnx.TensorProto, np.ndarray] | None:
    """A weight in floats with so many axes or more, and a copy of its values."""
    found = [each for each in graph.initializer if each.data_type in FLOATS and len(each.dims) >= dims]
    if not found:
        return None
    tensor = chance.choice(found)
    return tensor, numpy_helper.to_array(tensor).copy()


def _keep(tensor: onnx.TensorProto, values: np.ndarray) -> str:
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return tensor.name


def flipped_bit(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """Sign, exponent or one of the four highest bits of the mantissa of one weight."""
    if (found := _weight(graph, chance, 1)) is None:
        return None
    tensor, values = found
    whole, kind = 8 * values.itemsize, np.uint32 if values.itemsize == 4 else np.uint16
    index, bit = chance.randrange(values.size), chance.randrange(19 if whole == 32 else 6, whole)
    values.reshape(-1).view(kind)[index] ^= kind(1 << bit)
    return f"{_keep(tensor, values)}[{index}] bit {bit}"


def swapped_rows(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """Two rows of a matrix have each other's place."""
    if (found := _weight(graph, chance, 2)) is None or len(found[1]) < 2:
        return None
    tensor, values = found
    one, two = chance.sample(range(len(values)), 2)
    values[[one, two]] = values[[two, one]]
    return f"{_keep(tensor, values)} rows {one} and {two}"


def stale_scale(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A weight as with a scale that is 1 % off."""
    if (found := _weight(graph, chance, 1)) is None:
        return None
    tensor, values = found
    return _keep(tensor, (values * np.float32(1.01)).astype(values.dtype))


def other_attribute(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """An epsilon ten times as large, another axis, or another order of axes."""
    kinds = {onnx.AttributeProto.FLOAT, onnx.AttributeProto.INT, onnx.AttributeProto.INTS}
    names = {"epsilon", "axis", "perm", "scale", "keepdims"}
    found = [(n, a) for n in graph.node for a in n.attribute if a.type in kinds and a.name in names]
    if not found:
        return None
    node, attribute = chance.choice(found)
    if attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f *= 10
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = attribute.i - 1 if attribute.i else 1
    else:
        attribute.ints[:] = [*attribute.ints[:-2], attribute.ints[-1], attribute.ints[-2]]
    return f"{node.op_type} {node.name} {attribute.name}"


def other_operator(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """Plus for minus, times for by, sine for cosine."""
    found = [node for node in graph.node if node.op_type in SWAPPED]
    if not found:
        return None
    node = chance.choice(found)
    node.op_type = SWAPPED[node.op_type]
    return f"{node.name} is {node.op_type}"


def swapped_inputs(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """The last two inputs of an operator whose order counts."""
    found = [node for node in graph.node if node.op_type in ORDERED and len({*node.input[-2:]}) == 2]
    if not found:
        return None
    node = chance.choice(found)
    node.input[-2:] = [node.input[-1], node.input[-2]]
    return f"{node.op_type} {node.name}"


def other_wire(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A graph input, such as a mask or a table, where another one should be read."""
    readers = [node for node in graph.node if {*node.input} & {each.name for each in graph.input}]
    if not readers or len(graph.input) < 2:
        return None
    node = chance.choice(readers)
    index = chance.choice([i for i, name in enumerate(node.input) if name in {each.name for each in graph.input}])
    was = node.input[index]
    node.input[index] = chance.choice([each.name for each in graph.input if each.name != was])
    return f"{node.op_type} {node.name} reads {node.input[index]} for {was}"


def dropped_branch(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A sum gives one of its terms alone: a residual or a bias is lost."""
    found = [node for node in graph.node if node.op_type == "Add"]
    if not found:
        return None
    node = chance.choice(found)
    node.op_type, kept = "Identity", node.input[chance.randrange(2)]
    node.input[:] = [kept]
    return f"{node.name} is {kept}"


def _changed_input(graph: onnx.GraphProto, name: str, nodes: list[onnx.NodeProto], values: dict[str, Any]) -> str:
    """All readers of the graph input ``name`` get what ``nodes`` make of it and of int64 ``values``."""
    for node in graph.node:
        node.input[:] = ["fault changed" if each == name else each for each in node.input]
    for number, node in enumerate(nodes):
        graph.node.insert(number, node)
    graph.initializer.extend(numpy_helper.from_array(np.array(each, np.int64), key) for key, each in values.items())
    return name


def _input_like(graph: onnx.GraphProto, chance: random.Random, *ends: str) -> onnx.ValueInfoProto | None:
    read = {name for node in graph.node for name in node.input}
    found = [each for each in graph.input if each.name.endswith(ends) and each.name in read]
    return chance.choice(found) if found else None


def turned_mask(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A mask is read along its last axis from behind, as with a layout that runs the other way."""
    if (mask := _input_like(graph, chance, "_mask")) is None:
        return None
    axis = len(mask.type.tensor_type.shape.dim) - 1
    turned = onnx.helper.make_node(
        "Slice", [mask.name, "fault last", "fault before", "fault which", "fault back"], ["fault changed"]
    )
    values = {"fault last": [-1], "fault before": [-(2**31)], "fault which": [axis], "fault back": [-1]}
    return _changed_input(graph, mask.name, [turned], values)


def wrong_stride(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A table of RoPE is read with twice its stride, and from its start again where it ends."""
    if (table := _input_like(graph, chance, "_cos", "_sin")) is None:
        return None
    node = onnx.helper.make_node
    nodes = [
        node("Shape", [table.name], ["fault rows"], start=0, end=1),
        node("Squeeze", ["fault rows"], ["fault count"]),
        node("Range", ["fault none", "fault count", "fault single"], ["fault right rows"]),
        node("Mul", ["fault right rows", "fault twice"], ["fault far rows"]),
        node("Mod", ["fault far rows", "fault count"], ["fault wrong rows"]),
        node("Gather", [table.name, "fault wrong rows"], ["fault changed"], axis=0),
    ]
    return _changed_input(graph, table.name, nodes, {"fault twice": 2, "fault none": 0, "fault single": 1})


def _quantizers(graph: onnx.GraphProto, *kinds: str) -> list[onnx.NodeProto]:
    """Q or DQ nodes whose scale is an initializer."""
    known = {each.name for each in graph.initializer}
    return [node for node in graph.node if node.op_type in kinds and node.input[1] in known]


def _pairs(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Q nodes of activations, each with the DQ behind it."""
    behind = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    found = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    return [(node, behind[node.output[0]]) for node in found if node.output[0] in behind]


def other_scale(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """One Q or DQ has a scale 1.25 times as large."""
    if not (found := _quantizers(graph, "QuantizeLinear", "DequantizeLinear")):
        return None
    node = chance.choice(found)
    tensor = next(each for each in graph.initializer if each.name == node.input[1])
    values = numpy_helper.to_array(tensor)
    graph.initializer.append(numpy_helper.from_array((values * 1.25).astype(values.dtype), "fault scale"))
    node.input[1] = "fault scale"
    return f"{node.op_type} of {node.input[0]}"


def swapped_scales(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """The Q/DQ pairs of two activations have each other's scale."""
    known = {each.name for each in graph.initializer}
    found = [pair for pair in _pairs(graph) if pair[0].input[1] in known]
    if len({pair[0].input[1] for pair in found}) < 2:
        return None
    one = chance.choice(found)
    two = chance.choice([pair for pair in found if pair[0].input[1] != one[0].input[1]])
    names = one[0].input[1], two[0].input[1]
    for pair, name in ((one, names[1]), (two, names[0])):
        for node in pair:
            node.input[1] = name
    return f"{names[0]} and {names[1]}"


def lost_quantizer(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A Q/DQ pair is left out: what is behind it computes on, in full precision."""
    if not (found := _pairs(graph)):
        return None
    first, second = chance.choice(found)
    second.op_type = "Identity"
    second.input[:] = [first.input[0]]
    del second.attribute[:]
    return f"{second.output[0]} is {first.input[0]}"


def moved_quantizer(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A Q/DQ pair stands behind an operator instead of before it."""
    readers = {name: node for node in graph.node for name in node.input}
    found = [(pair, readers[pair[1].output[0]]) for pair in _pairs(graph) if pair[1].output[0] in readers]
    found = [(pair, reader) for pair, reader in found if reader.op_type in ("MatMul", "Gemm")]
    if not found:
        return None
    (first, second), reader = chance.choice(found)
    source, dequantized, result = first.input[0], second.output[0], reader.output[0]
    reader.input[:] = [source if name == dequantized else name for name in reader.input]
    reader.output[0] = "fault before the quantizer"
    first.input[0], second.output[0] = reader.output[0], result
    for node in (first, second):  # behind the reader: nodes stand in their order
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        graph.node.remove(node)
        graph.node.insert(next(i for i, each in enumerate(graph.node) if copy.input[0] in each.output) + 1, copy)
    return f"{dequantized} behind {reader.op_type} {reader.name}"


PLANTS: dict[str, Plant] = {
    "bit of a weight": flipped_bit,
    "swapped rows": swapped_rows,
    "stale scale": stale_scale,
    "attribute": other_attribute,
    "operator": other_operator,
    "order of inputs": swapped_inputs,
    "wire": other_wire,
    "dropped branch": dropped_branch,
    "turned mask": turned_mask,
    "stride of a table": wrong_stride,
    "scale of a quantizer": other_scale,
    "swapped scales": swapped_scales,
    "lost quantizer": lost_quantizer,
    "moved quantizer": moved_quantizer,
}
"""Faults by name."""
OF_QUANTIZERS = ("scale of a quantizer", "swapped scales", "lost quantizer", "moved quantizer")
"""Those of them that only 8-bit graphs have a place for."""
