"""Hand-written graphs with a plugin node, a bundle of such, and a TensorRT that builds them by its documented rules."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from stiv_deploy.runtime.bundle.bundle import file_record, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.contract import GraphSpec
from stiv_deploy.runtime.bundle.manifest import PluginForm
from stiv_deploy.runtime.plugins import tensorrt_plugins
from stiv_deploy.runtime.plugins.spec import DOMAIN, PLUGINS, SPATIAL_QKV, TEMPORAL_ATTENTION, VERSION
from stiv_deploy.runtime.plugins.tensorrt_plugins import PLUGIN_LIBRARY, PLUGIN_LIBRARY_VARIABLE, PluginLibrary

WIDTH = 8
NAME = TEMPORAL_ATTENTION.name
OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("other", 1)]
IDENTITY = {"plugin_version": VERSION, "plugin_namespace": DOMAIN}
ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
}


def plugin_node(result: str = "y", name: str = NAME, inputs: int = 2, **identity: str) -> onnx.NodeProto:
    """A node of a plugin, by default the temporal one; two of its inputs are enough here."""
    attributes = {"heads": 2, **(identity or IDENTITY)}
    names = ["x", *["bias"] * (inputs - 1)]
    return helper.make_node(name, names, [result], name="temporal", domain=DOMAIN, **attributes)


def body(domain: str = DOMAIN, name: str = NAME) -> onnx.FunctionProto:
    """A function body ``y = x + bias``."""
    add = helper.make_node("Add", ["qkv", "bias"], ["y"])
    return helper.make_function(domain, name, ["qkv", "bias"], ["y"], [add], OPSETS[:1], ["heads", *IDENTITY])


def save(path: Path, nodes: list[onnx.NodeProto], spec: GraphSpec | None = None) -> Path:
    """Write a graph of ``nodes`` from x [N, WIDTH] to y, or between the tensors of ``spec``.

    ``bias`` is 0, 1, ... in the external file that the forms of one graph share. All functions are always there.
    """
    data = path.with_name(path.name.split(".")[0] + ".onnx.data")
    values = np.arange(WIDTH, dtype=np.float32)
    data.write_bytes(values.tobytes())
    bias = TensorProto(name="bias", data_type=TensorProto.FLOAT, dims=[WIDTH], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": data.name, "offset": "0", "length": str(values.nbytes)}.items():
        bias.external_data.add(key=key, value=value)
    info = helper.make_tensor_value_info
    inputs, outputs = ([info(name, TensorProto.FLOAT, ["N", WIDTH])] for name in "xy")
    if spec is not None:
        inputs, outputs = (
            [info(each.name, ONNX_TYPES[each.dtype], list(each.shape)) for each in tensors]
            for tensors in (spec.inputs, spec.outputs)
        )
    graph = helper.make_graph(nodes, "g", inputs, outputs, [bias])
    functions = [body(), body(name=SPATIAL_QKV.name), body("other", "Shift")]
    onnx.save(helper.make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=10), path)
    return path


@pytest.fixture
def graphs() -> SimpleNamespace:
    """Makes graphs by hand: ``save(path, nodes)``, ``plugin_node(result, **identity)``, ``node`` of onnx."""
    return SimpleNamespace(save=save, plugin_node=plugin_node, node=helper.make_node)


@pytest.fixture
def plugin_bundle(words_bundle: Path) -> Path:
    """A bundle whose graphs can be parsed; its blocks have a form with a plugin node too."""
    manifest = read_manifest(words_bundle)
    graphs = {}
    for name, record in manifest.graphs.items():
        path = words_bundle / f"onnx/{name}.onnx"
        ends = [record.spec.inputs[0].name], [record.spec.outputs[0].name]
        save(path, [helper.make_node("Identity", *ends)], record.spec)
        form = None
        if name.startswith("block_"):
            save(words_bundle / f"onnx/{name}.plugin.onnx", [plugin_node(ends[1][0])], record.spec)
            file = file_record(words_bundle, f"onnx/{name}.plugin.onnx")
            form = PluginForm(file=file, topology="1" * 64, plugins=(f"{NAME}/{VERSION}",))
        update = {
            "file": file_record(words_bundle, f"onnx/{name}.onnx"),
            "data": file_record(words_bundle, f"onnx/{name}.onnx.data"),
            "plugin": form,
        }
        graphs[name] = record.model_copy(update=update)
    write_manifest(words_bundle, manifest.model_copy(update={"graphs": graphs}))
    return words_bundle


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginLibrary:
    """The plugin library that is found: a file of words, which this process takes for a library."""
    monkeypatch.setattr(tensorrt_plugins, "_loaded", {})
    monkeypatch.setattr(tensorrt_plugins, "CDLL", lambda path: None)
    path = tmp_path / PLUGIN_LIBRARY
    path.write_text("plugins")
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, str(path))
    return PluginLibrary.at(path)


class FakeParser:
    """Imports a node as onnx-tensorrt does: as a local function, if the model has one of that name, before a plugin.

    That is the order of TensorRT 10.0 to 10.6, the one under which function bodies hide plugins.
    """

    def __init__(self, network: "FakeNetwork", logger: object) -> None:
        self._network = network
        self.num_errors = 0

    def parse_from_file(self, path: str) -> bool:
        return self.parse(Path(path).read_bytes(), path=path)

    def parse(self, model: bytes, path: str | None = None) -> bool:
        loaded = onnx.load_from_string(model)
        functions = {function.name for function in loaded.functions}
        for tensor in loaded.graph.initializer:
            for location in [entry.value for entry in tensor.external_data if entry.key == "location"]:
                assert (Path(path or "").parent / location).is_file()
        for node in loaded.graph.node:
            if not node.domain or node.op_type in functions:
                self._network.layers.append(node.op_type if not node.domain else f"function {node.op_type}")
            elif not self._add_plugin(node):
                return False
        self._network.inputs = [value.name for value in loaded.graph.input]
        return True

    def _add_plugin(self, node: onnx.NodeProto) -> bool:
        values = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        version, domain = (values.get(key, b"").decode() for key in ("plugin_version", "plugin_namespace"))
        found = self._network.trt.registry.get_creator(node.op_type, version or "1", domain)
        self.num_errors = int(found is None)
        self._network.layers.append(f"plugin {node.op_type}")
        return found is not None

    def get_error(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(desc=lambda: "Plugin not found, are the plugin name, version, and namespace correct?")


class FakeNetwork:
    """Layers by their kind, and inputs by their name."""

    def __init__(self, trt: "FakeTensorRT") -> None:
        self.trt, self.layers, self.inputs = trt, list[str](), list[str]()

    num_inputs = property(lambda self: len(self.inputs))
    num_layers = property(lambda self: len(self.layers))

    def get_input(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(name=self.inputs[index])

    def get_layer(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(type="other")


class FakeRegistry:
    """Stands for ``IPluginRegistry``: every library has the plugins of the specification.

    ``quick`` is None, or whether the quickly deployable plugin was registered with an FP8 output.
    """

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.quick: bool | None = None

    def load_library(self, path: str) -> str | None:
        self.loaded.append(path)
        return path if len(self.loaded) == 1 else None  # the names are taken by the first

    def get_creator(self, name: str, version: str, plugin_namespace: str = "") -> str | None:
        names = [NAME] * (self.quick is not None) + [plugin.name for plugin in PLUGINS if self.loaded]
        known = [(each, VERSION, DOMAIN) for each in names]
        return name if (name, version, plugin_namespace) in known else None


class FakeTensorRT:
    """The part of TensorRT's module that a build uses; a plan is the list of the network's layers."""

    __name__, __version__ = "tensorrt", "11.4"
    ILogger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2})
    BuilderFlag = SimpleNamespace(TF32="tf32")
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    LayerType = SimpleNamespace(ATTENTION_INPUT="attention")
    OnnxParser = FakeParser

    def __init__(self) -> None:
        self.registry = FakeRegistry()

    def get_plugin_registry(self) -> FakeRegistry:
        return self.registry

    def Builder(self, logger: object) -> SimpleNamespace:  # noqa: N802 - TensorRT's name
        cache = SimpleNamespace(serialize=lambda: b"")
        config = SimpleNamespace(
            clear_flag=lambda flag: None,
            create_timing_cache=lambda content: cache,
            set_timing_cache=lambda cache, ignore_mismatch: True,
            get_timing_cache=lambda: cache,
            add_optimization_profile=lambda profile: 0,
        )
        return SimpleNamespace(
            create_network=lambda flags: FakeNetwork(self),
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *values: None),
            build_serialized_network=lambda network, config: memoryview(json.dumps(network.layers).encode()),
        )


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Stands for TensorRT in this process, on a machine with an H100."""
    trt = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr("stiv_deploy.export.engines.build.gpu_sm", lambda: "90")
    return trt


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the quickly deployable packaging is made of: files of words. Registering it asks TensorRT for no more."""
    from stiv_deploy.runtime.plugins import library
    from stiv_deploy.runtime.plugins.library import KernelDtype
    from stiv_deploy.runtime.plugins.quick import temporal_attention as quick

    folder = tmp_path / "kernels"
    folder.mkdir()
    for name in ("library", *(f"float16-{WIDTH // 2}-{fp8}" for fp8 in (False, True))):
        (folder / name).write_text(name)

    def ptx_file(dtype: KernelDtype, head_dim: int, fp8_output: bool) -> Path:
        return folder / f"{dtype.name.lower()}-{head_dim}-{fp8_output}"

    def register(fp8_output: bool) -> None:
        sys.modules["tensorrt"].registry.quick = fp8_output

    trtp = ModuleType("tensorrt.plugin")
    trtp.aot_impl = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)
    monkeypatch.setattr(library, "open_library", lambda: SimpleNamespace(path=folder / "library"))
    monkeypatch.setattr(quick, "ptx_file", ptx_file)
    monkeypatch.setattr(quick, "register_temporal_attention", register)
    return folder


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch, tensorrt: FakeTensorRT) -> list[Any]:
    """Runs the builder processes' program in this process, each time with a TensorRT of its own; returns the jobs."""
    from stiv_deploy.export.engines.job import EngineJob, EngineResult
    from stiv_deploy.export.engines.processes import BuilderProcesses
    from stiv_deploy.export.engines.worker import run

    jobs: list[EngineJob] = []

    def work(_: BuilderProcesses, job: EngineJob) -> EngineResult:
        jobs.append(job)
        with pytest.MonkeyPatch.context() as process:
            process.setitem(sys.modules, "tensorrt", FakeTensorRT())
            return run(job.to_json())

    monkeypatch.setattr(BuilderProcesses, "run", work)
    return jobs


@pytest.fixture
def build(plugin_bundle: Path, builders: list[Any]) -> Callable[..., Any]:
    """Builds chosen graphs of :func:`plugin_bundle`, by default in the form with plugins."""
    from stiv_deploy.export.engines.build import BuildRequest, build_engines

    def make(*graphs: str, **update: Any) -> Any:
        values = {"backend": "tensorrt", "sm": "auto", "attention": "plugin", "cache": plugin_bundle.parent / "cache"}
        return build_engines(BuildRequest(bundle=plugin_bundle, graphs=graphs, **(values | update))).engines

    return make
