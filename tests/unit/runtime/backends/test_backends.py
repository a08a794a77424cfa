from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stiv_deploy.runtime import backends
from stiv_deploy.runtime.backends import BACKENDS, available, open_backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.manifest import EngineRecord, FileRecord
from stiv_deploy.runtime.errors import BackendError, EngineError
from stiv_deploy.runtime.tensorrt_library import FLAVOURS

Opened = list[str]


def with_engines(toy_bundle: Bundle, *names: str) -> Bundle:
    file = FileRecord(path="engines/x.engine", sha256="0" * 64, bytes=1)
    records = tuple(
        EngineRecord(
            graph="head",
            bucket="small",
            backend=name,
            backend_version="1",
            sm="89",
            file=file,
            onnx="0" * 64,
            build_seconds=1.0,
        )
        for name in names
    )
    return Bundle(toy_bundle.folder, toy_bundle.manifest.model_copy(update={"engines": records}))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Records which backend would be opened, with all of them claiming to work."""
    names: Opened = []
    works(monkeypatch, lambda name, *_: names.append(name))
    return names


def works(monkeypatch: pytest.MonkeyPatch, opens: Callable[..., Any]) -> None:
    """Lets every backend claim to work; ``opens(name, bundle, threads, device)`` takes the place of opening it."""
    table = {name: backends.Entry(lambda _: None, lambda _: None, partial(opens, name)) for name in BACKENDS}
    monkeypatch.setattr(backends, "TABLE", table)


def test_every_backend_works_or_says_why_not() -> None:
    reasons = available()
    assert tuple(reasons) == BACKENDS
    assert reasons["onnxruntime"] is None
    for reason in reasons.values():
        assert reason is None or (reason and "\n" not in reason)


def test_auto_prefers_engines_of_the_bundle(toy_bundle: Bundle, opened: Opened) -> None:
    open_backend(None, with_engines(toy_bundle, "tensorrt-rtx", "tensorrt"))
    open_backend("auto", with_engines(toy_bundle, "tensorrt-rtx"))
    assert opened == ["tensorrt", "tensorrt-rtx"]


def test_auto_without_engines_takes_the_gpu(toy_bundle: Bundle, opened: Opened) -> None:
    open_backend("auto", toy_bundle)
    assert opened == ["onnxruntime-cuda"]


@pytest.mark.parametrize("error", [EngineError, BackendError])
def test_auto_passes_over_engines_that_do_not_fit(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    def refuse(name: str, *_: object) -> str:
        if name != "onnxruntime":
            raise error(f"{name} was built for another GPU")
        return name

    works(monkeypatch, refuse)
    caplog.set_level("INFO")
    assert open_backend(None, with_engines(toy_bundle, "tensorrt")) == "onnxruntime"  # type: ignore[comparison-overlap]
    assert "tensorrt was built for another GPU" in caplog.text


def test_auto_on_this_machine_runs(toy_bundle: Bundle) -> None:
    with open_backend("auto", toy_bundle) as backend:
        assert backend.name in BACKENDS


def test_unknown_backend_lists_names_and_what_works(toy_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="unknown backend 'openvino'; there are onnxruntime, .*work: onnxruntime"):
        open_backend("openvino", toy_bundle)


def test_backend_that_does_not_work_says_why(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unavailable_reason", lambda *_: "no NVIDIA driver")
    with pytest.raises(BackendError, match="backend tensorrt does not work here: no NVIDIA driver"):
        open_backend("tensorrt", toy_bundle)


def test_explicit_engines_are_not_replaced_by_something_else(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise EngineError("built for another GPU")

    works(monkeypatch, refuse)
    with pytest.raises(EngineError, match="another GPU"):
        open_backend("tensorrt", toy_bundle)


def test_the_device_gets_through(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    works(monkeypatch, lambda name, _, threads, device: given.append((name, threads, device)))
    bundle = with_engines(toy_bundle, *FLAVOURS)
    for name in (*BACKENDS, None):
        open_backend(name, bundle, 3, 2)
    assert given == [(name, 3, 2) for name in (*BACKENDS, "tensorrt")]


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        (
            "onnxruntime",
            1,
            "backend onnxruntime does not work here: it runs on the CPU, device 1 is a GPU: name no dev",
        ),
        ("auto", -1, "the device is a GPU's index, 0 or more; got -1"),
        ("auto", 1, "no backend works on device 1: tensorrt: .*onnxruntime-cuda: .*; onnxruntime: it runs on the CPU"),
    ],
)
def test_device_that_is_not_there(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, device: int, message: str
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=message) as caught:
        open_backend(name, toy_bundle, device=device)
    assert "\n" not in str(caught.value)


def test_gpu_of_onnxruntime_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("stiv_deploy.runtime.backends.onnxruntime.count_gpus", lambda: 2)
    assert backends.unavailable_reason("onnxruntime-cuda", 2) == "there is no GPU 2; CUDA sees 2, counted from 0"
    assert "CUDA cannot be used" in str(backends.unavailable_reason("onnxruntime-cuda", 1))


def test_cuda_graphs_are_the_engines_business(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.graph_reason("onnxruntime") == "it runs one call after another; only engines are captured"
    monkeypatch.setattr("stiv_deploy.runtime.backends.tensorrt.missing_library", lambda _: "nothing here")
    assert backends.graph_reason("tensorrt-rtx") == "the backend does not work here"
    monkeypatch.setattr("stiv_deploy.runtime.backends.tensorrt.unavailable_reason", lambda *_: None)
    monkeypatch.setattr("stiv_deploy.runtime.backends.tensorrt.graph_reason", lambda *given: f"not {given}")
    assert backends.graph_reason("tensorrt-rtx", 1) == "not ('tensorrt-rtx', 1)"


def test_cuda_without_its_provider_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    reason = available()["onnxruntime-cuda"]
    assert reason is not None
    assert "'gpu' extra" in reason


def test_missing_packages_are_a_reason_not_a_crash(hide: Callable[[str], None]) -> None:
    hide("stiv_deploy.runtime.backends.tensorrt")
    assert "cannot be imported" in str(available()["tensorrt"])


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes importing a module fail."""
    import sys

    def hidden(name: str) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        parent, _, child = name.rpartition(".")
        monkeypatch.delattr(f"{parent}.{child}", raising=False)

    return hidden


def test_runtime_imports_nothing_heavy(bundle_path: Path) -> None:
    import subprocess
    import sys

    heavy = ("torch", "onnx", "tensorrt", "tensorrt_rtx", "cuda", "stiv_deploy.stiv_ref", "stiv_deploy.export")
    code = (
        "import sys; from stiv_deploy.runtime import StivPipeline; "
        f"StivPipeline.from_bundle({str(bundle_path)!r}, 'onnxruntime')('digit', num_inference_steps=1); "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_the_package_imports_no_runtime_library() -> None:
    import subprocess
    import sys

    code = "import sys, stiv_deploy.runtime; print([m for m in ('onnxruntime', 'numpy', 'PIL') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
