"""Q/DQ in a clean traced graph, in the pattern that TensorRT turns into 8-bit kernels.

Linears: QuantizeLinear, DequantizeLinear on the input, per tensor; the weight lies in the file in 8 bits, [in, out],
behind a DequantizeLinear of its own (per tensor, or per output channel on axis 1). Scales have the type of the
activations and are parameters as the weights are: blocks with equal plans have equal topology. Attention: see
:mod:`~stiv_deploy.export.graphs.attention_forms`; the softmax's output lies in [0, 1], its scale is a constant.

QuantizeLinear saturates INT8 at -128, one code below the symmetric grid of the calibration: values that the calibration
would clip lose a little less. Weights keep to -127.

What the 8 bits do not reach stays in the bundle's type. Float32 in bundles of every precision are: the statistics of
LayerNormalization and RMSNormalization (``stash_type`` 1), as squares of activations beyond 256 do not fit float16;
sinusoids of timestep and micro-conditions, whose angles reach 1000; and everything in image encoder, step and decoder.
Softmax needs no more than that: QK-norm keeps the scores of attention below Dh ** 0.5 times the norms' weights (of
cross-attention, where the model has it there), and fused kernels add in float32. No other island is needed: blocks of
width 1152 with activations of 20000 stay within the error of torch in the same precision
(tests/unit/export/graphs/test_quantized_graph.py).
"""

import onnx_ir as ir

from stiv_deploy.calibration.layers import LARGEST, OPERANDS
from stiv_deploy.export.graphs.attention_forms import adopt, constant, to_primitives
from stiv_deploy.export.graphs.onnx_from_module import Template
from stiv_deploy.export.graphs.plugin_nodes import absorb_quantization, attach_functions
from stiv_deploy.export.graphs.quantization import LayerScheme
from stiv_deploy.runtime.bundle.contract import Format

TYPES = {"fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8}
"""ONNX types of the 8-bit formats."""


def quantized_template(template: Template, scheme: tuple[LayerScheme, ...], head_dim: int) -> Template:
    """A copy of ``template`` in which the layers of ``scheme`` run in 8 bits; ``template`` itself is unchanged."""
    model = template.model.clone()
    editor = _Editor(model.graph, head_dim)
    for layer in scheme:
        if layer.kind == "attention":
            editor.quantize_attention(layer)
    for layer in scheme:
        if layer.kind == "linear":
            editor.quantize_linear(layer)
    absorb_quantization(model.graph)
    attach_functions(model)
    model.graph.sort()
    return Template(model=model, parameters=(*template.parameters, *editor.scales), transposed=template.transposed)


class _Editor:
    """Inserts Q/DQ into one graph and keeps the names of the scales that it asks for, in order."""

    def __init__(self, graph: ir.Graph, head_dim: int) -> None:
        self.graph = graph
        self.head_dim = head_dim
        self.scales: list[str] = []
        self._quantized: dict[tuple[int, str], ir.Value | None] = {}

    def quantize_linear(self, layer: LayerScheme) -> None:
        """Q/DQ on the input of a linear and DQ on its weight."""
        weight = self.graph.initializers[f"{layer.module}.weight"]
        (use,) = weight.uses()
        node, dtype = use.node, weight.dtype
        assert node.op_type in ("MatMul", "Gemm"), node.name
        assert use.idx == 1, node.name
        assert dtype is not None
        inputs, outputs = _sizes(weight)
        self._quantize_input(node, layer, dtype, inputs)
        scale = self._scale(f"{layer.module}.weight_scale", dtype, [outputs] if layer.per_channel else [])
        attributes = {"axis": 1} if layer.per_channel else {}
        weight.type = ir.TensorType(TYPES[layer.format])  # a new one: the type object is the original template's
        name = f"{layer.module}.WeightDequantizeLinear"
        self._insert(node, 1, [("DequantizeLinear", name, [weight, scale], attributes)])

    def _quantize_input(self, node: ir.Node, layer: LayerScheme, dtype: ir.DataType, width: int) -> None:
        """Q/DQ on input 0 of ``node``, shared with another layer that quantizes the same tensor with the same scale."""
        value = node.inputs[0]
        assert value is not None
        key = (id(value), layer.module if layer.smooth else layer.input_like)
        if key not in self._quantized:
            if layer.smooth:
                inverse = self._scale(f"{layer.module}.inverse_smooth", dtype, [width])
                self._insert(node, 0, [("Mul", f"{layer.module}.Smooth", [value, inverse], {})])
            self._pair(node, 0, layer.format, self._scale(f"{layer.module}.input_scale", dtype, []), layer.module)
            self._quantized[key] = node.inputs[0]
        node.replace_input_with(0, self._quantized[key])

    def quantize_attention(self, layer: LayerScheme) -> None:
        """The primitive form of an attention with Q/DQ on queries, keys, values and the softmax's output."""
        prefix = layer.module.rpartition(".")[0]
        (node,) = [each for each in self.graph if each.name == f"{prefix}.Attention"]
        dtype = self.graph.initializers[f"{prefix}.q_norm.weight"].dtype
        assert dtype is not None
        scores, mixed = to_primitives(self.graph, node, self.head_dim, dtype)
        for part, product, index in zip(OPERANDS, (scores, scores, mixed), (0, 1, 1), strict=True):
            scale = self._scale(f"{layer.module}.{part}_scale", dtype, [])
            self._pair(product, index, layer.format, scale, f"{layer.module}.{part}")
        unit = ir.tensor(1 / LARGEST[layer.format], dtype=dtype)
        scale = constant(self.graph, f"{layer.module}.probability_scale", unit)
        self._pair(mixed, 0, layer.format, scale, f"{layer.module}.probability")

    def _pair(self, node: ir.Node, index: int, quantization: Format, scale: ir.Value, prefix: str) -> None:
        """Put QuantizeLinear and DequantizeLinear on input ``index`` of ``node``."""
        zero = constant(self.graph, f"{quantization}_zero_point", ir.tensor(0, dtype=TYPES[quantization]))
        value = node.inputs[index]
        assert value is not None
        self._insert(
            node,
            index,
            [
                ("QuantizeLinear", f"{prefix}.QuantizeLinear", [value, scale, zero], {}),
                ("DequantizeLinear", f"{prefix}.DequantizeLinear", [None, scale, zero], {}),
            ],
        )

    def _insert(self, node: ir.Node, index: int, chain: list[tuple[str, str, list[ir.Value | None], dict]]) -> None:
        """Put a chain of nodes on input ``index`` of ``node``; a first input None is the output of the one before."""
        value: ir.Value | None = None
        for op, name, inputs, attributes in chain:
            new = ir.node(op, [inputs[0] or value, *inputs[1:]], attributes, name=name)
            adopt(new, node)
            self.graph.insert_before(node, new)
            value = new.outputs[0]
        node.replace_input_with(index, value)

    def _scale(self, name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
        """The parameter ``name``, without a value as yet."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.initializers[name] = value
        self.scales.append(name)
        return value


def _sizes(weight: ir.Value) -> tuple[int, int]:
    """Sizes [in, out] of a stored weight."""
    assert weight.shape is not None
    inputs, outputs = weight.shape.numpy()
    return inputs, outputs
