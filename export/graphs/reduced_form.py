"""A graph's second form that computes in 16 bits over the float32 weights and between the float32 ends of the first.

The VAE's graphs are float32 in every bundle, for the CPU. What an engine wants is its tensor cores: there a decoder in
bfloat16 takes an eighth of the time. The second form rounds each input and each weight once and everything after it;
builders fold the casts of weights away, so that an engine holds them in 16 bits.
"""

from collections.abc import Iterator

import onnx_ir as ir

from stiv_deploy.export.graphs.attention_forms import constant
from stiv_deploy.export.graphs.onnx_from_module import Template
from stiv_deploy.runtime.bundle.contract import Reduced

TYPES: dict[Reduced, ir.DataType] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
FLOAT32_INPUTS = {"Resize": (1, 2)}
"""Inputs of operators that the ONNX standard wants in float32 whatever else is: regions and scales."""


def reduced_template(native: Template, precision: Reduced) -> Template:
    """A copy of the float32 ``native`` that computes in ``precision``; parameters, inputs and outputs stay float32."""
    model = native.model.clone()
    graph, dtype, parameters = model.graph, TYPES[precision], {*native.parameters}
    nodes = list(graph)
    for value in [*graph.inputs, *graph.initializers.values()]:
        if value.dtype == ir.DataType.FLOAT and value.uses():
            known = value.const_value if value.name not in parameters else None
            rounded = _cast(graph, nodes[0], value, dtype) if known is None else _converted(graph, value, known, dtype)
            _use_instead(value, rounded)
    for node in nodes:
        _retype(node, dtype)
    for output in list(graph.outputs):
        _widen(graph, output, dtype)
    for name in [name for name, value in graph.initializers.items() if name not in parameters and not value.uses()]:
        del graph.initializers[name]
    return Template(model=model, parameters=native.parameters, transposed=native.transposed)


def _cast(graph: ir.Graph, first: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """``value`` in ``dtype``, by a node in front of all others."""
    node = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}.Cast")
    result = node.outputs[0]
    result.name, result.type, result.shape = f"{value.name}.reduced", ir.TensorType(dtype), value.shape
    graph.insert_before(first, node)
    return result


def _converted(graph: ir.Graph, value: ir.Value, known: ir.TensorProtocol, dtype: ir.DataType) -> ir.Value:
    """The constant ``value`` in ``dtype``."""
    return constant(graph, f"{value.name}.reduced", ir.tensor(known.numpy().astype(dtype.numpy()), dtype=dtype))


def _use_instead(value: ir.Value, rounded: ir.Value) -> None:
    for node, index in list(_uses(value)):
        if rounded.producer() is not node and index not in FLOAT32_INPUTS.get(node.op_type, ()):
            node.replace_input_with(index, rounded)


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    return ((use.node, use.idx) for use in value.uses())


def _retype(node: ir.Node, dtype: ir.DataType) -> None:
    """Let a node that made float32 make ``dtype``."""
    to = node.attributes.get("to")
    if node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", dtype)
    for output in node.outputs:
        if output.dtype == ir.DataType.FLOAT:
            output.type = ir.TensorType(dtype)  # not its dtype: clones share their types


def _widen(graph: ir.Graph, output: ir.Value, dtype: ir.DataType) -> None:
    """Let a float32 ``output`` of the graph leave as float32, under its name."""
    if output.dtype != dtype:
        return
    name, output.name = output.name, f"{output.name}.reduced"
    node = ir.node("Cast", [output], {"to": ir.DataType.FLOAT}, name=f"{name}.Cast")
    wide = node.outputs[0]
    wide.name, wide.type, wide.shape = name, ir.TensorType(ir.DataType.FLOAT), output.shape
    graph.append(node)
    graph.outputs[list(graph.outputs).index(output)] = wide
