"""Bundles with plugin nodes: what is refused, and the form of models of other kinds and types."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from stiv_deploy.export.bundle_from_checkpoint import (
    default_bucket,
    export_bundle,
    validate_plugins,
)
from stiv_deploy.export.cli import parse_attention
from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.graphs import writer as graph_writer
from stiv_deploy.export.graphs.modules import graph_modules, model_facts
from stiv_deploy.export.graphs.writer import GraphWriter, fused_view
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.manifest import GraphRecord, Range
from stiv_deploy.runtime.plugins.spec import DOMAIN, HEAD_DIMS, MAX_FRAMES
from stiv_deploy.stiv_ref.block import SelfAttention
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.fused.modules import FusedSpatial, FusedTemporal

MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture
def untraceable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input must be refused before the first expensive step."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the export began before its input was checked")

    monkeypatch.setattr(graph_writer, "trace", refuse)


@pytest.mark.usefixtures("untraceable")
def test_heads_that_the_plugins_do_not_take(micro_path: Path, tmp_path: Path) -> None:
    message = (
        r"^--attention plugin: the plugins take heads of 32, 48, 64, 72, 96, 128, this model has 16; "
        r"use --attention native$"
    )
    with pytest.raises(ExportError, match=message):
        export_bundle(ExportRequest(checkpoint=micro_path, out=tmp_path / "bundle", attention="plugin"))
    assert list(tmp_path.iterdir()) == []


def test_frames_that_the_plugins_do_not_take(micro: Checkpoint) -> None:
    facts = model_facts(micro.config).model_copy(update={"width": 64})
    bucket = default_bucket(micro.config.sampling, facts)
    most = bucket.model_copy(update={"frames": Range(min=1, typical=8, max=MAX_FRAMES)})
    validate_plugins([most], facts)
    more = bucket.model_copy(update={"frames": Range(min=1, typical=8, max=MAX_FRAMES + 1)})
    with pytest.raises(ExportError, match="at most 64 token frames, bucket default has up to 65 .frames up to 65.; "):
        validate_plugins([most, more], facts)
    validate_plugins([more], facts.model_copy(update={"temporal": False}))
    compressed = facts.model_copy(update={"temporal_factor": 4})
    validate_plugins([more.model_copy(update={"frames": Range(min=4, typical=8, max=4 * MAX_FRAMES)})], compressed)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_heads_that_the_plugins_take(micro: Checkpoint, head_dim: int) -> None:
    facts = model_facts(micro.config).model_copy(update={"width": 2 * head_dim})
    validate_plugins([default_bucket(micro.config.sampling, facts)], facts)


def test_forms_of_attention() -> None:
    assert [parse_attention(name) for name in ("native", "plugin")] == ["native", "plugin"]
    with pytest.raises(ExportError, match="^--attention fused: no such form of attention; use native or plugin$"):
        parse_attention("fused")


def test_a_fused_view_shares_the_parameters_and_leaves_the_model_alone(micro: Checkpoint) -> None:
    module = graph_modules(micro)["block_00"]
    view = fused_view(module)
    assert [id(each) for each in view.parameters()] == [id(each) for each in module.parameters()]
    assert (type(view.source.spatial), type(view.source.temporal)) == (FusedSpatial, FusedTemporal)
    for block in (module.source, micro.model.blocks[0]):
        assert type(block.spatial) is type(block.temporal) is SelfAttention


def written(checkpoint: Checkpoint, folder: Path, precision: str) -> tuple[GraphRecord, onnx.ModelProto]:
    writer = GraphWriter(checkpoint, folder, precision, attention="plugin")  # type: ignore[arg-type]
    record = writer.write("block_00")
    writer.check_plugin("block_00", record, [default_bucket(checkpoint.config.sampling, writer.facts)])
    return record, onnx.load(folder / "block_00.plugin.onnx", load_external_data=False)


@pytest.mark.slow
def test_image_models_have_attention_in_space_only(
    make_checkpoint: MakeCheckpoint, micro: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(micro.config.model.model_copy(update={"temporal": False, "width": 64}))
    record, model = written(checkpoint, tmp_path, "float32")
    assert record.plugin is not None
    assert record.plugin.plugins == ("StivSpatialQkv/1",)
    assert [node.op_type for node in model.graph.node if node.domain == DOMAIN] == ["StivSpatialQkv"]
    assert [function.name for function in model.functions] == ["StivSpatialQkv"]


@pytest.mark.slow
def test_bfloat16_is_written_and_not_executed(
    make_checkpoint: MakeCheckpoint, micro: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(micro.config.model.model_copy(update={"width": 64}))
    record, model = written(checkpoint, tmp_path, "bfloat16")
    assert record.plugin is not None
    assert record.plugin.plugins == ("StivSpatialQkv/1", "StivTemporalAttention/1")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    (node,) = [node for node in model.graph.node if node.op_type == "StivTemporalAttention"]
    assert {types[name] for name in node.input[1:4]} == {onnx.TensorProto.BFLOAT16}
    casts = {node.output[0]: node.attribute[0].i for node in model.graph.node if node.op_type == "Cast"}
    assert [casts[name] for name in node.input[4:6]] == [onnx.TensorProto.BFLOAT16] * 2
    (tmp_path / "only_blocks").mkdir()
    text = GraphWriter(checkpoint, tmp_path / "only_blocks", "bfloat16", attention="plugin").write("head")
    assert text.plugin is None
