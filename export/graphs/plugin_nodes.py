"""Plugin nodes in traced graphs: PyTorch's fused operators become nodes of the project's domain with function bodies.

A graph traced from blocks with fused attention has ``stiv::temporal_attention`` and ``stiv::spatial_qkv`` in it. They
are translated node by node; then each node takes over the bias of the linear in front of it, which the kernel adds for
nothing, and in FP8 graphs the quantization behind it, which the kernel does on values that it has at hand.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

from stiv_deploy.export.graphs.attention_forms import adopt
from stiv_deploy.export.graphs.plugin_functions import IDENTITY, plugin_function
from stiv_deploy.runtime.plugins.spec import DOMAIN, PLUGINS, SPATIAL_QKV, TEMPORAL_ATTENTION, VERSION, PluginSpec
from stiv_deploy.stiv_ref.fused import operators  # noqa: F401 -- registers the operators

FUNCTION_SET = 1
"""Version of the project's domain in a model's opset imports."""
SPECS = {spec.name: spec for spec in PLUGINS}
FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def translations() -> dict[Any, Callable[..., Any]]:
    """What the exporter makes of PyTorch's fused operators, for its ``custom_translation_table``."""
    return {
        torch.ops.stiv.temporal_attention.default: _temporal_attention,
        torch.ops.stiv.spatial_qkv.default: _spatial_qkv,
    }


INPUTS = 6
"""Tensors that both operators begin with; the heads follow, then what has a default."""


def _temporal_attention(*arguments: Any) -> Any:
    epsilon, scale = _given(arguments, (1e-6, None))
    return _node(TEMPORAL_ATTENTION, arguments, {"epsilon": epsilon}, (scale,))


def _spatial_qkv(*arguments: Any) -> Any:
    epsilon, query_scale, *scales = _given(arguments, (1e-6, 1.0, None, None, None))
    return _node(SPATIAL_QKV, arguments, {"epsilon": epsilon, "query_scale": query_scale}, scales)


def _given(arguments: Sequence[Any], defaults: Sequence[Any]) -> Sequence[Any]:
    """What stands behind the heads: the exporter leaves defaults at the end away and names nothing."""
    given = arguments[INPUTS + 1 :]
    return (*given, *defaults[len(given) :])


def _node(spec: PluginSpec, arguments: Sequence[Any], attributes: dict[str, float], scales: Sequence[Any]) -> Any:
    """Record a node, with its scales if they are given."""
    inputs = [*arguments[:INPUTS], *(scale for scale in scales if scale is not None)]
    return _operator(spec)(*inputs, heads=arguments[INPUTS], **attributes, **IDENTITY)


@cache
def _operator(spec: PluginSpec) -> Op:
    """The operator of a plugin for the exporter's recorder, with all inputs optional but the first."""
    parameters = [
        OpSchema.FormalParameter(
            each.name,
            "tensor(float)" if each.type == "float32" else "T",
            param_option=OpSchema.FormalParameterOption.Optional if index else OpSchema.FormalParameterOption.Single,
        )
        for index, each in enumerate(spec.inputs)
    ]
    kinds = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT}
    attributes = [OpSchema.Attribute(each.name, kinds[each.kind], required=True) for each in spec.attributes]
    attributes += [OpSchema.Attribute(name, OpSchema.AttrType.STRING, required=True) for name in IDENTITY]
    schema = OpSchema(
        spec.name,
        DOMAIN,
        FUNCTION_SET,
        inputs=parameters,
        outputs=[OpSchema.FormalParameter(each.name, "T") for each in spec.outputs],
        type_constraints=[("T", FLOATS, "")],
        attributes=attributes,
    )
    return Op(Opset(DOMAIN, FUNCTION_SET), spec.name, schema)


def plugin_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The plugin nodes of a graph, in order."""
    return [node for node in graph if node.domain == DOMAIN]


def plugin_names(graph: ir.Graph) -> tuple[str, ...]:
    """Plugins that a graph uses, with their versions (``StivSpatialQkv/1``)."""
    return tuple(sorted({f"{node.op_type}/{VERSION}" for node in plugin_nodes(graph)}))


def finish_plugin_nodes(model: ir.Model) -> None:
    """Complete the plugin nodes of a traced graph, if it has any: their biases, then their function bodies."""
    for node in plugin_nodes(model.graph):  # the recorder's order is that of a hash table
        attributes = sorted(node.attributes.items())
        node.attributes.clear()
        node.attributes.update(attributes)
    take_biases(model.graph)
    attach_functions(model)


def take_biases(graph: ir.Graph) -> None:
    """Move the bias that a linear adds in front of a plugin node into the node's ``bias`` input, if it has none yet."""
    for node in plugin_nodes(graph):
        qkv, own_bias = node.inputs[:2]
        assert qkv is not None
        if own_bias is not None:
            continue
        add = qkv.producer()
        assert add is not None, f"{node.name}: no linear in front"
        assert add.op_type == "Add", f"{node.name}: no bias in front"
        assert len(add.outputs[0].uses()) == 1, f"{node.name}: the biased sum has another user"
        (bias,) = [value for value in add.inputs if value is not None and value.name in graph.initializers]
        (product,) = [value for value in add.inputs if value is not bias]
        node.replace_input_with(0, product)
        node.replace_input_with(1, bias)
        graph.remove(add, safe=True)


def attach_functions(model: ir.Model) -> None:
    """Give a model the function bodies that its plugin nodes need, and no others."""
    for identifier in [each for each in model.functions if each[0] == DOMAIN]:
        del model.functions[identifier]
    for node in plugin_nodes(model.graph):
        spec = SPECS[node.op_type]
        function = plugin_function(spec, len(node.inputs) == len(spec.inputs))
        known = model.functions.get(function.identifier())
        assert known is None or len(known.inputs) == len(node.inputs), f"{node.name}: two forms of one plugin"
        model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = FUNCTION_SET


def absorb_quantization(graph: ir.Graph) -> None:
    """Let plugin nodes write FP8 where FP8 quantization, one scale for the tensor, is all that follows.

    QuantizeLinear becomes a scale input of the node; DequantizeLinear stays, so that the products behind it are still
    seen to be in 8 bits. INT8 stays as it is, as the plugins do not write it.
    """
    for node in plugin_nodes(graph):
        (_absorb_temporal if node.op_type == TEMPORAL_ATTENTION.name else _absorb_spatial)(graph, node)


def _absorb_temporal(graph: ir.Graph, node: ir.Node) -> None:
    quantize = _fp8_quantize(_only_user(node.outputs[0]))
    if quantize is not None:
        _take_scales(graph, node, [quantize])


def _absorb_spatial(graph: ir.Graph, node: ir.Node) -> None:
    """In front of FP8 attention: the softmax scale on the queries goes in too, the keys' transposition stays behind."""
    scale, turn = (_only_user(value) for value in node.outputs[:2])
    if scale is None or turn is None or (scale.op_type, turn.op_type) != ("Mul", "Transpose"):
        return
    found = [_fp8_quantize(_only_user(value)) for value in (scale.outputs[0], turn.outputs[0], node.outputs[2])]
    quantizes = [each for each in found if each is not None]
    if len(quantizes) < len(found):
        return
    gamma = node.inputs[2]
    assert gamma is not None
    assert gamma.shape is not None
    node.attributes["query_scale"] = ir.AttrFloat32("query_scale", gamma.shape.numpy()[0] ** -0.5)
    quantizes[0].replace_input_with(0, node.outputs[0])
    _remove(graph, scale)
    _take_scales(graph, node, quantizes)


def _only_user(value: ir.Value) -> ir.Node | None:
    """The node that reads ``value`` as its first input, if there is just this one."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].idx == 0 else None


def _fp8_quantize(node: ir.Node | None) -> ir.Node | None:
    """``node`` if it quantizes to FP8 E4M3 with one scale for the tensor, else None."""
    if node is None or node.op_type != "QuantizeLinear":
        return None
    scale, zero = node.inputs[1:3]
    assert scale is not None
    assert zero is not None
    return node if zero.dtype == ir.DataType.FLOAT8E4M3FN and scale.shape == ir.Shape([]) else None


def _take_scales(graph: ir.Graph, node: ir.Node, quantizes: Sequence[ir.Node]) -> None:
    """Make the scales of ``quantizes`` the last inputs of ``node``, in float32, and take the nodes out."""
    first = len(node.inputs)
    node.resize_inputs(first + len(quantizes))
    for index, quantize in enumerate(quantizes, first):
        value, scale = quantize.inputs[:2]
        assert value is not None
        assert scale is not None
        if scale.dtype != ir.DataType.FLOAT:
            cast = ir.node("Cast", [scale], {"to": ir.DataType.FLOAT}, name=f"{scale.name}.Cast")
            adopt(cast, node)
            graph.insert_before(node, cast)
            scale = cast.outputs[0]
        node.replace_input_with(index, scale)
        quantize.outputs[0].replace_all_uses_with(value)
        graph.remove(quantize, safe=True)


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node and the constants that nobody else reads."""
    inputs = set(node.inputs)
    graph.remove(node, safe=True)
    for value in inputs:
        if value is not None and value.is_initializer() and not value.uses():
            assert value.name is not None
            del graph.initializers[value.name]
