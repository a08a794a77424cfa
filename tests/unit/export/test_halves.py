"""Blocks cut into halves for several devices: which graphs there are, their weights, and that they are the block."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from stiv_deploy.export.bundle_from_checkpoint import default_bucket, export_bundle
from stiv_deploy.export.engines.build import choose_graphs
from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.graphs.check import draw_inputs, graph_sizes
from stiv_deploy.export.graphs.modules import BlockGraph, MixedGraph, SpatialGraph, graph_modules, model_facts
from stiv_deploy.export.graphs.writer import GraphWriter
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import graph_specs
from stiv_deploy.runtime.bundle.manifest import GraphRecord
from stiv_deploy.runtime.errors import EngineError
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, save_checkpoint

NAMES = ("block_00", "spatial_00", "mixed_00")


def test_one_half_after_the_other_is_the_block_bit_by_bit(micro: Checkpoint) -> None:
    facts = model_facts(micro.config)
    dims = default_bucket(micro.config.sampling, facts).dims(facts, "typical")
    given = draw_inputs(graph_specs(facts, "float32")["block_00"], dims, micro.config.text.vocabulary)
    block = micro.model.blocks[0]
    own = {name: given[name] for name in ("x", "modulation", "spatial_cos", "spatial_sin")}
    rest = {name: value for name, value in given.items() if not name.startswith("spatial")}
    between = SpatialGraph(block)(**own)  # type: ignore[arg-type]
    assert torch.equal(MixedGraph(block)(**rest | {"x": between}), BlockGraph(block)(**given))  # type: ignore[arg-type]


def test_halves_follow_their_block(micro: Checkpoint) -> None:
    facts = model_facts(micro.config)
    names = list(graph_modules(micro, halves=True))
    assert names == list(graph_specs(facts, "float32", halves=True))
    assert names[4:10] == ["block_00", "spatial_00", "mixed_00", "block_01", "spatial_01", "mixed_01"]


def test_they_are_checked_down_to_one_frame_and_to_one_position(micro: Checkpoint) -> None:
    facts = model_facts(micro.config)
    bucket = default_bucket(micro.config.sampling, facts)
    least = [graph_sizes(name, bucket, facts).get("smallest shard") for name in NAMES]
    assert least[0] is None
    assert [(dims["token_frames"], dims["tokens"]) for dims in least if dims] == [(1, 16), (4, 1)]


def test_an_image_model_has_nothing_to_share(
    make_checkpoint: Callable[..., Checkpoint], micro: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "image", make_checkpoint(micro.config.model.model_copy(update={"temporal": False})))
    with pytest.raises(ExportError, match="^--halves: devices share the frames of a clip, and an image model makes on"):
        export_bundle(ExportRequest(checkpoint=tmp_path / "image", out=tmp_path / "bundle", halves=True))
    assert not (tmp_path / "bundle").exists()


def test_a_build_of_halves_that_are_not_here_says_how_to_make_them(words_bundle: Path) -> None:
    with pytest.raises(EngineError, match="^blocks are not here as halves; make the bundle again with .* --halves'$"):
        choose_graphs(Bundle.open(words_bundle).manifest, ["halves"])


def written(writer: GraphWriter) -> dict[str, GraphRecord]:
    bucket = default_bucket(writer.checkpoint.config.sampling, writer.facts)
    records = {}
    for name in NAMES:
        record = records[name] = writer.write(name)
        writer.check(name, record.topology, [bucket])
        writer.check_plugin(name, record, [bucket])
    return records


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_halves_are_checked_graphs_over_the_weights_of_their_block(
    micro: Checkpoint, tmp_path: Path, precision: Any
) -> None:
    records = written(GraphWriter(micro, tmp_path, precision, halves=True))
    assert len({record.data for record in records.values()}) == 1
    assert len({record.topology for record in records.values()}) == 3
    weights = {name: _weights(tmp_path / f"{name}.onnx") for name in NAMES}
    whole, *halves = weights.values()
    assert halves[0].keys() | halves[1].keys() == whole.keys()
    assert halves[0].keys() & halves[1].keys() == {"table"}, "each half reads its rows of the modulation"
    assert all(whole[name] == place for half in halves for name, place in half.items())


def _weights(path: Path) -> dict[str, tuple[str, ...]]:
    """Where each weight of a graph lies."""
    model = onnx.load(path, load_external_data=False)
    tensors = [each for each in model.graph.initializer if each.external_data]
    return {each.name: tuple(sorted(entry.value for entry in each.external_data)) for each in tensors}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_halves_in_8_bits_have_the_scales_of_their_block(
    micro: Checkpoint, quantize: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("modelopt")
    quantization = quantize(kind, smooth=("block_00.ffn.up",))
    written(GraphWriter(micro, tmp_path, "float32", quantization, halves=True))
    scales = {name: [each for each in _weights(tmp_path / f"{name}.onnx") if each.endswith("_scale")] for name in NAMES}
    assert sorted(scales["spatial_00"] + scales["mixed_00"]) == sorted(scales["block_00"])
    assert all(each.startswith("spatial.") for each in scales["spatial_00"])
    assert not any(each.startswith("spatial.") for each in scales["mixed_00"])


@pytest.mark.slow
def test_plugin_forms_of_halves(make_checkpoint: Callable[..., Checkpoint], micro: Checkpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(micro.config.model.model_copy(update={"width": 64}))
    records = written(GraphWriter(checkpoint, tmp_path, "float32", attention="plugin", halves=True))
    plugins = {name: record.plugin.plugins for name, record in records.items() if record.plugin}
    assert plugins["spatial_00"] == ("StivSpatialQkv/1",)
    assert plugins["mixed_00"] == ("StivTemporalAttention/1",)
    assert plugins["block_00"] == (*plugins["spatial_00"], *plugins["mixed_00"])


@pytest.mark.slow
def test_plugin_forms_of_halves_in_fp8_write_it_themselves(
    make_checkpoint: Callable[..., Checkpoint], micro: Checkpoint, quantize: Callable[..., Any], tmp_path: Path
) -> None:
    """The nodes of both halves have the scales that those of the block have."""
    pytest.importorskip("modelopt")
    quantization = quantize("fp8")
    written(GraphWriter(micro, tmp_path, "float32", quantization, "plugin", halves=True))
    whole, spatial, mixed = (_plugin_nodes(tmp_path / f"{name}.plugin.onnx") for name in NAMES)
    assert spatial | mixed == whole
    assert not spatial.keys() & mixed.keys()
    assert mixed["StivTemporalAttention"][-1] == "temporal.out.input_scale"


def _plugin_nodes(path: Path) -> dict[str, list[str]]:
    """The weights among the inputs of each plugin node."""
    model = onnx.load(path, load_external_data=False)
    known = {each.name for each in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.domain == "stiv"]
    return {node.op_type: [name for name in node.input if name in known] for node in nodes}


@pytest.mark.slow
def test_a_whole_bundle_is_the_same_but_for_its_halves(micro_path: Path, micro_bundle: Path, tmp_path: Path) -> None:
    report = export_bundle(ExportRequest(checkpoint=micro_path, out=tmp_path / "bundle", halves=True, check=False))
    bundle, plain = Bundle.open(tmp_path / "bundle"), Bundle.open(micro_bundle)
    assert bundle.manifest.halves
    assert not plain.manifest.halves
    assert bundle.hash == plain.hash
    for name, record in plain.manifest.graphs.items():
        assert bundle.manifest.graphs[name] == record
    assert "14 graphs" in str(report)
    dims = bundle.manifest.buckets[0].dims(bundle.manifest.model, "typical")
    given = draw_inputs(bundle.manifest.specs["block_00"], dims, 8)
    found = {name: value.numpy() for name, value in given.items()}
    for name in ("spatial_00", "mixed_00"):
        found["x"] = _run(bundle.graph_file(name), found)
    whole = _run(bundle.graph_file("block_00"), {name: value.numpy() for name, value in given.items()})
    np.testing.assert_array_equal(found["x"], whole)


def _run(path: Path, values: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {each.name: values[each.name] for each in session.get_inputs()})[0]
