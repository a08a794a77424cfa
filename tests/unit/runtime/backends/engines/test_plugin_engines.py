"""Engines made of plugins, on stand-ins: the library is loaded before them, if it is the one they were built with."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from stiv_deploy.runtime.backends import BACKENDS, TABLE, Entry, open_backend
from stiv_deploy.runtime.backends.engine_choice import same_again
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.engine_files import attention_form, graph_hash
from stiv_deploy.runtime.bundle.manifest import EngineRecord, GraphRecord, PluginForm
from stiv_deploy.runtime.errors import BackendError, EngineError
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.plugins import tensorrt_plugins
from stiv_deploy.runtime.plugins.spec import DOMAIN, PLUGINS, TEMPORAL_ATTENTION, VERSION
from stiv_deploy.runtime.plugins.tensorrt_plugins import PLUGIN_LIBRARY, PLUGIN_LIBRARY_VARIABLE, PluginLibrary

AGAIN = "run: stiv build BUNDLE --backend tensorrt --sm 89 --attention plugin"


def to_plugin_form(path: Path) -> None:
    """Write ``path``'s graph beside it with its first addition as the function body of a plugin node."""
    model = onnx.load(path, load_external_data=False)
    (index,) = [number for number, node in enumerate(model.graph.node) if list(node.output) == ["a"]]
    inputs = list(model.graph.node[index].input)
    identity = {"plugin_version": VERSION, "plugin_namespace": DOMAIN}
    node = helper.make_node(TEMPORAL_ATTENTION.name, inputs, ["a"], domain=DOMAIN, **identity)
    model.graph.node[index].CopyFrom(node)
    add = helper.make_node("Add", ["qkv", "bias"], ["y"])
    opset = [helper.make_opsetid("", 20)]
    body = helper.make_function(DOMAIN, node.op_type, ["qkv", "bias"], ["y"], [add], opset, list(identity))
    model.functions.append(body)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    path.with_name(f"{path.stem}.plugin.onnx").write_bytes(model.SerializeToString())


class Registry:
    """Stands for TensorRT's plugin registry; ``loaded`` are the libraries in it."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load_library(self, path: str) -> str:
        self.loaded.append(path)
        return path

    def get_creator(self, name: str, version: str, plugin_namespace: str) -> bool | None:
        known = any((name, version, plugin_namespace) == (each.name, VERSION, DOMAIN) for each in PLUGINS)
        return True if known and self.loaded else None


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, stand_ins: SimpleNamespace) -> Registry:
    """The registry of every stand-in, in which engines with plugins look theirs up when they are loaded."""
    stand_in, load = Registry(), stand_ins.trt._load

    def deserialize(self: Any, plan: bytes) -> Any:
        return None if b".plugin.onnx" in plan and not stand_in.loaded else load(self, plan)

    monkeypatch.setattr(stand_ins.trt, "get_plugin_registry", lambda self: stand_in, raising=False)
    monkeypatch.setattr(stand_ins.trt, "_load", deserialize)
    monkeypatch.setattr(tensorrt_plugins, "_loaded", {})
    monkeypatch.setattr(tensorrt_plugins, "CDLL", lambda path: None)
    return stand_in


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginLibrary:
    """The plugin library that is found here."""
    path = tmp_path / PLUGIN_LIBRARY
    path.write_text("plugins")
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, str(path))
    return PluginLibrary.at(path)


@pytest.fixture
def plugin_folder(folder: Path, library: PluginLibrary) -> Path:
    """The toy bundle with stand-in engines; those of its blocks come from a form with plugins."""
    manifest = Bundle.open(folder).manifest
    graphs, engines = dict(manifest.graphs), []
    for record in manifest.engines:
        if not record.graph.startswith("block_"):
            engines.append(record)
            continue
        graphs[record.graph] = with_plugin_form(folder, graphs[record.graph])
        engine = folder / record.file.path
        engine.write_text(engine.read_text().replace(f"{record.graph}.onnx", f"{record.graph}.plugin.onnx"))
        update = {
            "file": file_record(folder, record.file.path),
            "onnx": graph_hash(graphs[record.graph], plugin=True),
            "plugins": library.sha256,
        }
        engines.append(record.model_copy(update=update))
    write_manifest(folder, manifest.model_copy(update={"graphs": graphs, "engines": tuple(engines)}))
    return folder


def with_plugin_form(folder: Path, graph: GraphRecord) -> GraphRecord:
    to_plugin_form(folder / graph.file.path)
    file = file_record(folder, graph.file.path.replace(".onnx", ".plugin.onnx"))
    form = PluginForm(file=file, topology="1" * 64, plugins=(f"{TEMPORAL_ATTENTION.name}/{VERSION}",))
    return graph.model_copy(update={"plugin": form})


def generate(folder: Path, backend: Any) -> np.ndarray:
    arguments: dict[str, Any] = {"prompt": "digit three moving left", "num_inference_steps": 2, "seed": 4}
    with backend:
        return StivPipeline(Bundle.open(folder), backend)(**arguments).latents


def test_a_generation_with_plugins(
    plugin_folder: Path, stand_ins: SimpleNamespace, registry: Registry, library: PluginLibrary
) -> None:
    backend, trt = stand_ins.open(plugin_folder)
    assert registry.loaded == [str(library.path)], "before the first engine"
    assert not trt.loaded
    found = generate(plugin_folder, backend)
    wanted = generate(plugin_folder, OnnxRuntimeBackend(Bundle.open(plugin_folder)))
    np.testing.assert_array_equal(found, wanted)
    assert {engine.graph for engine in trt.loaded} >= {"block_00", "block_01"}


def test_native_engines_never_load_the_library(
    folder: Path, stand_ins: SimpleNamespace, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, "/nowhere.so")
    generate(folder, stand_ins.open(folder)[0])
    assert not registry.loaded


def test_native_engines_of_a_bundle_that_has_both_forms(
    plugin_folder: Path, stand_ins: SimpleNamespace, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Bundle.open(plugin_folder).manifest
    write_manifest(plugin_folder, manifest.model_copy(update={"engines": ()}))
    stand_ins.add_engines(plugin_folder)
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, "/nowhere.so")
    stand_ins.open(plugin_folder)
    assert not registry.loaded


def refused(folder: Path, stand_ins: SimpleNamespace, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        stand_ins.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_library_than_the_engines_were_built_with(
    plugin_folder: Path, stand_ins: SimpleNamespace, registry: Registry, library: PluginLibrary
) -> None:
    library.path.write_text("plugins, built again")
    message = refused(plugin_folder, stand_ins, EngineError)
    here = PluginLibrary.at(library.path)
    assert message == (
        f"engine engines/tensorrt/89/block_00.engine was built with the plugin library {library.sha256[:12]}, here is "
        f"{here}; put that library there, or {AGAIN}"
    )
    assert not registry.loaded


def test_a_missing_library(
    plugin_folder: Path, stand_ins: SimpleNamespace, registry: Registry, library: PluginLibrary
) -> None:
    library.path.unlink()
    message = refused(plugin_folder, stand_ins, BackendError)
    assert message.startswith("engine engines/tensorrt/89/block_00.engine was built with plugins: no TensorRT plugin ")
    assert "make plugins TENSORRT_ROOT=DIR" in message


def test_without_the_library_the_best_backend_is_another(
    plugin_folder: Path,
    stand_ins: SimpleNamespace,
    registry: Registry,
    library: PluginLibrary,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    library.path.unlink()
    for name in BACKENDS:
        entry = Entry(lambda _: None, lambda _: None, partial(opener, stand_ins, plugin_folder, name))
        monkeypatch.setitem(TABLE, name, entry)
    caplog.set_level("INFO")
    with open_backend(None, Bundle.open(plugin_folder)) as backend:
        assert backend.name == "onnxruntime"
    assert "no TensorRT plugin library" in caplog.text


def opener(stand_ins: SimpleNamespace, folder: Path, name: str, bundle: Bundle, *_: object) -> Any:
    if name == "onnxruntime-cuda":
        raise BackendError("no CUDA")
    return stand_ins.open(folder)[0] if name == "tensorrt" else OnnxRuntimeBackend(bundle)


def changed(folder: Path, **update: Any) -> EngineRecord:
    """The record of block_00's engine after its graph was changed."""
    manifest = read_manifest(folder)
    block = manifest.graphs["block_00"].model_copy(update=update)
    write_manifest(folder, manifest.model_copy(update={"graphs": {**manifest.graphs, "block_00": block}}))
    return next(record for record in manifest.engines if record.graph == "block_00")


def test_a_plugin_form_that_changed(plugin_folder: Path, stand_ins: SimpleNamespace, registry: Registry) -> None:
    path = plugin_folder / "onnx/block_00.plugin.onnx"
    model = onnx.load(path)
    model.producer_name = "a later export"
    onnx.save(model, path)
    form = PluginForm(
        file=file_record(plugin_folder, "onnx/block_00.plugin.onnx"), topology="1" * 64, plugins=("StivSpatialQkv/1",)
    )
    changed(plugin_folder, plugin=form)
    message = refused(plugin_folder, stand_ins, EngineError)
    assert message.endswith(f"block_00.engine was built from another version of graph block_00; {AGAIN}")


def test_the_form_is_told_by_the_hash(plugin_folder: Path) -> None:
    manifest = Bundle.open(plugin_folder).manifest
    forms = {record.graph: attention_form(record, manifest) for record in manifest.engines}
    assert forms == {name: "plugin" if name.startswith("block_") else "native" for name in manifest.graphs}
    stale = manifest.engines[0].model_copy(update={"onnx": "f" * 64})
    assert attention_form(stale, manifest) is None
    assert attention_form(stale.model_copy(update={"graph": "gone"}), manifest) is None


def test_a_bundle_exported_again_without_plugins(
    plugin_folder: Path, stand_ins: SimpleNamespace, registry: Registry
) -> None:
    record = changed(plugin_folder, plugin=None)
    message = refused(plugin_folder, stand_ins, EngineError)
    assert re.search("block_00.engine was built from another version of graph block_00; run: stiv build", message)
    assert "--attention" not in message, "there is no plugin form to build from"
    assert same_again(record, Bundle.open(plugin_folder).manifest, "90").endswith("--sm 90")


def test_remedies_name_the_form(plugin_folder: Path, stand_ins: SimpleNamespace, registry: Registry) -> None:
    backend, trt = stand_ins.open(plugin_folder)
    trt.refuse = True
    manifest = Bundle.open(plugin_folder).manifest
    shapes = {
        tensor.name: tensor.sized(manifest.buckets[0].dims(manifest.model, "min"))
        for tensor in manifest.graphs["block_00"].spec.inputs
    }
    with pytest.raises(EngineError, match=re.escape(AGAIN)):
        backend._load(backend._record_for("block_00", shapes))
