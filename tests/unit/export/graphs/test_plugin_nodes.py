"""Plugin nodes: their translation from PyTorch, and what the passes do with biases and quantization around them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from stiv_deploy.calibration.layers import Format
from stiv_deploy.export.graphs.check import FLOAT32_GATE, open_session, relative_error
from stiv_deploy.export.graphs.modules import model_facts
from stiv_deploy.export.graphs.onnx_from_module import (
    OPSET,
    Template,
    parameters_of,
    structure_faults,
    trace,
    write_graph,
    write_second_form,
)
from stiv_deploy.export.graphs.plugin_nodes import absorb_quantization, attach_functions, plugin_names
from stiv_deploy.export.graphs.quantization import LayerScheme, StoredTensors
from stiv_deploy.export.graphs.quantized_graph import quantized_template
from stiv_deploy.runtime.bundle.contract import GraphSpec, ModelFacts, Precision, graph_specs
from stiv_deploy.runtime.plugins.spec import (
    DOMAIN,
    PLUGINS,
    SPATIAL_QKV,
    TEMPORAL_ATTENTION,
    VERSION,
)
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.fused.modules import FusedSpatial, FusedTemporal


class Attentions(nn.Module):
    """Fused attention in space, then in time, as a block has them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.spatial = FusedSpatial(width, heads)
        self.temporal = FusedTemporal(width, heads)

    def forward(self, x: Tensor, *tables: Tensor) -> Tensor:
        y = self.spatial(x.flatten(0, 1), *tables[:2]).reshape(x.shape)
        return self.temporal(y, *tables[2:])


class AttentionsGraph(nn.Module):
    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    def forward(
        self, x: Tensor, spatial_cos: Tensor, spatial_sin: Tensor, temporal_cos: Tensor, temporal_sin: Tensor
    ) -> Tensor:
        tables = (spatial_cos, spatial_sin, temporal_cos, temporal_sin)
        return self.source(x, *(table.to(x.dtype) for table in tables))


@dataclass
class Traced:
    template: Template
    module: AttentionsGraph
    spec: GraphSpec


def attentions_spec(facts: ModelFacts, precision: Precision) -> GraphSpec:
    """A block's contract less what attention in space and time does not see."""
    block = graph_specs(facts, precision)["block_00"]
    names = ("x", "spatial_cos", "spatial_sin", "temporal_cos", "temporal_sin")
    return GraphSpec(inputs=tuple(each for each in block.inputs if each.name in names), outputs=block.outputs)


def traced_attentions(micro: Checkpoint, precision: Precision) -> Traced:
    dtype = getattr(torch, precision)
    facts = model_facts(micro.config).model_copy(update={"width": 64})
    spec = attentions_spec(facts, precision)
    torch.manual_seed(0)
    source = Attentions(64, 2)
    module = AttentionsGraph(source).to(dtype).requires_grad_(False)
    for attention in (source.spatial, source.temporal):
        for name in ("q_norm", "k_norm"):
            attention.get_submodule(name).weight.uniform_(0.5, 1.5)
    return Traced(trace(module, "attentions", spec, facts), module, spec)


@pytest.fixture(scope="module")
def traced(micro: Checkpoint) -> Traced:
    return traced_attentions(micro, "float32")


@pytest.fixture(scope="module")
def traced_half(micro: Checkpoint) -> Traced:
    return traced_attentions(micro, "float16")


def written(traced: Traced, folder: Path, *schemes: LayerScheme, amax: float = 5.0) -> onnx.ModelProto:
    """The graph as written, quantized by ``schemes``."""
    model = write(traced, folder, *schemes, amax=amax)
    return onnx.load(model, load_external_data=False)


def write(traced: Traced, folder: Path, *schemes: LayerScheme, amax: float = 5.0) -> Path:
    ranges: dict[str, Tensor] = {}
    for scheme in schemes:
        parts = ("q", "k", "v") if scheme.kind == "attention" else ("input", "weight")
        ranges |= {f"graph.{scheme.module}.{part}": torch.tensor(amax) for part in parts}
        if scheme.smooth:
            ranges[f"graph.{scheme.module}.smooth"] = torch.linspace(0.5, 2, 64)
    dtype = next(traced.module.parameters()).dtype
    tensors = StoredTensors(traced.module, "graph", dtype, schemes, ranges)
    template = quantized_template(traced.template, schemes, 32)
    write_graph(template, tensors, folder, "graph")
    assert structure_faults(folder / "graph.onnx", traced.spec) == []
    return folder / "graph.onnx"


def nodes_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in model.graph.node}


TEMPORAL, SPATIAL = "temporal.StivTemporalAttention", "spatial.StivSpatialQkv"


def test_nodes_are_what_the_specification_says(traced: Traced, tmp_path: Path) -> None:
    model = written(traced, tmp_path)
    nodes = nodes_of(model)
    for name, spec in ((SPATIAL, SPATIAL_QKV), (TEMPORAL, TEMPORAL_ATTENTION)):
        node = nodes[name]
        assert (node.op_type, node.domain) == (spec.name, DOMAIN)
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        assert list(attributes) == sorted(attributes), "in an order of ours, not of a hash table"
        assert attributes.pop("plugin_version") == VERSION.encode()
        assert attributes.pop("plugin_namespace") == DOMAIN.encode()
        assert set(attributes) == {each.name for each in spec.attributes}
        assert attributes["heads"] == 2
        assert attributes["epsilon"] == pytest.approx(1e-6)
        assert attributes.get("query_scale", 1.0) == 1.0
        scope = name.partition(".")[0]
        inputs = [f"{scope}.{each}" for each in ("qkv.MatMul", "qkv.bias", "q_norm.weight", "k_norm.weight")]
        assert list(node.input) == [*inputs, f"{scope}_cos", f"{scope}_sin"]
    assert {each.domain: each.version for each in model.opset_import} == {"": OPSET, DOMAIN: 1}
    assert {function.name for function in model.functions} == {spec.name for spec in PLUGINS}
    assert plugin_names(traced.template.model.graph) == ("StivSpatialQkv/1", "StivTemporalAttention/1")


def test_biases_are_the_nodes_own(traced: Traced, tmp_path: Path) -> None:
    nodes = written(traced, tmp_path).graph.node
    for bias in ("spatial.qkv.bias", "temporal.qkv.bias"):
        assert [(node.op_type, list(node.input).index(bias)) for node in nodes if bias in node.input] in (
            [("StivSpatialQkv", 1)],
            [("StivTemporalAttention", 1)],
        )


def test_nothing_is_moved_around_attention_in_time(traced: Traced, tmp_path: Path) -> None:
    nodes = nodes_of(written(traced, tmp_path))
    assert nodes[TEMPORAL].input[0] == nodes["temporal.qkv.MatMul"].output[0]
    assert nodes["temporal.out.MatMul"].input[0] == nodes[TEMPORAL].output[0]
    inside = [node.op_type for name, node in nodes.items() if name.startswith("temporal.")]
    assert sorted(inside) == ["Add", "MatMul", "MatMul", "StivTemporalAttention"]


def run(path: Path, inputs: dict[str, Tensor], quantization: Format | None = None) -> np.ndarray:
    (found,) = open_session(path, quantization).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return found


def drawn(traced: Traced, batch: int, frames: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    angles = {"spatial": torch.rand(tokens, 16, generator=generator), "temporal": torch.rand(frames, 16)}
    tables = {}
    for name, angle in angles.items():
        tables |= {f"{name}_cos": angle.cos(), f"{name}_sin": angle.sin()}
    dtype = next(traced.module.parameters()).dtype
    return {"x": torch.randn(batch, frames, tokens, 64, generator=generator).to(dtype), **tables}


@pytest.mark.parametrize("sizes", [(2, 4, 6), (1, 1, 1), (3, 5, 7)])
def test_the_traced_graph_computes_what_the_module_computes(
    traced: Traced, tmp_path: Path, sizes: tuple[int, int, int]
) -> None:
    inputs = drawn(traced, *sizes)
    found = run(write(traced, tmp_path), inputs)
    assert relative_error(found, traced.module(*inputs.values())) < FLOAT32_GATE


@pytest.mark.slow
def test_equal_input_gives_equal_bytes(traced: Traced, micro: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first = write(traced, tmp_path)
    assert write(traced_attentions(micro, "float32"), tmp_path / "again").read_bytes() == first.read_bytes()


def test_a_second_form_reads_the_first_forms_data(traced: Traced, tmp_path: Path) -> None:
    """The weights lie in the order of the first form; each tensor is found where it is, whatever the own order."""
    template = traced.template
    first = replace(template, model=template.model.clone(), parameters=tuple(reversed(template.parameters)))
    write_graph(first, parameters_of(traced.module), tmp_path, "graph")
    second = write_second_form(template, first, tmp_path, "graph.plugin")
    assert second.data is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.onnx", "graph.onnx.data", "graph.plugin.onnx"]
    inputs = drawn(traced, 3, 1, 5)
    assert np.array_equal(run(tmp_path / "graph.plugin.onnx", inputs), run(tmp_path / "graph.onnx", inputs))


def test_functions_are_those_that_the_nodes_need(traced: Traced) -> None:
    model = traced.template.model.clone()
    attach_functions(model)
    attach_functions(model)
    assert [name for _, name, _ in model.functions] == ["StivSpatialQkv", "StivTemporalAttention"]


class Direct(nn.Module):
    """Both operators with all their arguments, and a bias that no linear adds."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(64, 192, generator=random) / 8, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(192, generator=random), requires_grad=False)
        self.gamma = nn.Parameter(torch.rand(32, generator=random) + 0.5, requires_grad=False)
        self.scales = nn.Parameter(torch.tensor([0.01, 0.02, 0.03, 0.05]), requires_grad=False)

    def forward(self, x: Tensor, *tables: Tensor) -> Tensor:
        weights = (self.bias, self.gamma, self.gamma)
        y_scale, *scales = self.scales.unbind()
        qkv = x @ self.weight
        codes = torch.ops.stiv.spatial_qkv(qkv.flatten(0, 1), *weights, *tables[:2], 2, 0.3, 0.25, *scales)
        q, k, v = (code.float() * scale for code, scale in zip(codes, scales, strict=True))
        y = torch.ops.stiv.temporal_attention(qkv, *weights, *tables[2:], 2, 0.2, y_scale)
        return y.float() * y_scale + (q + k + v).transpose(1, 2).reshape(x.shape)


def test_all_arguments_of_the_operators_are_translated(micro: Checkpoint, tmp_path: Path) -> None:
    """Codes at a tie may differ: at most one in a hundred, by an eighth."""
    facts = model_facts(micro.config).model_copy(update={"width": 64})
    spec = attentions_spec(facts, "float32")
    module = AttentionsGraph(Direct())
    direct = Traced(trace(module, "direct", spec, facts), module, spec)
    inputs = drawn(direct, 2, 3, 5)
    path = write(direct, tmp_path)
    nodes = {node.op_type: node for node in onnx.load(path, load_external_data=False).graph.node}
    assert [len(nodes[each.name].input) for each in PLUGINS] == [7, 9]
    assert relative_error(run(path, inputs), module(*inputs.values())) < 0.01**0.5 / 8


# Quantization


def linear(module: str, **changes: Any) -> LayerScheme:
    return replace(LayerScheme(module=module, kind="linear", format="fp8", input_like=module), **changes)


ATTENTION = LayerScheme(module="spatial.attention", kind="attention", format="fp8")


def test_the_quantization_behind_attention_in_time_is_absorbed(traced_half: Traced, tmp_path: Path) -> None:
    model = written(traced_half, tmp_path, linear("temporal.qkv"), linear("temporal.out"))
    nodes = nodes_of(model)
    cast = nodes["temporal.out.input_scale.Cast"]
    assert list(nodes[TEMPORAL].input)[6:] == list(cast.output)
    assert helper.get_attribute_value(cast.attribute[0]) == TensorProto.FLOAT
    assert "temporal.out.QuantizeLinear" not in nodes
    dequantize = nodes["temporal.out.DequantizeLinear"]
    assert list(dequantize.input) == [nodes[TEMPORAL].output[0], "temporal.out.input_scale", "fp8_zero_point"]
    assert list(nodes["temporal.out.MatMul"].input)[0] == dequantize.output[0]
    assert "temporal.qkv.QuantizeLinear" in nodes, "what stands in front of the node is not its own"
    (function,) = [each for each in model.functions if each.name == TEMPORAL_ATTENTION.name]
    assert list(function.input)[6:] == ["output_scale"]
    assert all(len(node.input) == 6 for node in [nodes[SPATIAL]])


def test_scales_in_float32_are_read_as_they_are(traced: Traced, tmp_path: Path) -> None:
    nodes = nodes_of(written(traced, tmp_path, linear("temporal.out")))
    assert nodes[TEMPORAL].input[6] == "temporal.out.input_scale"
    assert not [node for node in nodes.values() if node.op_type == "Cast"]


@pytest.mark.parametrize(
    "scheme", [linear("temporal.out", smooth=True), linear("temporal.out", format="int8")], ids=["smooth", "int8"]
)
def test_other_quantization_stays_as_it_is(traced_half: Traced, tmp_path: Path, scheme: LayerScheme) -> None:
    nodes = nodes_of(written(traced_half, tmp_path, scheme))
    assert "temporal.out.QuantizeLinear" in nodes
    assert len(nodes[TEMPORAL].input) == 6


@pytest.mark.parametrize(
    ("scales", "others", "absorbed"), [([], 0, True), ([], 1, False), ([8], 0, False)], ids=["all", "user", "channels"]
)
def test_quantization_is_absorbed_where_it_is_all_that_follows(scales: list[int], others: int, absorbed: bool) -> None:
    def value(name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    inputs = [value(tensor.name, ir.DataType.FLOAT, [8]) for tensor in TEMPORAL_ATTENTION.inputs[:6]]
    scale, zero = value("scale", ir.DataType.FLOAT, scales), value("zero", ir.DataType.FLOAT8E4M3FN, scales)
    node = ir.node(TEMPORAL_ATTENTION.name, inputs, domain=DOMAIN, name="temporal")
    quantize = ir.node("QuantizeLinear", [node.outputs[0], scale, zero], name="quantize")
    users = [quantize, *(ir.node("Identity", node.outputs, name=f"user_{index}") for index in range(others))]
    ends = [ir.node("Identity", user.outputs, name=f"{user.name}_end") for user in users]
    outputs = [end.outputs[0] for end in ends]
    graph = ir.Graph([*inputs, scale, zero], outputs, nodes=[node, *users, *ends], name="graph")
    absorb_quantization(graph)
    assert (quantize not in list(graph), len(node.inputs)) == (absorbed, 7 if absorbed else 6)


def test_fp8_attention_in_space_is_fed_in_fp8(traced_half: Traced, tmp_path: Path) -> None:
    model = written(traced_half, tmp_path, linear("spatial.qkv"), ATTENTION, linear("spatial.out"))
    nodes = nodes_of(model)
    node = nodes[SPATIAL]
    assert list(node.input)[6:] == [nodes[f"spatial.attention.{part}_scale.Cast"].output[0] for part in "qkv"]
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    assert attributes["query_scale"] == pytest.approx(32**-0.5)
    q, k, v = (nodes[f"spatial.attention.{part}.DequantizeLinear"] for part in "qkv")
    assert (q.input[0], v.input[0]) == (node.output[0], node.output[2])
    assert list(nodes["spatial.TransposeKeys"].input) == [node.output[1]]
    assert k.input[0] == nodes["spatial.TransposeKeys"].output[0], "the keys are turned in FP8"
    assert list(nodes["spatial.Scores"].input) == [q.output[0], k.output[0]]
    assert nodes["spatial.Mix"].input[1] == v.output[0]
    assert "spatial.Scale" not in nodes
    assert "spatial.softmax_scale" not in {tensor.name for tensor in model.graph.initializer}
    left = [name for name in nodes if name.startswith("spatial.") and name.endswith(".QuantizeLinear")]
    assert left == ["spatial.qkv.QuantizeLinear", "spatial.attention.probability.QuantizeLinear"] + [
        "spatial.out.QuantizeLinear"
    ]


def test_int8_attention_in_space_stays_as_it_is(traced_half: Traced, tmp_path: Path) -> None:
    nodes = nodes_of(written(traced_half, tmp_path, replace(ATTENTION, format="int8")))
    assert {f"spatial.attention.{part}.QuantizeLinear" for part in "qkv"} | {"spatial.Scale"} <= set(nodes)
    assert len(nodes[SPATIAL].input) == 6
    (scale,) = [each.f for each in nodes[SPATIAL].attribute if each.name == "query_scale"]
    assert scale == 1.0


@pytest.mark.parametrize("schemes", [(linear("temporal.out"),), (ATTENTION,)], ids=["time", "space"])
def test_absorbed_quantization_computes_what_it_did_before(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schemes: tuple[LayerScheme, ...]
) -> None:
    """Float32 graphs with and without the pass agree but for codes at ties, and differ from no quantization at all."""
    from stiv_deploy.export.graphs import quantized_graph

    inputs = drawn(traced, 2, 3, 5)
    found = run(write(traced, tmp_path, *schemes), inputs, "fp8")
    with monkeypatch.context() as patch:
        patch.setattr(quantized_graph, "absorb_quantization", lambda graph: None)
        before = run(write(traced, tmp_path, *schemes), inputs, "fp8")
    plain = run(write(traced, tmp_path), inputs)
    assert relative_error(before, plain) > 1e-2, "the 8 bits show"
    assert relative_error(found, before) < 0.1 * relative_error(before, plain)
