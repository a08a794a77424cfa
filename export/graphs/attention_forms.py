"""Attention as primitive operators, the form from which TensorRT makes one fused 8-bit kernel.

The Attention operator with quantized inputs silently runs in 16 bits and pays for its Q/DQ on top; MatMul, Softmax,
MatMul with Q/DQ on every operand becomes one 8-bit kernel, which also writes 8 bits where its output is quantized.
"""

from typing import NamedTuple

import onnx_ir as ir

from stiv_deploy.export.graphs.passes import NAME_SCOPES


class Primitives(NamedTuple):
    """The two products of an attention: ``scores`` = (scaled q) @ (transposed k), ``mixed`` = probabilities @ v."""

    scores: ir.Node
    mixed: ir.Node


def to_primitives(graph: ir.Graph, node: ir.Node, head_dim: int, dtype: ir.DataType) -> Primitives:
    """Replace an unmasked Attention [N, H, M, Dh] by MatMul, Softmax, MatMul, in place.

    The softmax scale Dh ** -0.5 goes onto the queries and the transposition of the keys in front of the product, so
    that a quantize put on either operand of a product feeds it directly. Names begin with the attention's module.
    """
    query, key, value = node.inputs[:3]
    assert len(node.inputs) == 3, f"{node.name}: attention with a mask"
    prefix = (node.name or "").removesuffix("Attention")
    scale = constant(graph, f"{prefix}softmax_scale", ir.tensor(head_dim**-0.5, dtype=dtype))
    scaled = ir.node("Mul", [query, scale], name=f"{prefix}Scale")
    turned = ir.node("Transpose", [key], {"perm": [0, 1, 3, 2]}, name=f"{prefix}TransposeKeys")
    scores = ir.node("MatMul", [scaled.outputs[0], turned.outputs[0]], name=f"{prefix}Scores")
    softmax = ir.node("Softmax", [scores.outputs[0]], {"axis": -1}, name=f"{prefix}Softmax")
    mixed = ir.node("MatMul", [softmax.outputs[0], value], name=f"{prefix}Mix")
    new = [scaled, turned, scores, softmax, mixed]
    for each in new:
        adopt(each, node)
    graph.insert_before(node, new)
    node.outputs[0].replace_all_uses_with(mixed.outputs[0])
    graph.remove(node, safe=True)
    return Primitives(scores, mixed)


def adopt(node: ir.Node, like: ir.Node) -> None:
    """Give a new node the module scopes of ``like``, and its output the node's name."""
    if NAME_SCOPES in like.metadata_props:
        node.metadata_props[NAME_SCOPES] = like.metadata_props[NAME_SCOPES]
    node.outputs[0].name = node.name


def constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer ``name``, made of ``tensor`` if it is not there yet."""
    if name not in graph.initializers:
        tensor.name = name
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
    return graph.initializers[name]
