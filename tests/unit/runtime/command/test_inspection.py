"""``stiv inspect``: bundles, ONNX graphs and engines, whole and damaged."""

import json
import os
import shutil
import sys
from pathlib import Path

import onnx
import pytest
import typer
from typer.testing import CliRunner

from stiv_deploy.runtime.bundle.bundle import file_record, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.engine_files import graph_hash
from stiv_deploy.runtime.bundle.manifest import (
    EngineRecord,
    FileRecord,
    ParityRow,
    PluginForm,
    QuantizationRecord,
    ReducedForm,
    TrainedOn,
)
from stiv_deploy.runtime.command.cli import inspect as inspect_command
from stiv_deploy.runtime.command.inspection import EngineReport, inspect_path, plan_rows, precision_text
from stiv_deploy.runtime.command.terminal import Command
from stiv_deploy.runtime.errors import BundleError, EngineError, RequestError

app = typer.Typer()
app.command(cls=Command)(inspect_command)


def show(path: Path, *options: str) -> str:
    """Output of ``stiv inspect`` on a wide terminal."""
    result = CliRunner().invoke(app, [str(path), *options], env={"COLUMNS": "250"}, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture
def engine(own_bundle: Path) -> Path:
    """An engine file of the toy bundle, with its record and one parity row in the manifest."""
    relative = "engines/tensorrt-rtx/89/head.engine"
    path = own_bundle / relative
    path.parent.mkdir(parents=True)
    path.write_bytes(b"engine" * 100)
    manifest = read_manifest(own_bundle)
    record = EngineRecord(
        graph="head",
        bucket="small",
        backend="tensorrt-rtx",
        backend_version="1.7.1",
        sm="89",
        file=file_record(own_bundle, relative),
        onnx="0" * 64,
        build_seconds=2.5,
    )
    row = ParityRow(
        level="block", name="head", backend="onnxruntime", precision="float32", rel_l2=1e-7, max_abs=2e-7, gate=1e-5,
        passed=True,
    )  # fmt: skip
    write_manifest(own_bundle, manifest.model_copy(update={"engines": (record,), "parity": (row,)}))
    return path


def test_what_the_model_was_trained_on(own_bundle: Path) -> None:
    assert "trained on: the checkpoint does not tell" in show(own_bundle)
    trained = TrainedOn(tasks=("t2v", "mix"), givings=("none", "ends"), strides=(1, 3), sizes=((4, 8),), frames=(4,))
    write_manifest(own_bundle, read_manifest(own_bundle).model_copy(update={"trained": trained}))
    assert "trained on: t2v, mix (given: none, ends), stride 1, 3, 4 frames of 8x4" in show(own_bundle)


def test_what_is_neither_folder_nor_file(tmp_path: Path) -> None:
    """Nobody waits for a pipe that has no other end."""
    for name in ("a.onnx", "a.engine", "a"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(RequestError, match=f"{name}: neither a folder nor a file; give a bundle folder"):
            inspect_path(tmp_path / name)
    with pytest.raises(RequestError, match="no such file or folder"):
        inspect_path("x" * 300)


@pytest.mark.parametrize("damage", ["dtype", "element"])
def test_onnx_of_types_that_there_are_not(tmp_path: Path, damage: str) -> None:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, 999 if damage == "element" else 1, [1]) for name in "xy"]
    weight = onnx.TensorProto(name="w", data_type=999 if damage == "dtype" else 1, dims=[2**62] * 40)
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    (tmp_path / "a.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(BundleError, match="a.onnx: not a readable ONNX file") as caught:
        inspect_path(tmp_path / "a.onnx")
    assert len(str(caught.value).replace(str(tmp_path), "")) < 400


def test_bundle_as_text(bundle_path: Path) -> None:
    text = show(bundle_path)
    for expected in (
        "model toy",
        "float32",
        "opset 20",
        "block_01",
        "text_k, text_v",
        "small",
        "Defaults of 'stiv generate'",
    ):
        assert expected in text
    assert "No engines; 'stiv build" in text
    assert "No parity results; 'stiv parity" in text


def test_bundle_with_engine_and_parity_as_text(engine: Path) -> None:
    text = show(engine.parents[3])
    assert "tensorrt-rtx" in text
    assert "2.5 s" in text
    assert "1.00e-05" in text


def test_bundle_as_json_by_folder_or_manifest(bundle_path: Path) -> None:
    report = json.loads(show(bundle_path, "--json"))
    assert report["kind"] == "bundle"
    assert report["manifest"] == json.loads((bundle_path / "manifest.json").read_text())
    assert report["bytes"] == sum(file.stat().st_size for file in bundle_path.rglob("*") if file.is_file())
    assert json.loads(show(bundle_path / "manifest.json", "--json")) == report


def test_onnx(bundle_path: Path) -> None:
    report = json.loads(show(bundle_path / "onnx" / "block_00.onnx", "--json"))
    assert report["operators"]["ReduceSum"] == 2
    assert report["nodes"] == sum(report["operators"].values())
    assert report["opsets"] == {"ai.onnx": 20}
    assert (report["initializers"], report["weight_bytes"]) == (1, 4)
    assert report["inputs"][0] == {"name": "x", "dtype": "float", "shape": ["M", "T", "S", 4]}
    text = show(bundle_path / "onnx" / "block_00.onnx")
    assert "x float[M, T, S, 4]" in text
    assert "ReduceSum" in text


def test_engine_is_found_in_its_bundle(engine: Path) -> None:
    report = inspect_path(engine)
    assert isinstance(report, EngineReport)
    assert report.record is not None
    assert (report.record.graph, report.record.sm) == ("head", "89")
    assert "only on a GPU" in report.note
    assert "graph head, bucket small, tensorrt-rtx 1.7.1, SM 89" in show(engine)
    assert "weights: plan" in show(engine)


def test_engine_that_blocks_share(engine: Path) -> None:
    folder = engine.parents[3]
    manifest = read_manifest(folder)
    records = [
        manifest.engines[0].model_copy(update={"graph": f"block_0{index}", "weights": ("slope",)}) for index in range(2)
    ]
    write_manifest(folder, manifest.model_copy(update={"engines": tuple(records)}))
    report = inspect_path(engine)
    assert isinstance(report, EngineReport)
    assert report.graphs == ["block_00", "block_01"]
    assert "graphs block_00, block_01, bucket small, tensorrt-rtx 1.7.1, SM 89" in show(engine)
    assert "weights: inputs" in show(engine)
    assert "inputs" in show(folder)


def test_engine_that_differs_from_its_record(engine: Path) -> None:
    engine.write_bytes(b"other")
    report = inspect_path(engine)
    assert isinstance(report, EngineReport)
    assert report.record is None
    assert "no engine of" in report.note


def test_engine_alone_or_beside_a_broken_manifest(tmp_path: Path) -> None:
    path = tmp_path / "lone.engine"
    path.write_bytes(b"engine")
    assert "not inside a bundle" in show(path)
    (tmp_path / "manifest.json").write_text("{")
    assert "cannot be read as JSON" in show(path)


def test_refusals(tmp_path: Path, own_bundle: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty.engine").touch()
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 64)
    (own_bundle / "onnx" / "head.onnx").unlink()
    for path, error, message in (
        (tmp_path / "none", RequestError, "no such file or folder"),
        (tmp_path / "notes.txt", RequestError, "unknown kind of file"),
        (tmp_path / "empty.engine", EngineError, "empty file"),
        (tmp_path / "empty.onnx", BundleError, "no nodes"),
        (tmp_path / "bad.onnx", BundleError, "not a readable ONNX file"),
        (own_bundle, BundleError, "missing from the bundle"),
    ):
        with pytest.raises(error, match=message) as caught:
            inspect_path(path)
        assert "\n" not in str(caught.value)


def test_onnx_file_without_the_package_onnx(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RequestError, match=r"needs onnx; run: pip install 'stiv-deploy\[export\]'"):
        inspect_path(bundle_path / "onnx" / "head.onnx")


@pytest.fixture
def quantized(own_bundle: Path) -> Path:
    """The toy bundle with a plan in its manifest."""
    layers = {"block_00.ffn.up": "fp8", "block_01.ffn.up": "fp8", "block_00.ffn.down": "high", "embed.patch": "high"}
    record = QuantizationRecord(format="fp8", scales="ab" * 32, layers=layers)  # type: ignore[arg-type]
    manifest = read_manifest(own_bundle)
    write_manifest(own_bundle, manifest.model_copy(update={"quantization": record}))
    return own_bundle


def test_the_plan_is_shown(quantized: Path) -> None:
    shown = show(quantized)
    assert "float32, fp8 in 2 of 4 layers, opset" in shown
    assert "Precision plan (scales abababababab)" in shown
    rows = [line.split() for line in shown.splitlines()]
    for row in (["block_*.ffn.up", "2", "fp8"], ["block_*.ffn.down", "1", "high"], ["embed.patch", "1", "high"]):
        assert row in rows
    values = json.loads(show(quantized, "--json"))
    assert values["manifest"]["quantization"]["layers"]["block_01.ffn.up"] == "fp8"


def test_plans_of_mixed_blocks_are_told_apart() -> None:
    layers = {"block_00.ffn.up": "int8", "block_01.ffn.up": "high", "text_kv.blocks.0.cross.kv": "int8"}
    record = QuantizationRecord(format="int8", scales="", layers=layers)  # type: ignore[arg-type]
    assert plan_rows(record) == [
        ("block_*.ffn.up", "1", "int8"),
        ("block_*.ffn.up", "1", "high"),
        ("text_kv.block_*.cross.kv", "1", "int8"),
    ]


def test_bundles_without_8_bits_have_no_plan(own_bundle: Path) -> None:
    assert "Precision plan" not in show(own_bundle)
    manifest = read_manifest(own_bundle)
    assert precision_text(manifest) == "float32"
    decoder = manifest.graphs["decoder"]
    form = ReducedForm(file=decoder.file, topology="1" * 64, precision="bfloat16")
    graphs = {**manifest.graphs, "decoder": decoder.model_copy(update={"reduced": form})}
    assert precision_text(manifest.model_copy(update={"graphs": graphs})) == "float32, VAE bfloat16 in engines"


def test_the_vae_in_words(own_bundle: Path) -> None:
    assert "VAE 2x2 pixels a latent\n" in show(own_bundle)
    manifest = read_manifest(own_bundle)
    causal = manifest.model.model_copy(update={"temporal_factor": 4, "causal_vae": True})
    write_manifest(own_bundle, manifest.model_copy(update={"model": causal}))
    assert "VAE 4 frames of 2x2 pixels a latent, first frame alone\n" in show(own_bundle)


@pytest.fixture
def with_plugins(engine: Path) -> Path:
    """The bundle of ``engine``, in which head has a form with plugins, from which the engine was built."""
    folder = engine.parents[3]
    manifest = read_manifest(folder)
    head = manifest.graphs["head"]
    shutil.copyfile(folder / "onnx/head.onnx", folder / "onnx/head.plugin.onnx")
    file = FileRecord(path="onnx/head.plugin.onnx", sha256="2" * 64, bytes=head.file.bytes)
    form = PluginForm(file=file, topology="1" * 64, plugins=("StivSpatialQkv/1", "StivTemporalAttention/1"))
    graphs = {**manifest.graphs, "head": head.model_copy(update={"plugin": form})}
    update = {"onnx": graph_hash(graphs["head"], plugin=True), "plugins": "ab" * 32}
    engines = (manifest.engines[0].model_copy(update=update),)
    write_manifest(folder, manifest.model_copy(update={"graphs": graphs, "engines": engines}))
    return folder


def test_plugin_forms_and_the_form_of_engines(with_plugins: Path) -> None:
    text = show(with_plugins)
    assert "Forms with plugins" in text
    assert ["StivSpatialQkv/1,", "StivTemporalAttention/1", "head"] in [line.split() for line in text.splitlines()]
    assert "plugin (library abababababab)" in text
    path = with_plugins / "engines/tensorrt-rtx/89/head.engine"
    assert "attention plugin (library abababababab)" in show(path)
    assert json.loads(show(path, "--json"))["attention"] == "plugin"
    manifest = read_manifest(with_plugins)
    quick = manifest.engines[0].model_copy(update={"plugins": None})
    write_manifest(with_plugins, manifest.model_copy(update={"engines": (quick,)}))
    assert "attention quick" in show(path)


def test_engines_of_native_attention_and_of_graphs_that_changed(engine: Path) -> None:
    folder = engine.parents[3]
    assert "Forms with plugins" not in show(folder)
    assert "attention outdated" in show(engine)
    manifest = read_manifest(folder)
    record = manifest.engines[0].model_copy(update={"onnx": graph_hash(manifest.graphs["head"])})
    write_manifest(folder, manifest.model_copy(update={"engines": (record,)}))
    assert "attention native" in show(engine)
    assert " native " in show(folder)


def test_function_bodies_of_an_onnx_file(own_bundle: Path) -> None:
    path = own_bundle / "onnx" / "block_00.onnx"
    assert "Functions" not in show(path)
    model = onnx.load(path, load_external_data=False)
    add = onnx.helper.make_node("Add", ["a", "b"], ["c"])
    opset = [onnx.helper.make_opsetid("", 20)]
    model.functions.append(onnx.helper.make_function("stiv", "Sum", ["a", "b"], ["c"], [add], opset))
    path.write_bytes(model.SerializeToString())
    assert json.loads(show(path, "--json"))["functions"] == {"stiv.Sum": 1}
    assert "stiv.Sum" in show(path)
