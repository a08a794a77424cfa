"""``stiv build`` as typed: exit codes, single lines, and what is left behind. The bundle's graphs are words."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stiv_deploy.export.engines.cli import listed, sm_name
from stiv_deploy.runtime import tensorrt_library
from stiv_deploy.runtime.bundle.bundle import read_manifest, write_manifest
from stiv_deploy.runtime.bundle.manifest import QuantizationRecord
from stiv_deploy.runtime.tensorrt_library import missing_library

Stiv = Callable[..., tuple[int, str]]
needs_rtx = pytest.mark.skipif(missing_library("tensorrt-rtx") is not None, reason=str(missing_library("tensorrt-rtx")))


def quantize(bundle: Path, format_: str, layers: dict[str, str]) -> None:
    """Say in the manifest that the bundle is quantized."""
    record = QuantizationRecord.model_validate({"format": format_, "scales": "0" * 64, "layers": layers})
    write_manifest(bundle, read_manifest(bundle).model_copy(update={"quantization": record}))


def assert_refused(result: tuple[int, str], *words: str) -> None:
    code, text = result
    assert code == 2
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert all(word in text for word in words), text


def test_no_bundle(stiv: Stiv, tmp_path: Path) -> None:
    assert_refused(stiv("build", tmp_path / "nothing", "--sm", "89"), "no such folder", "stiv export")


def test_unknown_backend(stiv: Stiv, words_bundle: Path) -> None:
    assert_refused(stiv("build", words_bundle, "--backend", "openvino"), "'openvino'", "tensorrt or tensorrt-rtx")


def test_missing_library(stiv: Stiv, words_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(tensorrt_library, "import_module", absent)
    refused = stiv("build", words_bundle, "--backend", "tensorrt")
    assert_refused(refused, "TensorRT is not installed", "pip install 'stiv-deploy[tensorrt]'")
    assert sorted(path.name for path in words_bundle.iterdir()) == ["manifest.json", "onnx", "tokenizer.json"]
    assert not (words_bundle.parent / "cache").exists()


@needs_rtx
@pytest.mark.parametrize("sm", ["80", "86", "75"])
def test_fp8_is_refused_where_there_is_none(stiv: Stiv, words_bundle: Path, sm: str) -> None:
    """Before a builder starts and before the cache is made; graphs without FP8 layers are not the matter."""
    layers = {"block_00.ffn.up": "high", "block_01.ffn.up": "fp8"}
    quantize(words_bundle, "fp8", layers)
    refused = stiv("build", words_bundle, "--sm", sm)
    assert_refused(refused, f"SM {sm} has no FP8", "block_01.ffn.up", "--precision int8")
    assert sorted(path.name for path in words_bundle.iterdir()) == ["manifest.json", "onnx", "tokenizer.json"]
    assert not (words_bundle.parent / "cache").exists()
    refused = stiv("build", words_bundle, "--sm", sm, "--graphs", "block_00")
    assert_refused(refused, "the ONNX parser refused", "block_00")


@needs_rtx
@pytest.mark.parametrize("sm", ["75", "89"])
def test_nvfp4_is_refused_where_there_is_none(
    stiv: Stiv, words_bundle: Path, fp4_form: Callable[[Path, str], None], sm: str
) -> None:
    fp4_form(words_bundle, "block_01")
    quantize(words_bundle, "nvfp4", {"block_00.ffn.up": "high", "block_01.ffn.up": "nvfp4"})
    refused = stiv("build", words_bundle, "--sm", sm)
    assert_refused(refused, f"SM {sm} has no NVFP4", "SM 120 and 121", "block_01.ffn.up", "--precision fp8 or int8")
    assert not (words_bundle.parent / "cache").exists()


@needs_rtx
@pytest.mark.parametrize(
    ("format_", "sm"),
    [("int8", "86"), ("fp8", "89"), ("fp8", "120"), ("fp8", "portable"), ("nvfp4", "121"), ("nvfp4", "portable")],
)
def test_quantized_bundles_reach_the_builder_elsewhere(
    stiv: Stiv, words_bundle: Path, fp4_form: Callable[[Path, str], None], format_: str, sm: str
) -> None:
    fp4_form(words_bundle, "block_01")
    quantize(words_bundle, format_, {"block_01.ffn.up": format_})
    assert_refused(stiv("build", words_bundle, "--sm", sm, "--graphs", "block_01"), "the ONNX parser refused")


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_impossible_jobs(stiv: Stiv, words_bundle: Path, jobs: str) -> None:
    assert_refused(stiv("build", words_bundle, "--sm", "89", "--jobs", jobs), "--jobs")


@needs_rtx
@pytest.mark.parametrize("sm", ["90", "sm90", "hopper"])
def test_unsupported_gpu(stiv: Stiv, words_bundle: Path, sm: str) -> None:
    assert_refused(stiv("build", words_bundle, "--sm", sm), "TensorRT-RTX", "supports SM 75, 80, 86, 89, 120")


@needs_rtx
def test_unknown_graph_and_bucket(stiv: Stiv, words_bundle: Path) -> None:
    assert_refused(stiv("build", words_bundle, "--sm", "89", "--graphs", "head,heat"), "unknown graph heat")
    assert_refused(stiv("build", words_bundle, "--sm", "89", "--bucket", "huge"), "unknown bucket huge")


@needs_rtx
def test_file_that_is_no_graph(stiv: Stiv, words_bundle: Path, tmp_path: Path) -> None:
    """The manifest vouches for its hash, the real parser in its own process refuses it."""
    refused = stiv("build", words_bundle, "--sm", "sm89", "--graphs", "head")
    assert_refused(refused, "head: TensorRT-RTX", "cannot build it for sm89: the ONNX parser refused head.onnx")
    assert not (words_bundle / "engines").exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@needs_rtx
def test_damaged_file(stiv: Stiv, words_bundle: Path) -> None:
    (words_bundle / "onnx" / "head.onnx").write_text("graph HEAD")
    assert_refused(stiv("build", words_bundle, "--sm", "89"), "head.onnx: damaged")


def test_missing_file(stiv: Stiv, words_bundle: Path) -> None:
    shutil.rmtree(words_bundle / "onnx")
    assert_refused(stiv("build", words_bundle, "--sm", "89"), "missing from the bundle")


def test_lists_of_names() -> None:
    assert listed(["head, step", "embed", "head"], "--graphs") == ("head", "step", "embed")
    assert listed(None, "--graphs") == ()
    assert [sm_name(text) for text in ("SM89", "sm120", "121", "Portable")] == ["89", "120", "121", "portable"]


@pytest.mark.parametrize(("command", "option"), [("build", "--graphs"), ("build", "--bucket"), ("audit", "--sm")])
@pytest.mark.parametrize("value", [",", "", " , "])
def test_a_list_that_names_nothing_is_not_all(
    stiv: Stiv, words_bundle: Path, command: str, option: str, value: str
) -> None:
    assert_refused(stiv(command, words_bundle, option, value), f"{option} {value!r}: names nothing")


def test_no_home_for_the_cache(stiv: Stiv, words_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_user: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert_refused(stiv("build", words_bundle, "--sm", "89"), "no home folder", "--cache DIR")
