"""``stiv build --attention plugin``: which file an engine comes from, what is cached and recorded, what is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stiv_deploy.export.engines.build import BuildRequest, EngineBuild
from stiv_deploy.runtime.backends.engine_choice import same_again
from stiv_deploy.runtime.bundle.bundle import Bundle, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.contract import graph_specs
from stiv_deploy.runtime.bundle.engine_files import attention_form, graph_hash
from stiv_deploy.runtime.bundle.manifest import EngineRecord, Manifest, QuantizationRecord
from stiv_deploy.runtime.errors import BackendError, BundleError, EngineError, KernelError, StivError
from stiv_deploy.runtime.plugins import tensorrt_plugins
from stiv_deploy.runtime.plugins.tensorrt_plugins import PLUGIN_LIBRARY_VARIABLE, PluginLibrary

Build = Callable[..., Any]
PLUGIN_LAYERS, NATIVE_LAYERS = ["plugin StivTemporalAttention"], ["Identity"]


def records(folder: Path) -> dict[str, EngineRecord]:
    return {record.graph: record for record in read_manifest(folder).engines}


def layers(folder: Path, graph: str) -> list[str]:
    bundle = Bundle.open(folder)
    return json.loads(bundle.verified(records(folder)[graph].file).read_text())


def change(folder: Path, make: Callable[[Manifest], dict[str, Any]]) -> None:
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update=make(manifest)))


def test_blocks_are_built_of_plugins_and_the_rest_as_always(
    plugin_bundle: Path, build: Build, library: PluginLibrary
) -> None:
    build()
    manifest = read_manifest(plugin_bundle)
    for graph, record in records(plugin_bundle).items():
        is_block = graph.startswith("block_")
        assert record.plugins == (library.sha256 if is_block else None)
        assert record.onnx == graph_hash(manifest.graphs[graph], plugin=is_block)
        assert attention_form(record, manifest) == ("plugin" if is_block else "native")
        assert layers(plugin_bundle, graph) == (PLUGIN_LAYERS if is_block else NATIVE_LAYERS)
    assert records(plugin_bundle).keys() == manifest.graphs.keys()


def test_jobs_carry_the_file_and_the_library(
    plugin_bundle: Path, build: Build, builders: list[Any], library: PluginLibrary
) -> None:
    build("block_00", "head")
    found = {job.graph: (Path(job.onnx).name, job.plugins) for job in builders}
    assert found == {"block_00": ("block_00.plugin.onnx", str(library.path)), "head": ("head.onnx", None)}


def test_native_builds_do_not_ask_for_the_library(
    plugin_bundle: Path, build: Build, builders: list[Any], monkeypatch: pytest.MonkeyPatch, tensorrt: Any
) -> None:
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, "/nowhere.so")
    build("block_00", attention="native")
    record = records(plugin_bundle)["block_00"]
    assert record.plugins is None
    assert record.onnx == graph_hash(read_manifest(plugin_bundle).graphs["block_00"])
    assert not tensorrt.registry.loaded


def test_the_other_form_replaces_engine_and_record(plugin_bundle: Path, build: Build, library: PluginLibrary) -> None:
    forms = []
    for attention in ("native", "plugin", "native"):
        build("block_00", attention=attention)
        manifest = read_manifest(plugin_bundle)
        assert [record.bucket for record in manifest.engines] == ["short", "long"]
        forms.append((layers(plugin_bundle, "block_00"), attention_form(manifest.engines[0], manifest)))
    assert forms == [(NATIVE_LAYERS, "native"), (PLUGIN_LAYERS, "plugin"), (NATIVE_LAYERS, "native")]
    assert [path.name for path in (plugin_bundle / "engines/tensorrt/sm90").iterdir()] == ["block_00.engine"]


def test_each_form_and_library_has_a_plan_of_its_own_in_the_cache(
    plugin_bundle: Path, build: Build, builders: list[Any], library: PluginLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attention in ("native", "plugin", "native", "plugin"):
        build("block_00", attention=attention)
    assert len(builders) == 2
    library.path.write_text("plugins, built again")
    monkeypatch.setattr(tensorrt_plugins, "_loaded", {})
    monkeypatch.setitem(sys.modules, "tensorrt", type(sys.modules["tensorrt"])())
    build("block_00")
    assert len(builders) == 3
    assert records(plugin_bundle)["block_00"].plugins == PluginLibrary.at(library.path).sha256


def test_cached_native_plans_stay_valid_where_plugins_come(
    plugin_bundle: Path, build: Build, tensorrt: Any, library: PluginLibrary
) -> None:
    """Graphs without a plugin form have one plan for both kinds of build."""

    def key(attention: str) -> str:
        request = BuildRequest(
            bundle=plugin_bundle,
            backend="tensorrt",
            sm="auto",
            cache=plugin_bundle / "cache",
            attention=attention,  # type: ignore[arg-type]
        )
        return EngineBuild(request).key("head")

    assert key("native") == key("plugin")


def refused(build: Build, error: type[StivError], builders: list[Any], *graphs: str, **update: Any) -> str:
    """The one line of a build that is refused before a builder starts."""
    with pytest.raises(error) as caught:
        build(*graphs, **update)
    assert "\n" not in str(caught.value)
    assert not builders
    return str(caught.value)


def test_a_bundle_without_plugin_forms(plugin_bundle: Path, build: Build, builders: list[Any]) -> None:
    change(
        plugin_bundle,
        lambda manifest: {
            "graphs": {name: each.model_copy(update={"plugin": None}) for name, each in manifest.graphs.items()}
        },
    )
    message = refused(build, EngineError, builders)
    assert message == (
        "no graph of this bundle has a form with plugins; export the bundle again with: "
        "stiv export CHECKPOINT --out BUNDLE --attention plugin"
    )


def test_rtx_takes_no_plugins(
    plugin_bundle: Path, build: Build, builders: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stiv_deploy.export.engines.build.import_tensorrt", lambda flavour: sys.modules["tensorrt"])
    message = refused(build, BackendError, builders, backend="tensorrt-rtx", sm="auto")
    assert "TensorRT-RTX takes no plugins: build with --attention native" in message
    assert "or with --backend tensorrt" in message


def test_a_missing_plugin_library(
    plugin_bundle: Path, build: Build, builders: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, "/nowhere.so")
    message = refused(build, BackendError, builders)
    assert f"{PLUGIN_LIBRARY_VARIABLE} names /nowhere.so, which is not a file" in message
    assert "make plugins TENSORRT_ROOT=DIR" in message
    assert not (plugin_bundle / "engines").exists()
    assert not (plugin_bundle.parent / "cache").exists()


def test_a_plugin_library_that_tensorrt_refuses(build: Build, builders: list[Any], tensorrt: Any, library: Any) -> None:
    tensorrt.registry.loaded.append("something else of these names")
    assert "refused the plugin library" in refused(build, BackendError, builders)


def test_fp8_where_there_is_none(
    plugin_bundle: Path, build: Build, builders: list[Any], library: PluginLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = QuantizationRecord(format="fp8", scales="0" * 64, layers={"block_01.spatial.attention": "fp8"})
    change(plugin_bundle, lambda manifest: {"quantization": record})
    monkeypatch.setattr("stiv_deploy.export.engines.build.gpu_sm", lambda: "80")
    message = refused(build, BackendError, builders)
    assert "SM 80 has no FP8 arithmetic" in message
    assert "block_01.spatial.attention" in message


def test_a_damaged_plugin_file(plugin_bundle: Path, build: Build, builders: list[Any], library: Any) -> None:
    path = plugin_bundle / "onnx/block_02.plugin.onnx"
    path.write_bytes(path.read_bytes()[::-1])
    assert "block_02.plugin.onnx: damaged" in refused(build, BundleError, builders)


def test_plugins_of_another_package(plugin_bundle: Path, build: Build, builders: list[Any], library: Any) -> None:
    def newer(manifest: Manifest) -> dict[str, Any]:
        block = manifest.graphs["block_01"]
        assert block.plugin is not None
        form = block.plugin.model_copy(update={"plugins": ("StivTemporalAttention/2",)})
        return {"graphs": {**manifest.graphs, "block_01": block.model_copy(update={"plugin": form})}}

    change(plugin_bundle, newer)
    message = refused(build, EngineError, builders)
    assert "the bundle wants the plugins StivTemporalAttention/2, this package has StivTemporalAttention/1, " in message


def test_onnx_is_needed(
    build: Build, builders: list[Any], library: PluginLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stiv_deploy.export.engines.plugin_graphs.find_spec", lambda name: None)
    message = refused(build, BackendError, builders)
    assert message == "building with plugins needs onnx; run: pip install 'stiv-deploy[export]'"


@pytest.fixture
def half(plugin_bundle: Path) -> Path:
    """The bundle in float16."""

    def rewritten(manifest: Manifest) -> dict[str, Any]:
        specs = graph_specs(manifest.model, "float16")
        graphs = {name: each.model_copy(update={"spec": specs[name]}) for name, each in manifest.graphs.items()}
        return {"precision": "float16", "graphs": graphs}

    change(plugin_bundle, rewritten)
    return plugin_bundle


def test_quick_engines_need_no_library(
    half: Path, build: Build, builders: list[Any], kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, "/nowhere.so")
    build("block_00", "head", attention="quick")
    manifest = read_manifest(half)
    found = {graph: (attention_form(record, manifest), record.plugins) for graph, record in records(half).items()}
    assert found == {"block_00": ("plugin", None), "head": ("native", None)}
    assert layers(half, "block_00") == PLUGIN_LAYERS
    assert {job.graph: (job.plugins, job.quick) for job in builders} == {
        "block_00": (None, True),
        "head": (None, False),
    }
    assert same_again(records(half)["block_00"], manifest).endswith("--sm 90 --attention quick")
    assert same_again(records(half)["head"], manifest).endswith("--sm 90")


def test_a_form_whose_plugins_are_not_quick_is_built_as_always(
    half: Path, build: Build, builders: list[Any], kernels: Path, library: PluginLibrary
) -> None:
    """As that of a half with attention in space only: the bodies of its nodes are no better than its native form."""

    def spatial(manifest: Manifest) -> dict[str, Any]:
        graph = manifest.graphs["block_01"]
        assert graph.plugin is not None
        form = graph.plugin.model_copy(update={"plugins": ("StivSpatialQkv/1",)})
        return {"graphs": {**manifest.graphs, "block_01": graph.model_copy(update={"plugin": form})}}

    change(half, spatial)
    build("block_00", "block_01", attention="quick")
    manifest = read_manifest(half)
    assert {name: attention_form(each, manifest) for name, each in records(half).items()} == {
        "block_00": "plugin",
        "block_01": "native",
    }
    assert [job.quick for job in builders] == [True, False]
    build("block_01", attention="plugin")
    assert attention_form(records(half)["block_01"], read_manifest(half)) == "plugin"


def test_each_packaging_and_its_kernels_have_a_plan_of_their_own(
    half: Path, build: Build, builders: list[Any], library: PluginLibrary, kernels: Path
) -> None:
    for attention in ("quick", "plugin", "quick"):
        build("block_00", attention=attention)
    assert len(builders) == 2
    for file in kernels.iterdir():
        file.write_text("made again")
        build("block_00", attention="quick")
    assert len(builders) == 2 + 3


def test_quick_is_for_16_bits(plugin_bundle: Path, build: Build, builders: list[Any], kernels: Path) -> None:
    message = refused(build, EngineError, builders, attention="quick")
    assert "--attention quick has kernels for float16 and bfloat16, the bundle is float32" in message


def test_quick_is_for_video(half: Path, build: Build, builders: list[Any], kernels: Path) -> None:
    def of_images(manifest: Manifest) -> dict[str, Any]:
        model = manifest.model.model_copy(update={"temporal": False})
        specs = graph_specs(model, "float16")
        graphs = {name: each.model_copy(update={"spec": specs[name]}) for name, each in manifest.graphs.items()}
        return {"model": model, "graphs": graphs}

    change(half, of_images)
    message = refused(build, EngineError, builders, attention="quick")
    assert message.startswith("--attention quick has temporal attention only, the bundle is of an image model")


def test_quick_needs_its_part_of_tensorrt(
    half: Path, build: Build, builders: list[Any], kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (None, ModuleType("tensorrt.plugin")):  # none, and that of 10.7, which took no kernels as PTX
        monkeypatch.setitem(sys.modules, "tensorrt.plugin", module)
        message = refused(build, KernelError, builders, attention="quick")
        assert message.startswith("quickly deployable plugins of PTX need TensorRT 10.9 or later in Python (")


def test_quick_needs_the_kernels(
    half: Path, build: Build, builders: list[Any], kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise KernelError("no kernel library: none at ...; build it with `make plugins`")

    monkeypatch.setattr("stiv_deploy.runtime.plugins.library.open_library", missing)
    assert refused(build, KernelError, builders, attention="quick").startswith("no kernel library")


def test_as_typed(
    stiv: Callable[..., tuple[int, str]], plugin_bundle: Path, builders: list[Any], library: PluginLibrary
) -> None:
    arguments = ("build", plugin_bundle, "--backend", "tensorrt", "--attention", "plugin", "--graphs", "block_00,head")
    assert stiv(*arguments) == (0, "")
    assert {graph: record.plugins for graph, record in records(plugin_bundle).items()} == {
        "block_00": library.sha256,
        "head": None,
    }
    code, text = stiv("build", plugin_bundle, "--attention", "plugin")
    assert code == 2
    assert text.startswith("error: TensorRT-RTX ")
    assert text.count("\n") == 1
