import copy
import hashlib
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from stiv_deploy.export.graphs import onnx_from_module
from stiv_deploy.export.graphs.check import draw_inputs, open_session
from stiv_deploy.export.graphs.modules import graph_modules, model_facts
from stiv_deploy.export.graphs.onnx_from_module import (
    Template,
    parameters_of,
    structure_faults,
    topology_hash,
    trace,
    write_graph,
)
from stiv_deploy.export.graphs.passes import NAME_SCOPES
from stiv_deploy.runtime.bundle.contract import GraphSpec, dimensions, graph_specs
from stiv_deploy.runtime.bundle.manifest import MANIFEST, Manifest
from stiv_deploy.stiv_ref.checkpoint import Checkpoint

TracedGraph = tuple[Template, nn.Module, GraphSpec]


def stored_tensors(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_weights_keep_their_names_and_lie_transposed(head: TracedGraph, micro: Checkpoint, tmp_path: Path) -> None:
    template, module, _ = head
    write_graph(template, parameters_of(module), tmp_path, "head")
    stored = stored_tensors(tmp_path / "head.onnx")
    assert set(template.parameters) == {"head.table", "head.out.weight", "head.out.bias"} <= set(stored)
    np.testing.assert_array_equal(stored["head.out.weight"], micro.model.head.out.weight.numpy().T)
    np.testing.assert_array_equal(stored["head.out.bias"], micro.model.head.out.bias.numpy())
    assert template.transposed == {"head.out.weight"}


def test_records_describe_the_files(head: TracedGraph, tmp_path: Path) -> None:
    template, module, _ = head
    written = write_graph(template, parameters_of(module), tmp_path, "head")
    assert {path.name for path in tmp_path.iterdir()} == {"head.onnx", "head.onnx.data"}
    assert written.data is not None
    for record in (written.file, written.data):
        content = (tmp_path / record.path).read_bytes()
        assert (record.sha256, record.bytes) == (hashlib.sha256(content).hexdigest(), len(content))


@pytest.mark.slow
def test_tracing_twice_gives_equal_bytes(head: TracedGraph, micro: Checkpoint, tmp_path: Path) -> None:
    first, module, spec = head
    second = trace(module, "head", spec, model_facts(micro.config))
    for folder, template in (("a", first), ("b", second)):
        (tmp_path / folder).mkdir()
        write_graph(template, parameters_of(module), tmp_path / folder, "head")
    for name in ("head.onnx", "head.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_large_tensors_start_at_pages(tmp_path: Path, head: TracedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    template, module, _ = head
    monkeypatch.setattr(onnx_from_module, "LARGE", 1024)
    write_graph(template, parameters_of(module), tmp_path, "head")
    offsets = {
        tensor.name: int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
        for tensor in onnx.load(tmp_path / "head.onnx", load_external_data=False).graph.initializer
        if tensor.external_data
    }
    assert offsets["head.out.weight"] % 4096 == 0
    assert all(offset % 64 == 0 for offset in offsets.values())
    np.testing.assert_array_equal(
        stored_tensors(tmp_path / "head.onnx")["head.out.weight"],
        module.state_dict()["source.head.out.weight"].numpy().T,
    )


def test_weights_beyond_two_gibibytes_are_checked_and_run(head: TracedGraph, micro: Checkpoint, tmp_path: Path) -> None:
    """As in a large text encoder: the file is sparse here, its weights moved behind the reach of 32-bit offsets."""
    template, module, spec = head
    write_graph(template, parameters_of(module), tmp_path, "head")
    path, data = tmp_path / "head.onnx", tmp_path / "head.onnx.data"
    dims = dimensions(
        model_facts(micro.config), batch=1, model_batch=1, video_frames=2, height=16, width=24, text_tokens=4
    )
    inputs = {name: tensor.numpy() for name, tensor in draw_inputs(spec, dims, vocabulary=1).items()}
    (wanted,) = open_session(path).run(None, inputs)
    content, shift = data.read_bytes(), 2**31 + 2**12
    with data.open("wb") as file:
        file.seek(shift)
        file.write(content)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(int(entry.value) + shift)
    path.write_bytes(model.SerializeToString())
    assert structure_faults(path, spec) == []
    assert np.array_equal(open_session(path).run(None, inputs)[0], wanted)


def test_structure_faults_name_the_misfit(head: TracedGraph, tmp_path: Path) -> None:
    template, module, spec = head
    write_graph(template, parameters_of(module), tmp_path, "head")
    path = tmp_path / "head.onnx"
    assert structure_faults(path, spec) == []
    renamed = spec.model_copy(update={"outputs": (spec.outputs[0].model_copy(update={"name": "flow"}),)})
    assert "flow" in structure_faults(path, renamed)[0]
    half = spec.model_copy(update={"outputs": (spec.outputs[0].model_copy(update={"dtype": "float16"}),)})
    assert "float16" in structure_faults(path, half)[0]
    model = onnx.load(path, load_external_data=False)
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 5
    onnx.save(model, path)
    assert structure_faults(path, spec)


def test_a_missing_weight_file_is_a_structure_fault(head: TracedGraph, tmp_path: Path) -> None:
    template, module, spec = head
    write_graph(template, parameters_of(module), tmp_path, "head")
    (tmp_path / "head.onnx.data").unlink()
    assert structure_faults(tmp_path / "head.onnx", spec)


def test_topology_ignores_weights_only(head: TracedGraph, tmp_path: Path) -> None:
    template, module, _ = head
    other = {name: tensor + 1 for name, tensor in parameters_of(module).items()}
    first = write_graph(template, parameters_of(module), tmp_path, "first")
    second = write_graph(template, other, tmp_path, "second")
    assert first.topology == second.topology
    assert first.data != second.data
    model = onnx.load(tmp_path / "first.onnx", load_external_data=False)
    model.graph.node[0].attribute[0].i += 1
    onnx.save(model, tmp_path / "changed.onnx")
    assert topology_hash(tmp_path / "changed.onnx") != first.topology


def graphs_of(bundle: Path) -> dict[str, onnx.ModelProto]:
    manifest = Manifest.model_validate_json((bundle / MANIFEST).read_text())
    return {name: onnx.load(bundle / record.file.path) for name, record in manifest.graphs.items()}


@pytest.mark.slow
def test_every_parameter_of_the_checkpoint_is_in_the_bundle_by_name(micro: Checkpoint, micro_bundle: Path) -> None:
    graphs = graphs_of(micro_bundle)
    names = {graph: {tensor.name for tensor in model.graph.initializer} for graph, model in graphs.items()}
    blocks = {"text_kv"} | {name for name in graphs if name.startswith("block_")}
    for name in micro.model.state_dict():
        if name.startswith("blocks.") and not name.split(".", 2)[2].startswith(("cross.kv.", "cross.k_norm.")):
            _, index, inner = name.split(".", 2)
            assert inner in names[f"block_{int(index):02d}"], name
        else:
            assert any(name in found for found in names.values()), name
    assert blocks
    assert set(micro.text_encoder.state_dict()) <= names["text_encoder"]
    assert set(micro.vae.state_dict()) <= names["image_encoder"] | names["decoder"]


@pytest.mark.slow
def test_linears_are_pretransposed_and_ops_are_whole(micro_bundle: Path) -> None:
    graphs = graphs_of(micro_bundle)
    for name, model in graphs.items():
        parameters = {tensor.name: tensor.dims for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Transpose":
                assert node.input[0] not in parameters, f"{name}: {node.name}"
            if node.op_type in ("MatMul", "Gemm") and node.input[1] in parameters:
                assert len(parameters[node.input[1]]) == 2
    block = Counter(node.op_type for node in graphs["block_00"].graph.node)
    assert (block["Attention"], block["RMSNormalization"], block["LayerNormalization"], block["Gelu"]) == (3, 5, 8, 1)
    assert block["MatMul"] == 8
    assert "Softmax" not in block
    assert not Counter(node.op_type for model in graphs.values() for node in model.graph.node)["SequenceAt"]


@pytest.mark.slow
def test_nothing_of_this_machine_is_in_the_files(micro_bundle: Path, root: Path) -> None:
    places = [str(root), str(Path.home()), sys.prefix, "site-packages", ".py"]
    for path in (micro_bundle / "onnx").glob("*.onnx"):
        content = path.read_bytes()
        assert not [place for place in places if place.encode() in content], path.name


@pytest.mark.slow
def test_sinusoids_have_the_references_frequencies_to_the_bit(micro_bundle: Path) -> None:
    """The exporter rounds scalars to float32 even beside float64 tensors, which moved them by four units."""
    wanted = np.exp(np.arange(8) * (-math.log(10_000) / 8)).astype(np.float32)
    stored = [numpy_helper.to_array(tensor) for tensor in graphs_of(micro_bundle)["embed"].graph.initializer]
    assert any(np.array_equal(tensor, wanted) for tensor in stored if tensor.shape == wanted.shape)


@pytest.mark.slow
def test_nodes_lead_back_to_their_modules(micro_bundle: Path) -> None:
    model = graphs_of(micro_bundle)["block_00"]
    found = {node.name: {prop.key: prop.value for prop in node.metadata_props} for node in model.graph.node}
    assert found["spatial.qkv.MatMul"] == {NAME_SCOPES: "['spatial', 'spatial.qkv']"}
    assert len(found) == len(model.graph.node), "node names are unique"


@pytest.mark.slow
def test_a_filled_template_is_the_traced_block(micro: Checkpoint, micro_bundle: Path, tmp_path: Path) -> None:
    """The bundle's block_01 was filled into block_00's trace; tracing block_01 itself gives the same bytes."""
    facts = model_facts(micro.config)
    module = graph_modules(micro)["block_01"]
    template = trace(module, "block", graph_specs(facts, "float32")["block_01"], facts)
    write_graph(template, parameters_of(module), tmp_path, "block_01")
    for name in ("block_01.onnx", "block_01.onnx.data"):
        assert (tmp_path / name).read_bytes() == (micro_bundle / "onnx" / name).read_bytes()


@pytest.mark.slow
def test_blocks_share_one_topology(micro_bundle: Path) -> None:
    manifest = Manifest.model_validate_json((micro_bundle / MANIFEST).read_text())
    blocks = [record for name, record in manifest.graphs.items() if name.startswith("block_")]
    assert len({record.topology for record in blocks}) == 1
    assert len({record.data.sha256 for record in blocks if record.data}) == len(blocks) == 2
    assert len({record.topology for record in manifest.graphs.values()}) == len(manifest.graphs) - 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_graphs_have_half_precision_weights(
    micro: Checkpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    facts = model_facts(micro.config)
    precision = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
    module = copy.deepcopy(graph_modules(micro)["block_00"]).to(dtype)
    spec = graph_specs(facts, precision)["block_00"]  # type: ignore[arg-type]
    write_graph(trace(module, "block", spec, facts), parameters_of(module), tmp_path, "block_00")
    assert structure_faults(tmp_path / "block_00.onnx", spec) == []
    model = onnx.load(tmp_path / "block_00.onnx")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    assert weights["ffn.up.weight"].data_type == onnx.TensorProto.DataType.Value(precision.upper())
    stored = numpy_helper.to_array(weights["ffn.up.weight"]).astype(np.float32)
    np.testing.assert_array_equal(stored.T, module.state_dict()["source.ffn.up.weight"].float().numpy())
    assert Counter(node.op_type for node in model.graph.node)["Cast"] == 5, "tables and mask, nothing else"
