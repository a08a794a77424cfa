"""``stiv inspect``: bundles, ONNX graphs and engines, whole and damaged."""

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stiv_deploy.runtime.bundle import file_record, read_manifest, write_manifest
from stiv_deploy.runtime.cli import inspect as inspect_command
from stiv_deploy.runtime.errors import BundleError, EngineError, RequestError
from stiv_deploy.runtime.inspection import EngineReport, inspect_path, plan_rows, precision_text
from stiv_deploy.runtime.manifest import EngineRecord, ParityRow, QuantizationRecord

app = typer.Typer()
app.command()(inspect_command)


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


def test_bundle_as_text(bundle_path: Path) -> None:
    text = show(bundle_path)
    for expected in ("model toy", "float32", "opset 20", "block_01", "text_k, text_v", "small", "4 frames of 8x8"):
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
    assert precision_text(read_manifest(own_bundle)) == "float32"


def test_the_vae_in_words(own_bundle: Path) -> None:
    assert "VAE 2x2 pixels a latent\n" in show(own_bundle)
    manifest = read_manifest(own_bundle)
    causal = manifest.model.model_copy(update={"temporal_factor": 4, "causal_vae": True})
    write_manifest(own_bundle, manifest.model_copy(update={"model": causal}))
    assert "VAE 4 frames of 2x2 pixels a latent, first frame alone\n" in show(own_bundle)
