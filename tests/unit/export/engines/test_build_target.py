"""Which GPU ``--sm`` means, which backends can be built for, and what is said where that is impossible."""

from types import SimpleNamespace

import pytest

from stiv_deploy.export.engines import build as build_module
from stiv_deploy.export.engines.build import resolve_sm
from stiv_deploy.runtime import tensorrt_library
from stiv_deploy.runtime.errors import BackendError
from stiv_deploy.runtime.tensorrt_library import import_tensorrt, missing_library, parse_flavour, targets

RTX = SimpleNamespace(
    __version__="1.7.1",
    ComputeCapability=SimpleNamespace(__members__={"NONE": 0, "CURRENT": 1, "SM120": 2, "SM89": 3, "SM86": 4}),
)
TRT = SimpleNamespace(__version__="11.4")


def no_gpu() -> str:
    raise BackendError("cudaGetDeviceCount failed: cudaErrorInsufficientDriver (driver too old)")


def test_targets_are_what_the_library_says() -> None:
    assert targets(RTX) == ["86", "89", "120"]
    assert targets(TRT) == []


@pytest.mark.parametrize("sm", ["89", "120", "portable"])
def test_rtx_needs_no_gpu(sm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "gpu_sm", no_gpu)
    assert resolve_sm(RTX, "tensorrt-rtx", sm) == sm


@pytest.mark.parametrize("sm", ["90", "ninety", ""])
def test_rtx_refuses_what_it_cannot_compile_for(sm: str) -> None:
    with pytest.raises(BackendError, match=f"TensorRT-RTX 1.7.1 supports SM 86, 89, 120, portable, auto; got '{sm}'"):
        resolve_sm(RTX, "tensorrt-rtx", sm)


def test_auto_is_the_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "gpu_sm", lambda: "120")
    assert resolve_sm(RTX, "tensorrt-rtx", "auto") == "120"
    assert resolve_sm(TRT, "tensorrt", "auto") == "120"
    assert resolve_sm(TRT, "tensorrt", "120") == "120"


def test_auto_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "gpu_sm", no_gpu)
    with pytest.raises(BackendError, match=r"--sm auto needs an NVIDIA GPU here .*; give --sm 86, 89, 120 or portable"):
        resolve_sm(RTX, "tensorrt-rtx", "auto")


def test_auto_on_a_gpu_that_rtx_does_not_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "gpu_sm", lambda: "90")
    with pytest.raises(BackendError, match="does not support this GPU's SM 90; give --sm 86, 89, 120 or portable"):
        resolve_sm(RTX, "tensorrt-rtx", "auto")


def test_tensorrt_builds_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="TensorRT has no portable engines"):
        resolve_sm(TRT, "tensorrt", "portable")
    monkeypatch.setattr(build_module, "gpu_sm", lambda: "90")
    with pytest.raises(BackendError, match="TensorRT builds for the GPU at hand, SM 90; got --sm 89"):
        resolve_sm(TRT, "tensorrt", "89")
    monkeypatch.setattr(build_module, "gpu_sm", no_gpu)
    with pytest.raises(BackendError, match=r"TensorRT --sm 90 needs an NVIDIA GPU here .*; build on the machine"):
        resolve_sm(TRT, "tensorrt", "90")


def test_unknown_backend() -> None:
    with pytest.raises(
        BackendError, match="backend 'onnx' has no engines to build; give --backend tensorrt or tensorrt-rtx"
    ):
        parse_flavour("onnx")


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def absent(name: str) -> None:
        tried.append(name)
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(tensorrt_library, "import_module", absent)
    with pytest.raises(
        BackendError, match=r"TensorRT is not installed .No module named 'tensorrt'.; pip install 'stiv-"
    ):
        import_tensorrt("tensorrt")
    assert tried == ["tensorrt", "tensorrt_bindings"]
    assert "stiv-deploy[rtx]" in str(missing_library("tensorrt-rtx"))


def test_bindings_wheel_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_bindings(name: str) -> SimpleNamespace:
        if name != "tensorrt_rtx_bindings":
            raise ImportError(name)
        return RTX

    monkeypatch.setattr(tensorrt_library, "import_module", only_bindings)
    assert import_tensorrt("tensorrt-rtx") is RTX
    assert missing_library("tensorrt-rtx") is None
