"""Small rewrites between the exporter's raw graph and the shipped one.

The raw graph is right but noisy. These passes leave standard ops under readable names, and never touch a parameter's
name: a weight is found in the file under the name that it has in the state dict.
"""

import ast
from collections import defaultdict

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import (
    collapse_slice_rule,
    materialize_reshape_shape_rule,
    no_op_cast_rule,
    squeeze_reshape_1d_rule,
    unsqueeze_unsqueeze_rule,
)

from stiv_deploy.runtime.bundle.contract import DType, GraphSpec

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Node metadata that leads from a node back to its module: the list of enclosing module names."""
PREFIX = "source"
"""The child of every graph module that holds the reference module; its name is dropped."""
SHAPE_RULES = (
    collapse_slice_rule,
    materialize_reshape_shape_rule,
    no_op_cast_rule,
    squeeze_reshape_1d_rule,
    unsqueeze_unsqueeze_rule,
)
"""Rewrites of pure bookkeeping: slices that take all, reshapes with one free size, chains of unsqueezes."""


def strip_prefix(name: str) -> str:
    """``source.spatial.qkv`` -> ``spatial.qkv``; ``source`` -> the empty string."""
    return name.removeprefix(PREFIX).removeprefix(".") if name.split(".")[0] == PREFIX else name


def pretranspose(graph: ir.Graph, parameters: set[str]) -> frozenset[str]:
    """Turn every linear's weight from [out, in] plus a transposition into [in, out]; return the names so stored.

    Only the shape changes here: values are written from the state dict later, transposed for these names.
    """
    transposed = set()
    for name in parameters:
        weight = graph.initializers[name]
        users = [use.node for use in weight.uses()]
        if users and weight.shape is not None and all(_transposes(user, weight) for user in users):
            for user in users:
                _drop_transposition(graph, user, weight)
            weight.const_value = None
            weight.shape = ir.Shape([weight.shape[1], weight.shape[0]])
            transposed.add(name)
    return frozenset(transposed)


def _transposes(node: ir.Node, weight: ir.Value) -> bool:
    if node.op_type == "Gemm":
        return node.inputs[1] is weight and node.attributes["transB"].as_int() == 1
    return node.op_type == "Transpose" and weight.shape is not None and len(weight.shape) == 2


def _drop_transposition(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    if node.op_type == "Gemm":
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
    else:
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)


def simplify(model: ir.Model, parameters: set[str]) -> None:
    """Fold constants, expand masks, drop what is unused or said twice; parameters stay as they are."""

    def fold(node: ir.Node) -> bool | None:
        touches = any(value is not None and value.name in parameters for value in node.inputs)
        return False if touches else None

    fold_constants(model, onnx_shape_inference=True, should_fold=fold)
    rewrite(model, SHAPE_RULES)
    fold_constants(model, onnx_shape_inference=True, should_fold=fold)
    expand_masks(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    merge_constants(model.graph, parameters)
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def expand_masks(graph: ir.Graph) -> None:
    """Expand attention masks [B, 1, 1, L] to [B, 1, Lq, L] in front of every Attention.

    The operator lets the query axis broadcast, ONNX Runtime (1.31) does not. TensorRT folds the expansion away.
    """
    for node in list(graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        if mask is None:
            continue
        one = _constant(graph, f"{node.name}_one", [1])
        length = ir.node("Shape", [node.inputs[0]], {"start": 2, "end": 3})
        target = ir.node("Concat", [one, one, length.outputs[0], one], {"axis": 0})
        expand = ir.node("Expand", [mask, target.outputs[0]])
        for new in (length, target, expand):
            new.metadata_props.update(node.metadata_props)
        graph.insert_before(node, [length, target, expand])
        node.replace_input_with(3, expand.outputs[0])


def _constant(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    """A new int64 initializer."""
    tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
    value = ir.Value(name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def merge_constants(graph: ir.Graph, parameters: set[str]) -> None:
    """Make equal constants one, named ``constant_0``, ...; parameters may be equal by chance and are left alone."""
    seen: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    kept: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if name in parameters or tensor is None:
            continue
        key = (tensor.dtype, tuple(tensor.numpy().shape), tensor.tobytes())
        if key in seen:
            value.replace_all_uses_with(seen[key])
            del graph.initializers[name]
        else:
            seen[key] = value
            kept.append((value, tensor))
    for index, (value, tensor) in enumerate(kept):
        value.name = tensor.name = f"constant_{index}"


def apply_contract(graph: ir.Graph, spec: GraphSpec) -> None:
    """Give inputs and outputs the contract's names and symbolic dimensions, and forget intermediate shapes.

    What the exporter knows of intermediate shapes is in symbols of its own; consumers infer them from the contract's.
    ONNX has no inference for group norms (a function): their outputs keep their type, rank and fixed sizes.
    """
    for index, tensor in enumerate(spec.outputs):
        _cast_output(graph, index, onnx_type(tensor.dtype))
    for node in graph:
        for value in node.outputs:
            if node.op_type == "GroupNormalization" and value.shape is not None:
                value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape])
                continue
            value.shape = None
            value.type = None
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.name = tensor.name
            value.dtype = onnx_type(tensor.dtype)
            value.shape = ir.Shape(tensor.shape)


def onnx_type(dtype: DType) -> ir.DataType:
    """The ONNX element type of a contract type."""
    return ir.DataType[{"float32": "FLOAT"}.get(dtype, dtype.upper())]


def _cast_output(graph: ir.Graph, index: int, dtype: ir.DataType) -> None:
    """Cast an output that the exporter left in another type: it promotes half-precision sums and does not cast back."""
    value = graph.outputs[index]
    if value.dtype != dtype:
        cast = ir.node("Cast", [value], {"to": dtype})
        graph.append(cast)
        graph.outputs[index] = cast.outputs[0]


def name_by_scope(graph: ir.Graph) -> None:
    """Name nodes after their module and op, ``spatial.qkv.MatMul``, and inner values after their node.

    Of the exporter's metadata only the name scopes stay: the rest holds source paths and repeats the graph.
    """
    outputs = {id(value) for value in graph.outputs}
    counts: dict[str, int] = defaultdict(int)
    for node in graph:
        scopes = _scopes(node)
        node.metadata_props.clear()
        node.meta.clear()
        node.doc_string = None
        if scopes:
            node.metadata_props[NAME_SCOPES] = str(scopes)
        name = ".".join(part for part in (scopes[-1] if scopes else "", node.op_type) if part)
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        for index, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if id(value) not in outputs:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{index}"


def _scopes(node: ir.Node) -> list[str]:
    """Names of the modules around a node, outermost first, without the graph module and its prefix."""
    names = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))[:-1]  # the last is the node itself
    inside = [strip_prefix(name) for name in names if name.split(".")[0] == PREFIX]
    return [name for name in inside if name]
