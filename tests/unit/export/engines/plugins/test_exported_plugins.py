"""Blocks as the exporter writes them: built from their plugin form, and that form as the real RTX builder takes it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.engines.build import BuildRequest, build_engines
from stiv_deploy.export.engines.job import EngineJob
from stiv_deploy.export.engines.plugin_graphs import KNOWN, without_functions
from stiv_deploy.export.engines.worker import run
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.engine_files import profile
from stiv_deploy.runtime.plugins.spec import DOMAIN, PLUGINS
from stiv_deploy.runtime.plugins.tensorrt_plugins import PluginLibrary
from stiv_deploy.runtime.tensorrt_library import missing_library

pytestmark = pytest.mark.slow
BLOCKS = ["block_00", "block_01"]


@pytest.fixture(scope="module")
def exported(make_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small checkpoint with both forms of its blocks."""
    from stiv_deploy.stiv_ref.checkpoint import save_checkpoint
    from stiv_deploy.stiv_ref.config import StivConfig

    config = StivConfig(
        name="micro", blocks=2, width=64, heads=2, text_width=24, base_frames=4, base_grid=(4, 4), frequency_width=16
    )
    folder = tmp_path_factory.mktemp("exported")
    save_checkpoint(folder / "checkpoint", make_checkpoint(config))
    return export_bundle(
        ExportRequest(checkpoint=folder / "checkpoint", out=folder / "bundle", check=False, attention="plugin")
    ).bundle


def test_a_build_finds_every_plugin(
    exported: Path, builders: list[Any], library: PluginLibrary, tmp_path: Path
) -> None:
    request = BuildRequest(
        bundle=exported,
        backend="tensorrt",
        sm="auto",
        graphs=(*BLOCKS, "head"),
        attention="plugin",
        cache=tmp_path / "cache",
    )
    build_engines(request)
    bundle = Bundle.open(exported)
    for record in bundle.manifest.engines:
        layers = json.loads(bundle.verified(record.file).read_text())
        found = {layer for layer in layers if layer.startswith(("plugin ", f"function {PLUGINS[0].name[:4]}"))}
        is_block = record.graph in BLOCKS
        assert found == ({f"plugin {plugin.name}" for plugin in PLUGINS} if is_block else set())
        assert record.plugins == (library.sha256 if is_block else None)


def test_nodes_carry_what_the_plugins_read(exported: Path) -> None:
    """All attributes of the specification, of its kinds: the quickly deployable packaging has no defaults."""
    bundle = Bundle.open(exported)
    model = onnx.load_from_string(without_functions(bundle.plugin_file("block_00")))
    specs = {plugin.name: plugin for plugin in PLUGINS}
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert {node.op_type for node in nodes} == specs.keys()
    assert bundle.manifest.graphs["block_00"].plugin is not None
    assert set(bundle.manifest.graphs["block_00"].plugin.plugins) == set(KNOWN)
    for node in nodes:
        kinds = {each.name: each.type for each in node.attribute}
        wanted = {"int": onnx.AttributeProto.INT, "float": onnx.AttributeProto.FLOAT}
        spec = specs[node.op_type]
        expected = {each.name: wanted[each.kind] for each in spec.attributes}
        assert kinds == expected | dict.fromkeys(("plugin_version", "plugin_namespace"), onnx.AttributeProto.STRING)
        required = sum(not tensor.optional for tensor in spec.inputs)
        assert len(node.input) == required
        assert all(node.input), "TensorRT's plugins take no empty inputs"


@pytest.mark.skipif(missing_library("tensorrt-rtx") is not None, reason=str(missing_library("tensorrt-rtx")))
def test_rtx_builds_the_plugin_form_by_its_bodies(exported: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(exported)
    manifest = bundle.manifest
    job = EngineJob(
        graph="block_00",
        onnx=str(bundle.plugin_file("block_00")),
        plan=str(tmp_path / "plan"),
        backend="tensorrt-rtx",
        sm="89",
        profiles=(profile(manifest.graphs["block_00"].spec, manifest.model, manifest.buckets[0]),),
    )
    assert run(job.to_json()).error is None
    assert (tmp_path / "plan").stat().st_size > 0
