"""What the TensorRT backend checks before it runs anything, and what it says."""

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stiv_deploy.runtime.backends import tensorrt as backend_module
from stiv_deploy.runtime.backends.engine_choice import build_command
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend, graph_reason, unavailable_reason
from stiv_deploy.runtime.bundle.bundle import Bundle, write_manifest
from stiv_deploy.runtime.errors import BackendError, BundleError, EngineError


def bind_decoder(backend: TensorRTBackend) -> Callable[[], None]:
    source, target = backend.empty((1, 4, 4, 4, 4), "float32"), backend.empty((1, 4, 3, 8, 8), "float32")
    return backend.bind("decoder", {"latents": source}, {"video": target})


def change(folder: Path, **update: Any) -> None:
    """Change every engine record of a bundle."""
    manifest = Bundle.open(folder).manifest
    engines = tuple(record.model_copy(update=update) for record in manifest.engines)
    write_manifest(folder, manifest.model_copy(update={"engines": engines}))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"sm": "120"}, r"no TensorRT engines for this GPU \(SM 89\) in the bundle, it has sm120"),
        ({"backend": "tensorrt-rtx"}, "no TensorRT engines for this GPU .* it has none"),
        ({"backend_version": "1.6.0"}, "was built by TensorRT 1.6.0, 1.7.1 is installed here"),
        ({"onnx": "f" * 64}, "was built from another version of graph text_encoder"),
    ],
)
def test_records_are_checked_before_anything_is_loaded(
    folder: Path, update: dict[str, str], message: str, stand_ins: SimpleNamespace
) -> None:
    change(folder, **update)
    with pytest.raises(EngineError, match=message) as caught:
        stand_ins.open(folder)
    assert build_command("tensorrt", "89") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_engine_of_one_graph(folder: Path, stand_ins: SimpleNamespace) -> None:
    manifest = Bundle.open(folder).manifest
    write_manifest(folder, manifest.model_copy(update={"engines": manifest.engines[1:]}))
    with pytest.raises(EngineError, match="no TensorRT engine for text_encoder; run: stiv build BUNDLE --backend"):
        stand_ins.open(folder)


def test_portable_engines_are_the_fallback(own_bundle: Path, stand_ins: SimpleNamespace) -> None:
    stand_ins.add_engines(own_bundle, sm="portable")
    assert {record.sm for record in stand_ins.open(own_bundle)[0]._records.values()} == {"portable"}
    stand_ins.add_engines(own_bundle, sm="89")
    assert {record.sm for record in stand_ins.open(own_bundle)[0]._records.values()} == {"89"}


def test_damaged_engine_file_is_not_loaded(folder: Path, stand_ins: SimpleNamespace) -> None:
    path = folder / "engines/tensorrt/89/decoder.engine"
    path.write_bytes(path.read_bytes()[::-1])
    backend, trt = stand_ins.open(folder)
    with pytest.raises(BundleError, match=r"decoder.engine: damaged"):
        bind_decoder(backend)
    assert not trt.loaded


def test_engine_that_the_library_refuses(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder, stand_ins.cudart())
    trt.refuse = True
    wanted = (
        r"decoder.engine: TensorRT 1.7.1 refused this engine on Fake GPU \(SM 89\) \(INVALID: UNSUPPORTED_CC\); run:"
    )
    with pytest.raises(EngineError, match=wanted):
        bind_decoder(backend)


def test_unavailable_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "missing_library", lambda flavour: "TensorRT is not installed")
    assert unavailable_reason("tensorrt") == "TensorRT is not installed"


def test_unavailable_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise BackendError("cuda-python is not installed")

    monkeypatch.setattr(backend_module, "missing_library", lambda flavour: None)
    monkeypatch.setattr(backend_module, "load_cuda", absent)
    assert unavailable_reason("tensorrt") == "no usable NVIDIA GPU: cuda-python is not installed"


def test_unavailable_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver = SimpleNamespace(
        cudaGetDeviceCount=lambda: (35, None),
        cudaGetLastError=lambda: (35,),
        cudaGetErrorName=lambda status: (0, b"cudaErrorInsufficientDriver"),
        cudaGetErrorString=lambda status: (0, b"driver too old"),
    )
    monkeypatch.setattr(backend_module, "missing_library", lambda flavour: None)
    monkeypatch.setattr(backend_module, "load_cuda", lambda: no_driver)
    wanted = "no usable NVIDIA GPU: cudaGetDeviceCount failed: cudaErrorInsufficientDriver (driver too old)"
    assert unavailable_reason("tensorrt-rtx") == wanted


@pytest.mark.parametrize("refuse", [False, True])
def test_cuda_graphs_are_tried(monkeypatch: pytest.MonkeyPatch, stand_ins: SimpleNamespace, refuse: bool) -> None:
    """A trial tells, and leaves nothing behind."""
    cudart = stand_ins.cudart()
    cudart.refuse_graphs = refuse
    monkeypatch.setattr(backend_module, "missing_library", lambda flavour: None)
    monkeypatch.setattr(backend_module, "load_cuda", lambda: cudart)
    wanted = "cudaGraphInstantiate failed: cudaErrorNotSupported (operation not supported)" if refuse else None
    assert graph_reason("tensorrt") == wanted
    assert not cudart.streams
    gc.collect()
    assert not cudart.memory


def test_no_cuda_graphs_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "missing_library", lambda flavour: "TensorRT is not installed")
    assert graph_reason("tensorrt") == "TensorRT is not installed"


def test_available_with_everything(monkeypatch: pytest.MonkeyPatch, stand_ins: SimpleNamespace) -> None:
    monkeypatch.setattr(backend_module, "missing_library", lambda flavour: None)
    monkeypatch.setattr(backend_module, "load_cuda", stand_ins.cudart)
    assert unavailable_reason("tensorrt") is None
