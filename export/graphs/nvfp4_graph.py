"""NVFP4 in a clean traced graph, in two forms: one for engines, and its twin in standard operators for all others.

The engines' form has the pattern that TensorRT turns into products of 4 bits: ``TRT_FP4DynamicQuantize`` and two
DequantizeLinear on the input (block scales times the tensor's scale, elements times that), the weight in the file as
4-bit elements [in, out] with block scales [in / 16, out] behind two DequantizeLinear of its own. ONNX has no dynamic
quantize to 4 bits, and ONNX Runtime (1.31) no FP4 kernels, so nothing but TensorRT reads it.

The twin rounds activations by a function of standard operators and has weights that are rounded already, in the
bundle's type: ONNX Runtime computes with it what an engine computes, in slow products of 16 or 32 bits. Parity, golden
answers and ``stiv verify`` are of the twin, by the very formulas of :mod:`~stiv_deploy.calibration.nvfp4`.

A linear with an activation that is not quantized would build too, and save memory, but no time: TensorRT then makes
16 bits of the weight in every call. There is no such form here, and ``stiv audit`` fails it.
"""

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir
from onnx import parser
from onnx_ir.passes.common.shape_inference import infer_shapes

from stiv_deploy.calibration.layers import BLOCK
from stiv_deploy.calibration.nvfp4 import LARGEST_ELEMENT, LARGEST_SCALE, LEAST_SCALE
from stiv_deploy.export.graphs.attention_forms import adopt, constant
from stiv_deploy.export.graphs.onnx_from_module import OPSET, Template
from stiv_deploy.export.graphs.quantization import LayerScheme

DOMAIN, ROUND = "stiv.nvfp4", "RoundToNvfp4"
"""The twin's function."""
TENSORRT, DYNAMIC_QUANTIZE = "trt", "TRT_FP4DynamicQuantize"
"""TensorRT's operator, as its ONNX parser knows it."""
MOST_DIMENSIONS = 3
"""Of a tensor that TensorRT-RTX (1.7) quantizes so."""
FP8, FP4 = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1
_BODY = f"""
    wide = Cast <to = {int(ir.DataType.FLOAT)}> (x)
    shape = Shape (x)
    rows = Shape <start = 0, end = -1> (x)
    ends = Constant <value_ints = [-1, {BLOCK}]> ()
    blocks = Concat <axis = 0> (rows, ends)
    grouped = Reshape (wide, blocks)
    size = Abs (grouped)
    last = Constant <value_ints = [-1]> ()
    largest = ReduceMax <keepdims = 1> (size, last)
    six = Constant <value_float = {LARGEST_ELEMENT}> ()
    unit = Mul (six, scale)
    exact = Div (largest, unit)
    least = Constant <value_float = {LEAST_SCALE}> ()
    most = Constant <value_float = {LARGEST_SCALE}> ()
    kept = Clip (exact, least, most)
    narrow = Cast <to = {int(FP8)}> (kept)
    block_scale = Cast <to = {int(ir.DataType.FLOAT)}> (narrow)
    step = Mul (block_scale, scale)
    scaled = Div (size, step)
    small = Min (scaled, six)
    half = Constant <value_float = 0.5> ()
    one = Constant <value_float = 1.0> ()
    two = Constant <value_float = 2.0> ()
    four = Constant <value_float = 4.0> ()
    below_four = Less (small, four)
    coarse = Where (below_four, one, two)
    below_two = Less (small, two)
    grid = Where (below_two, half, coarse)
    count = Div (small, grid)
    whole = Round (count)
    element = Mul (whole, grid)
    restored = Mul (element, step)
    sign = Sign (grouped)
    signed = Mul (restored, sign)
    flat = Reshape (signed, shape)
    y = CastLike (flat, x)
"""


def round_function() -> ir.Function:
    """``y = RoundToNvfp4 (x, scale)``: ``x`` [..., K] of any floating type, rounded with the tensor's scale []."""
    proto = parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]> {ROUND} (x, scale) => (y) {{{_BODY}}}'
    )
    for node in proto.node:
        node.name = f"{ROUND}.{node.output[0]}"
    return ir.serde.deserialize_function(proto)


def twin_template(template: Template, scheme: tuple[LayerScheme, ...]) -> Template:
    """A copy of ``template`` whose linears in ``scheme`` round their inputs to NVFP4; weights keep their type."""
    editor = _Editor(template)
    for layer in scheme:
        node, _ = editor.product(layer)
        editor.quantize_input(node, layer, editor.rounded)
    editor.model.graph.opset_imports[DOMAIN] = 1
    function = round_function()
    editor.model.functions[function.identifier()] = function
    return editor.finished(template, ())


def engine_template(template: Template, scheme: tuple[LayerScheme, ...]) -> Template:
    """A copy of ``template`` in which the linears of ``scheme`` are products of 4 bits in TensorRT."""
    editor = _Editor(template)
    blocks = []
    for layer in scheme:
        node, weight = editor.product(layer)
        editor.make_rows(node, layer)
        editor.quantize_input(node, layer, editor.dynamic)
        blocks.append(editor.quantize_weight(node, layer, weight))
    editor.model.graph.opset_imports[TENSORRT] = 1
    return editor.finished(template, tuple(blocks))


class _Place(NamedTuple):
    """Where quantizers are put: in front of a product, of the type ``dtype``."""

    node: ir.Node
    module: str
    dtype: ir.DataType


class _Editor:
    """Edits a copy of a template's graph and keeps the names of the scales that it asks for, in order."""

    def __init__(self, template: Template) -> None:
        self.model = template.model.clone()
        inferred = infer_shapes(template.model.clone())
        self._shapes = {value.name: value.shape for node in inferred.graph for value in node.outputs}
        self.scales: list[str] = []
        self._quantized: dict[tuple[int, str], ir.Value] = {}
        self._rows: dict[ir.Value, ir.Value] = {}

    def finished(self, template: Template, transposed: tuple[str, ...]) -> Template:
        """The template; ``transposed`` names scales that lie in the file as their weights do."""
        self.model.graph.sort()
        parameters = (*template.parameters, *self.scales)
        return Template(model=self.model, parameters=parameters, transposed=template.transposed.union(transposed))

    def product(self, layer: LayerScheme) -> tuple[ir.Node, ir.Value]:
        """The product of a linear, and its weight [in, out]."""
        assert layer.kind == "linear", layer.module
        weight = self.model.graph.initializers[f"{layer.module}.weight"]
        (use,) = weight.uses()
        assert use.node.op_type in ("MatMul", "Gemm"), use.node.name
        assert use.idx == 1, use.node.name
        return use.node, weight

    def quantize_input(
        self, node: ir.Node, layer: LayerScheme, quantized: Callable[[ir.Value, _Place], ir.Value]
    ) -> None:
        """Round input 0 of ``node``; layers that read the same tensor with the same scale share the rounded one."""
        value, weight = node.inputs[:2]
        assert value is not None
        assert weight is not None
        assert weight.dtype is not None
        key = (id(value), layer.input_like)
        if key not in self._quantized:
            self._quantized[key] = quantized(value, _Place(node, layer.module, weight.dtype))
        node.replace_input_with(0, self._quantized[key])

    def make_rows(self, node: ir.Node, layer: LayerScheme) -> None:
        """Let a product [..., in] x [in, out] of more dimensions than TensorRT takes be one of rows."""
        value, result = node.inputs[0], node.outputs[0]
        assert value is not None
        shape = self._shape(value)
        if len(shape) <= MOST_DIMENSIONS:
            return
        if value not in self._rows:
            ends = constant(self.model.graph, f"rows_of_{shape[-1]}", ir.tensor([-1, _width(shape)], ir.DataType.INT64))
            rows = ir.node("Reshape", [value, ends], name=f"{layer.module}.Rows")
            adopt(rows, node)
            self.model.graph.insert_before(node, rows)
            self._shapes[rows.outputs[0].name] = ir.Shape([None, shape[-1]])
            self._rows[value] = rows.outputs[0]
        node.replace_input_with(0, self._rows[value])
        lead = ir.node("Shape", [value], {"start": 0, "end": -1}, name=f"{layer.module}.Lead")
        last = constant(self.model.graph, "last_dimension", ir.tensor([-1], ir.DataType.INT64))
        whole = ir.node("Concat", [lead.outputs[0], last], {"axis": 0}, name=f"{layer.module}.Shape")
        back = ir.node("Reshape", [result, whole.outputs[0]], name=f"{layer.module}.Reshape")
        result.replace_all_uses_with(back.outputs[0])
        back.replace_input_with(0, result)
        for each in (lead, whole, back):
            adopt(each, node)
        self.model.graph.insert_after(node, [lead, whole, back])

    def rounded(self, value: ir.Value, place: _Place) -> ir.Value:
        """``value`` rounded by the twin's function."""
        scale = self._scale(f"{place.module}.input_scale", ir.DataType.FLOAT, [])
        node = ir.node(ROUND, [value, scale], domain=DOMAIN, name=f"{place.module}.{ROUND}")
        self._add(place, node, self._shape(value), place.dtype)
        return node.outputs[0]

    def dynamic(self, value: ir.Value, place: _Place) -> ir.Value:
        """``value`` through TensorRT's dynamic quantize and back."""
        shape = self._shape(value)
        scale = self._scale(f"{place.module}.input_scale", ir.DataType.FLOAT, [])
        attributes = {"axis": -1, "block_size": BLOCK, "scale_type": int(FP8)}
        name = f"{place.module}.DynamicQuantize"
        node = ir.node(DYNAMIC_QUANTIZE, [value, scale], attributes, domain=TENSORRT, num_outputs=2, name=name)
        self._add(place, node, shape, FP4)
        elements, block_scale = node.outputs
        block_scale.name, block_scale.type = f"{name}.scale", ir.TensorType(FP8)
        block_scale.shape = ir.Shape([*shape[:-1], _width(shape) // BLOCK])
        return self._dequantized(place, "Input", elements, block_scale, scale, axis=-1)

    def _shape(self, value: ir.Value) -> ir.Shape:
        """What inference knows of a value: nothing is inferred through an operator that ONNX does not know."""
        shape = self._shapes.get(value.name) or value.shape
        assert shape is not None, value.name
        return shape.copy()

    def quantize_weight(self, node: ir.Node, layer: LayerScheme, weight: ir.Value) -> str:
        """Make the weight one of 4 bits behind two DequantizeLinear; returns the name of its block scales."""
        assert weight.dtype is not None
        assert weight.shape is not None
        place = _Place(node, layer.module, weight.dtype)
        inputs, outputs = weight.shape.numpy()
        blocks = self._scale(f"{layer.module}.weight_block_scale", FP8, [inputs // BLOCK, outputs])
        scale = self._scale(f"{layer.module}.weight_scale", ir.DataType.FLOAT, [])
        weight.type = ir.TensorType(FP4)  # a new one: the type object is the original template's
        node.replace_input_with(1, self._dequantized(place, "Weight", weight, blocks, scale, axis=0))
        assert blocks.name is not None
        return blocks.name

    def _dequantized(
        self, place: _Place, what: str, elements: ir.Value, blocks: ir.Value, scale: ir.Value, axis: int
    ) -> ir.Value:
        """Block scales times the tensor's scale in float32, and ``elements`` times that in the product's type."""
        first = ir.node("DequantizeLinear", [blocks, scale], name=f"{place.module}.{what}ScaleDequantizeLinear")
        self._add(place, first, blocks.shape, ir.DataType.FLOAT)
        attributes = {"axis": axis, "block_size": BLOCK}
        name = f"{place.module}.{what}DequantizeLinear"
        second = ir.node("DequantizeLinear", [elements, first.outputs[0]], attributes, name=name)
        self._add(place, second, elements.shape, ir.DataType.FLOAT)
        if place.dtype == ir.DataType.FLOAT:
            return second.outputs[0]
        cast = ir.node("Cast", [second.outputs[0]], {"to": place.dtype}, name=f"{name}.Cast")
        self._add(place, cast, elements.shape, place.dtype)
        return cast.outputs[0]

    def _add(self, place: _Place, node: ir.Node, shape: ir.Shape | None, dtype: ir.DataType) -> None:
        """Put ``node`` in front of the product; its first output has this shape and type."""
        adopt(node, place.node)
        node.outputs[0].shape, node.outputs[0].type = shape, ir.TensorType(dtype)
        self.model.graph.insert_before(place.node, node)

    def _scale(self, name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
        """The parameter ``name``, without a value as yet."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.model.graph.initializers[name] = value
        self.scales.append(name)
        return value


def _width(shape: ir.Shape) -> int:
    """The last size of a linear's input, which no graph leaves open."""
    last = shape[-1]
    assert isinstance(last, int), shape
    return last
