"""Q/DQ in traced graphs: their pattern, and that ONNX Runtime computes what fake-quantized torch computes."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from stiv_deploy.calibration.layers import LARGEST, Format
from stiv_deploy.calibration.plan import everything
from stiv_deploy.calibration.scales import scale_of
from stiv_deploy.export.bundle_from_checkpoint import default_bucket, export_bundle
from stiv_deploy.export.errors import CheckError
from stiv_deploy.export.graphs.check import FLOOR, draw_inputs, open_session, relative_error
from stiv_deploy.export.graphs.onnx_from_module import Template, structure_faults, write_graph
from stiv_deploy.export.graphs.quantization import LayerScheme, Quantization, StoredTensors, graph_scheme
from stiv_deploy.export.graphs.quantized_graph import TYPES, quantized_template
from stiv_deploy.export.graphs.writer import GraphWriter, in_precision
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.contract import GraphSpec, Precision, dimensions
from stiv_deploy.runtime.bundle.manifest import MANIFEST, Manifest
from stiv_deploy.runtime.files import sha256
from stiv_deploy.stiv_ref.checkpoint import Checkpoint

Quantize = Callable[..., Quantization]
TracedGraph = tuple[Template, nn.Module, GraphSpec]
BLOCK_LINEARS = 8


def rounded(values: Tensor, scale: Tensor, quantization: Format) -> Tensor:
    """The nearest values that 8 bits hold, in fp64, from the formats' definitions; operators use int8's -128, too."""
    lowest = -128 if quantization == "int8" else -LARGEST[quantization]
    scaled = (values.double() / scale.double()).clamp(lowest, LARGEST[quantization])
    if quantization == "int8":
        return scaled.round() * scale.double()
    exponent = torch.frexp(scaled).exponent.clamp_min(-5)  # scaled = m * 2 ** exponent, 0.5 <= m < 1
    step = torch.ldexp(torch.ones_like(scaled), exponent - 4)  # E4M3: four bits with the hidden one
    return (scaled / step).round() * step * scale.double()


def quantized_head(head: TracedGraph, quantization: Quantization, folder: Path) -> Path:
    template, module, _ = head
    amax = {name: value for name, value in quantization.scales.amax.items() if name.startswith("head.")}
    name = "head.head.out"
    scheme = LayerScheme(
        module="head.out",
        kind="linear",
        format=quantization.format,
        per_channel=amax[f"{name}.weight"].dim() == 1,
        smooth=f"{name}.smooth" in amax,
    )
    tensors = StoredTensors(module, "head", torch.float32, (scheme,), amax)
    write_graph(quantized_template(template, (scheme,), 16), tensors, folder, "head")
    return folder / "head.onnx"


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("smooth", [(), ("head.head.out",)])
def test_a_quantized_linear_computes_what_torch_computes(
    micro: Checkpoint,
    head: TracedGraph,
    quantize: Quantize,
    tmp_path: Path,
    quantization: Format,
    per_channel: bool,
    smooth: tuple[str, ...],
) -> None:
    """Against the linear with rounded operands in fp64; codes at a tie may flip, so nearly all outputs must agree."""
    chosen = quantize(quantization, per_channel=per_channel, smooth=smooth)
    path = quantized_head(head, chosen, tmp_path)
    _, module, spec = head
    assert structure_faults(path, spec) == []

    amax = {part: chosen.scales.amax.get(f"head.head.out.{part}") for part in ("input", "weight", "smooth")}
    assert amax["input"] is not None
    assert amax["weight"] is not None
    factor = torch.ones(()) if amax["smooth"] is None else amax["smooth"]
    input_scale, weight_scale = (scale_of(amax[part], quantization, torch.float32) for part in ("input", "weight"))
    stored = copy.deepcopy(module)
    linear = stored.source.head.out
    column = weight_scale.reshape(-1, 1)
    linear.weight = nn.Parameter(rounded(linear.weight * factor, column, quantization).float(), requires_grad=False)
    linear.register_forward_pre_hook(
        lambda _, inputs: (rounded(inputs[0] / factor, input_scale, quantization).float(),)
    )

    inputs = draw_inputs(spec, sizes(micro), vocabulary=19)
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    (found,) = open_session(path, quantization).run(None, feed)
    wanted, plain = stored(*inputs.values()), module(*inputs.values())
    assert relative_error(wanted, plain) > 1e-3, "the 8 bits show"
    different = np.abs(found - wanted.numpy()) > 1e-5 * float(wanted.abs().max())
    assert different.mean() < 0.02
    assert relative_error(found, wanted) < 0.1 * relative_error(wanted, plain)


def sizes(micro: Checkpoint) -> dict[str, int]:
    from stiv_deploy.export.graphs.modules import model_facts

    return dimensions(
        model_facts(micro.config), batch=1, model_batch=2, video_frames=3, height=40, width=24, text_tokens=5
    )


def test_the_template_stays_as_it_was(head: TracedGraph, quantize: Quantize, tmp_path: Path) -> None:
    """Types of cloned values are shared: what one plan quantizes must not become 8-bit for the next."""
    template, module, _ = head
    before = write_graph(template, StoredTensors(module, "head", torch.float32), tmp_path, "before")
    for quantization in ("fp8", "int8"):
        quantized_head(head, quantize(quantization), tmp_path)
    assert template.model.graph.initializers["head.out.weight"].dtype == ir.DataType.FLOAT
    after = write_graph(template, StoredTensors(module, "head", torch.float32), tmp_path, "after")
    assert before.topology == after.topology


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_the_pattern_of_a_linear(head: TracedGraph, quantize: Quantize, tmp_path: Path, quantization: Format) -> None:
    model = onnx.load(quantized_head(head, quantize(quantization), tmp_path), load_external_data=False)
    made = {node.output[0]: node for node in model.graph.node}
    (product,) = [node for node in model.graph.node if node.op_type == "MatMul"]
    data, weight = (made[name] for name in product.input)
    assert data.op_type == weight.op_type == "DequantizeLinear"
    assert made[data.input[0]].op_type == "QuantizeLinear"
    assert made[data.input[0]].input[1:] == data.input[1:], "one scale and zero point for both"
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert stored[weight.input[0]].name == "head.out.weight", "8 bits in the file, no QuantizeLinear"
    assert stored[weight.input[0]].data_type == int(TYPES[quantization])
    assert {prop.key: prop.value for prop in data.metadata_props} == {
        prop.key: prop.value for prop in product.metadata_props
    }
    axes = [attribute.i for attribute in weight.attribute if attribute.name == "axis"]
    assert axes == ([1] if quantization == "int8" else []), "[in, out]: channels are columns"
    inline = [tensor.name for tensor in model.graph.initializer if not tensor.external_data]
    assert not any("_scale" in name for name in inline), "scales are values: outside the topology"


@pytest.fixture(scope="module")
def written(
    micro: Checkpoint, quantize: Quantize, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Format], dict[str, onnx.ModelProto]]:
    """Graphs of the small model with everything in 8 bits, written once for each format."""
    made: dict[Format, dict[str, onnx.ModelProto]] = {}

    def write(quantization: Format) -> dict[str, onnx.ModelProto]:
        if quantization not in made:
            folder = tmp_path_factory.mktemp(quantization)
            chosen = quantize(quantization, plan=everything(micro.config.model, quantization))
            writer = GraphWriter(micro, folder, "float16", chosen)
            for name in ("block_00", "block_01", "embed", "text_kv"):
                writer.write(name)
            made[quantization] = {
                path.stem: onnx.load(path, load_external_data=False) for path in folder.glob("*.onnx")
            }
        return made[quantization]

    return write


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_spatial_attention_is_primitive_and_the_others_are_not(
    written: Callable[[Format], dict[str, onnx.ModelProto]], quantization: Format
) -> None:
    graph = written(quantization)["block_00"].graph
    nodes = {node.name: node for node in graph.node}
    made = {node.output[0]: node for node in graph.node}
    assert {name for name in nodes if name.endswith(".Attention")} == {"temporal.Attention", "cross.Attention"}
    for name in ("spatial.Scores", "spatial.Mix"):
        for operand in nodes[name].input:
            assert made[operand].op_type == "DequantizeLinear", "DQ feeds the product"
            assert made[made[operand].input[0]].op_type == "QuantizeLinear"
    scores = [made[made[made[name].input[0]].input[0]].name for name in nodes["spatial.Scores"].input]
    assert scores == ["spatial.Scale", "spatial.TransposeKeys"], "scaled and transposed before they are quantized"
    unit = next(tensor for tensor in graph.initializer if tensor.name == "spatial.attention.probability_scale")
    assert onnx.numpy_helper.to_array(unit) == np.float16(1 / LARGEST[quantization])
    counts = Counter(node.op_type for node in graph.node)
    assert counts["QuantizeLinear"] == BLOCK_LINEARS + 4
    assert counts["DequantizeLinear"] == 2 * BLOCK_LINEARS + 4
    assert len(nodes) == len(graph.node), "node names are unique"


@pytest.mark.slow
def test_what_reads_one_tensor_shares_its_quantize(written: Callable[[Format], dict[str, onnx.ModelProto]]) -> None:
    graph = written("fp8")["text_kv"].graph
    assert Counter(node.op_type for node in graph.node)["QuantizeLinear"] == 3, "text_in, text_out, all k and v"


@pytest.mark.slow
def test_linears_that_became_gemm(written: Callable[[Format], dict[str, onnx.ModelProto]]) -> None:
    graph = written("int8")["embed"].graph
    made = {node.output[0]: node.op_type for node in graph.node}
    gemms = [node for node in graph.node if node.op_type == "Gemm" and "position" not in node.name]
    assert len(gemms) == 12
    assert all([made.get(name) for name in node.input] == ["DequantizeLinear"] * 2 + [None] for node in gemms)


@pytest.mark.slow
def test_one_trace_serves_all_plans(
    micro: Checkpoint, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stiv_deploy.export.graphs import writer as graph_writer

    traced: list[str] = []

    def counted(*args: object) -> Template:
        traced.append(str(args[1]))
        return trace(*args)  # type: ignore[arg-type]

    trace = graph_writer.trace
    monkeypatch.setattr(graph_writer, "trace", counted)
    chosen = quantize("fp8")
    writer = GraphWriter(micro, tmp_path, "float16", chosen)
    equal = [writer.write(name).topology for name in ("block_00", "block_01")]
    assert equal[0] == equal[1], "scales and weights are values"
    layers = {**chosen.plan.layers, "block_01.ffn.down": "high"}
    mixed = replace(chosen, plan=chosen.plan.model_copy(update={"layers": layers}))
    writer.quantization = mixed
    assert writer.write("block_01").topology != equal[0]
    assert writer.write("block_00").topology == equal[0]
    assert traced == ["block"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "precision", "smooth", "all_layers"),
    [("fp8", "float16", (), True), ("int8", "float32", ("block_00.ffn.up",), False), ("fp8", "bfloat16", (), False)],
)
def test_bundles_pass_the_comparison(
    micro: Checkpoint,
    micro_path: Path,
    quantize: Quantize,
    saved: Callable[[Quantization], dict[str, Any]],
    tmp_path: Path,
    quantization: Format,
    precision: Precision,
    smooth: tuple[str, ...],
    all_layers: bool,
) -> None:
    """ModelOpt's fake quantization is the yardstick: a second implementation of everything in this file."""
    pytest.importorskip("modelopt")
    plan = everything(micro.config.model, quantization) if all_layers else None
    chosen = quantize(quantization, plan=plan, smooth=smooth)
    files = saved(chosen)
    request = ExportRequest(checkpoint=micro_path, out=tmp_path / "bundle", precision=precision, **files)
    export_bundle(request)
    manifest = Manifest.model_validate_json((tmp_path / "bundle" / MANIFEST).read_text())
    record = replace(chosen, sha256=sha256(files["scales"])).record()
    assert (manifest.precision, manifest.quantization) == (precision, record)
    topologies = {record.topology for name, record in manifest.graphs.items() if name.startswith("block_")}
    assert len(topologies) == (2 if smooth else 1)


@pytest.mark.slow
def test_the_comparison_finds_a_wrong_scale(
    micro: Checkpoint, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An activation's scale that is too small clips; a weight's scale must be the one it was quantized with.

    Of a weight in front of a stateless norm nothing but its bias would show that.
    """
    pytest.importorskip("modelopt")
    wrong = {"ffn.up.input_scale": 0.125, "ffn.up.weight_scale": 4.0, "spatial.attention.q_scale": 0.125}
    chosen = quantize("fp8", plan=everything(micro.config.model, "fp8"))
    writer = GraphWriter(micro, tmp_path, "float16", chosen)
    bucket = default_bucket(micro.config.sampling, writer.facts)
    original = StoredTensors.__getitem__
    for name, factor in wrong.items():

        def changed(self: StoredTensors, key: str, name: str = name, factor: float = factor) -> Tensor:
            return original(self, key) * factor if key == name else original(self, key)

        monkeypatch.setattr(StoredTensors, "__getitem__", changed)
        record = writer.write("block_00")
        with pytest.raises(CheckError, match="graph block_00 differs from the reference"):
            writer.check("block_00", record.topology, [bucket])
    monkeypatch.setattr(StoredTensors, "__getitem__", original)
    writer.check("block_00", writer.write("block_00").topology, [bucket])


@pytest.mark.slow
def test_activation_outliers_stay_finite(
    make_checkpoint: Callable[..., Checkpoint], micro: Checkpoint, tmp_path: Path
) -> None:
    """Width of the XL model, tokens with values of 1000 and of 20000: statistics are in float32, so nothing overflows.

    Their squares do not fit float16 (65504), nor does the sum of 1152 of them.
    """
    config = micro.config.model.model_copy(update={"width": 1152, "heads": 18, "blocks": 1})
    checkpoint = make_checkpoint(config)
    writer = GraphWriter(checkpoint, tmp_path, "float16")
    writer.write("block_00")
    session = open_session(tmp_path / "block_00.onnx")
    dims = dimensions(writer.facts, batch=1, model_batch=1, video_frames=2, height=40, width=40, text_tokens=5)
    for outlier in (1000.0, 20000.0):
        inputs = draw_inputs(writer.specs["block_00"], dims, vocabulary=19)
        inputs["x"][..., ::97] *= outlier / float(inputs["x"][..., ::97].abs().max())
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        with torch.no_grad():
            wanted = writer.modules["block_00"](*(tensor.float() for tensor in inputs.values()))
            plain = in_precision(writer.modules["block_00"], torch.float16)(*inputs.values())
        gate = 2 * relative_error(plain.float(), wanted) + FLOOR[torch.float16]
        assert relative_error(found, wanted) <= gate < 5e-3


def test_scales_follow_the_layers(micro: Checkpoint, quantize: Quantize) -> None:
    chosen = quantize("fp8", plan=everything(micro.config.model, "fp8"))
    (layer,) = graph_scheme(chosen, micro.config.model, "head")
    assert (layer.module, layer.kind, layer.format, layer.per_channel) == ("head.out", "linear", "fp8", False)
