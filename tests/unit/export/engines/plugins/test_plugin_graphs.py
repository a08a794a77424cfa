"""Function bodies dropped so that TensorRT looks plugins up: real ONNX files, with the real RTX parser as witness."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from stiv_deploy.export.engines.engine_from_onnx import make_logger, parse
from stiv_deploy.export.engines.job import EngineJob
from stiv_deploy.export.engines.plugin_graphs import without_functions
from stiv_deploy.export.engines.worker import run
from stiv_deploy.runtime.errors import EngineError
from stiv_deploy.runtime.plugins.spec import DOMAIN, SPATIAL_QKV, TEMPORAL_ATTENTION
from stiv_deploy.runtime.plugins.tensorrt_plugins import PluginLibrary
from stiv_deploy.runtime.tensorrt_library import import_tensorrt, missing_library

TEMPORAL, SPATIAL = TEMPORAL_ATTENTION.name, SPATIAL_QKV.name
needs_rtx = pytest.mark.skipif(missing_library("tensorrt-rtx") is not None, reason=str(missing_library("tensorrt-rtx")))


@pytest.fixture
def path(graphs: SimpleNamespace, tmp_path: Path) -> Path:
    """A plugin node, then a local function of another domain."""
    shift = graphs.node("Shift", ["p", "bias"], ["y"], domain="other")
    return graphs.save(tmp_path / "g.plugin.onnx", [graphs.plugin_node("p"), shift])


def functions(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(function.domain, function.name) for function in model.functions]


def test_bodies_of_plugins_go_and_all_else_stays(path: Path) -> None:
    before, after = onnx.load(path, load_external_data=False), onnx.load_from_string(without_functions(path))
    assert functions(before) == [(DOMAIN, TEMPORAL), (DOMAIN, SPATIAL), ("other", "Shift")]
    assert functions(after) == [("other", "Shift")]
    assert after.graph == before.graph, "weights are still those beside the file"
    assert after.opset_import == before.opset_import


def test_bodies_of_chosen_plugins_only(path: Path) -> None:
    after = onnx.load_from_string(without_functions(path, (TEMPORAL,)))
    assert functions(after) == [(DOMAIN, SPATIAL), ("other", "Shift")]


def test_the_file_itself_runs_anywhere(path: Path) -> None:
    """That is what its bodies are for: here y = x + 2 * bias."""
    before = path.read_bytes()
    without_functions(path)
    assert path.read_bytes() == before
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.ones((3, 8), np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x + 2 * np.arange(8, dtype=np.float32))


@pytest.mark.parametrize(
    ("identity", "found"),
    [
        ({"plugin_version": "1"}, "plugin_version 1, plugin_namespace None"),
        ({"plugin_namespace": DOMAIN}, f"plugin_version None, plugin_namespace {DOMAIN}"),
        ({"plugin_version": "2", "plugin_namespace": DOMAIN}, f"plugin_version 2, plugin_namespace {DOMAIN}"),
    ],
)
def test_nodes_that_no_plugin_of_ours_is_for(
    graphs: SimpleNamespace, tmp_path: Path, identity: dict[str, str], found: str
) -> None:
    path = graphs.save(tmp_path / "g.onnx", [graphs.plugin_node(**identity)])
    wanted = f"g.onnx: node temporal is StivTemporalAttention, {found}; this package has StivTemporalAttention/1, "
    with pytest.raises(EngineError, match=f"{wanted}.* --attention plugin$") as caught:
        without_functions(path)
    assert "\n" not in str(caught.value)


def test_a_graph_without_plugin_nodes(graphs: SimpleNamespace, tmp_path: Path) -> None:
    path = graphs.save(tmp_path / "g.onnx", [graphs.node("Add", ["x", "bias"], ["y"])])
    with pytest.raises(
        EngineError, match=r"g.onnx has no nodes of the domain 'stiv'; export the bundle again with: stiv"
    ):
        without_functions(path)


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"words")
    with pytest.raises(EngineError, match=r"g.onnx: not a readable ONNX file \(.*\); export the bundle again"):
        without_functions(tmp_path / "g.onnx")


def task(path: Path, plugins: PluginLibrary | None) -> EngineJob:
    return EngineJob(
        graph="g",
        onnx=str(path),
        plan=str(path.with_suffix(".plan")),
        backend="tensorrt",
        sm="90",
        profiles=({"x": ((1, 8), (2, 8), (4, 8))},),
        plugins=None if plugins is None else str(plugins.path),
    )


def test_a_builder_makes_plugins_of_the_nodes(path: Path, tensorrt: Any, library: PluginLibrary) -> None:
    """By the parser's rules up to TensorRT 10.6, under which the bodies of the file hide the plugins."""
    result = run(task(path, library).to_json())
    assert result.error is None
    plan = path.with_suffix(".plan")
    assert plan.read_text() == '["plugin StivTemporalAttention", "function Shift"]'
    assert tensorrt.registry.loaded == [str(library.path)]


@pytest.mark.parametrize(("inputs", "fp8"), [(6, False), (7, True)])
def test_quickly_deployable_plugins_are_for_temporal_attention_only(
    graphs: SimpleNamespace, tmp_path: Path, tensorrt: Any, kernels: Path, inputs: int, fp8: bool
) -> None:
    """The other nodes stay what their function bodies say; the plugin is registered in the form the node has."""
    nodes = [graphs.plugin_node("p", SPATIAL), graphs.plugin_node("y", inputs=inputs)]
    path = graphs.save(tmp_path / "g.plugin.onnx", nodes)
    assert run(replace(task(path, None), quick=True).to_json()).error is None
    assert path.with_suffix(".plan").read_text() == f'["function {SPATIAL}", "plugin {TEMPORAL}"]'
    assert tensorrt.registry.quick is fp8
    assert not tensorrt.registry.loaded


def test_a_native_job_never_loads_the_library(path: Path, tensorrt: Any, library: PluginLibrary) -> None:
    assert run(task(path, None).to_json()).error is None
    assert path.with_suffix(".plan").read_text() == '["function StivTemporalAttention", "function Shift"]'
    assert not tensorrt.registry.loaded


def test_the_parsers_complaint_is_handed_on(
    path: Path, tensorrt: Any, library: PluginLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tensorrt.registry.get_creator
    asked: list[str] = []

    def forgets(name: str, *rest: str) -> str | None:
        asked.append(name)
        return found(name, *rest) if len(asked) <= 2 else None  # there after loading, gone when parsing

    monkeypatch.setattr(tensorrt.registry, "get_creator", forgets)
    error = run(task(path, library).to_json()).error
    assert error == (
        "the ONNX parser refused g.plugin.onnx: Plugin not found, are the plugin name, version, and namespace correct?"
    )
    assert not path.with_suffix(".plan").exists()


def test_a_library_that_vanished(path: Path, tensorrt: Any, library: PluginLibrary) -> None:
    gone = replace(library, path=library.path.with_name("gone.so"))
    error = run(task(path, gone).to_json()).error
    assert str(error).startswith(
        f"plugin library {gone.path} cannot be read (No such file or directory); build it with"
    )


def rtx_layers(path: Path, plugins: bool) -> Sequence[str]:
    trt = import_tensorrt("tensorrt-rtx")
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = parse(trt, builder, logger, path, without_functions(path) if plugins else None)
    return [network.get_layer(index).name for index in range(network.num_layers)]


@needs_rtx
def test_the_real_parser_expands_bodies_and_misses_plugins_without_them(path: Path) -> None:
    """RTX has no plugins, so that its lookup of one fails: the lookup that succeeds in TensorRT."""
    assert rtx_layers(path, plugins=False)
    with pytest.raises(EngineError, match=r"the ONNX parser refused g.plugin.onnx: .*Plugin not found"):
        rtx_layers(path, plugins=True)


@needs_rtx
@pytest.mark.parametrize("relative", [False, True])
def test_the_real_parser_finds_weights_beside_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    """Given bytes and the file's path, and wherever the process stands."""
    monkeypatch.setattr(f"{__name__}.without_functions", Path.read_bytes)  # RTX needs the bodies
    monkeypatch.chdir(path.parent.parent)
    given = Path(os.path.relpath(path)) if relative else path
    assert len(rtx_layers(given, plugins=True)) >= 2
    (path.parent / "g.onnx.data").unlink()
    with pytest.raises(EngineError, match=r"the ONNX parser refused g.plugin.onnx: Failed to import initializer"):
        rtx_layers(given, plugins=True)
