"""ONNX function bodies of the plugins: what a plugin node computes, in standard operators of opset 23.

A runtime without the plugins expands a node into its body; the names, inputs and attributes are those of
:mod:`~stiv_deploy.runtime.plugins.spec`. Bodies hold for every size and floating type. A node with scales has another
body than one without (functions know no optional computation), so a model holds the body of the form that its nodes
use.
"""

import onnx_ir as ir
from onnx import parser

from stiv_deploy.runtime.plugins.spec import DOMAIN, SPATIAL_QKV, TEMPORAL_ATTENTION, VERSION, PluginSpec

OPSET = 23
IDENTITY = {"plugin_version": VERSION, "plugin_namespace": DOMAIN}
"""String attributes of every node, by which TensorRT finds the plugin; the bodies make no use of them."""

_BIASED_HEADS = """
    biased = Add (qkv, bias)
    head_count = Constant <value_int: int = @heads> ()
    rest = Constant <value_ints = [-1]> ()
    heads = Reshape (head_count, rest)
    matrices = Constant <value_ints = {kept}> ()
    packed_shape = Concat <axis = 0> (matrices, heads, rest)
    packed = Reshape (biased, packed_shape)
    grouped = Transpose <perm = {order}> (packed)
    q_one, k_one, v_one = Split <axis = 0, num_outputs = 3> (grouped)
"""

_NORM_AND_ROPE = """
    {x}_normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> ({x}_heads, {x}_gamma)
    {x}_first, {x}_second = Split <axis = -1, num_outputs = 2> ({x}_normed)
    {x}_first_cos = Mul ({x}_first, cos)
    {x}_second_sin = Mul ({x}_second, sin)
    {x}_first_sin = Mul ({x}_first, sin)
    {x}_second_cos = Mul ({x}_second, cos)
    {x}_left = Sub ({x}_first_cos, {x}_second_sin)
    {x}_right = Add ({x}_first_sin, {x}_second_cos)
    {x}_rotated = Concat <axis = -1> ({x}_left, {x}_right)
"""

_ROWS = """
    {x}_heads = Reshape ({x}_one, rows_shape)
"""
_SQUEEZED = """
    {x}_heads = Squeeze ({x}_one, first_axis)
"""
_ROPED = "".join(_NORM_AND_ROPE.format(x=x) for x in "qk")
_QUANTIZED = """
    {y}_step = CastLike ({scale}, {x})
    {y} = QuantizeLinear <output_dtype = {fp8}> ({x}, {y}_step)
"""

_TEMPORAL = (
    _BIASED_HEADS.format(kept=[0, 0, 0, 3], order=[3, 0, 2, 4, 1, 5])  # [3, B, S, H, T, Dh]
    + """
    positions_shape = Shape <start = 1> (q_one)
    sequence_shape = Shape <start = 3> (q_one)
    rows_shape = Concat <axis = 0> (rest, sequence_shape)
"""
    + "".join(_ROWS.format(x=x) for x in "qkv")
    + _ROPED
    + """
    attended = Attention (q_rotated, k_rotated, v_heads)
    positions = Reshape (attended, positions_shape)
    frames = Transpose <perm = [0, 3, 1, 2, 4]> (positions)
    merged_shape = Constant <value_ints = [0, 0, 0, -1]> ()
"""
)
_SPATIAL = (
    _BIASED_HEADS.format(kept=[0, 0, 3], order=[2, 0, 3, 1, 4])  # [3, N, H, S, Dh]
    + """
    first_axis = Constant <value_ints = [0]> ()
"""
    + "".join(_SQUEEZED.format(x=x) for x in "qk")
    + _ROPED
    + """
    any_query_scale = Constant <value_float: float = @query_scale> ()
    own_query_scale = CastLike (any_query_scale, q_rotated)
"""
)
_BODIES = {
    TEMPORAL_ATTENTION.name: {
        False: _TEMPORAL + "y = Reshape (frames, merged_shape)",
        True: _TEMPORAL
        + "merged = Reshape (frames, merged_shape)"
        + _QUANTIZED.format(x="merged", y="y", scale="output_scale", fp8=int(ir.DataType.FLOAT8E4M3FN)),
    },
    SPATIAL_QKV.name: {
        False: _SPATIAL
        + """
    q = Mul (q_rotated, own_query_scale)
    k = Identity (k_rotated)
    v = Squeeze (v_one, first_axis)
""",
        True: _SPATIAL
        + """
    q_scaled = Mul (q_rotated, own_query_scale)
    v_heads = Squeeze (v_one, first_axis)
"""
        + "".join(
            _QUANTIZED.format(x=x, y=y, scale=f"{y}_scale", fp8=int(ir.DataType.FLOAT8E4M3FN))
            for y, x in (("q", "q_scaled"), ("k", "k_rotated"), ("v", "v_heads"))
        ),
    },
}
SCOPES = {TEMPORAL_ATTENTION.name: "temporal", SPATIAL_QKV.name: "spatial"}
"""The module that a plugin stands in: the names of its body's nodes begin with it, as those of the native form do."""


def plugin_function(spec: PluginSpec, scaled: bool) -> ir.Function:
    """The body of a plugin, with or without its scale inputs (FP8 or the type of ``qkv`` out)."""
    inputs = ", ".join(tensor.name for tensor in spec.inputs if scaled or not tensor.optional)
    outputs = ", ".join(tensor.name for tensor in spec.outputs)
    proto = parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{spec.name} <{_attributes(spec)}> ({inputs}) => ({outputs}) {{{_BODIES[spec.name][scaled]}}}"
    )
    for node in proto.node:
        node.name = f"{SCOPES[spec.name]}.{spec.name}.{node.output[0]}"
    return ir.serde.deserialize_function(proto)


def _attributes(spec: PluginSpec) -> str:
    """The declarations: a name alone must be given by the node, one with a value has that by default."""
    declared = [
        each.name if each.default is None else f"{each.name}: {each.kind} = {each.default}" for each in spec.attributes
    ]
    return ", ".join([*declared, *(f'{name}: string = "{value}"' for name, value in IDENTITY.items())])
