"""A bundle as a model of Triton: the repository, the model with a stand-in for Triton's module, and a real server."""

import ctypes.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime import GenerationRequest, StivPipeline
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.command.main import main
from stiv_deploy.serving.triton.model import TritonPythonModel
from stiv_deploy.serving.triton.repository import config_text, model_text, write_repository

SERVER = os.environ.get("STIV_TRITON") or next(
    iter(getattr(find_spec("pytriton"), "submodule_search_locations", ())), ""
)
"""Folder of the package pytriton, which has a server in it."""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PROMPT = "digit three moving left"


def repository(bundle: Path, out: Path, packages: Path | None = None) -> Path:
    return write_repository(bundle, out, "toy", config_text("toy", 1, "cpu", {"threads": "1"}), model_text(packages))


def test_a_model_has_its_configuration_its_python_and_the_bundle(bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "toy").mkdir(parents=True)
    place = repository(bundle_path, tmp_path / "models")
    assert {file.name for file in place.iterdir()} == {"1", "config.pbtxt"}
    assert Bundle.open(place / "1" / "bundle").hash == Bundle.open(bundle_path).hash
    assert (place / "1" / "bundle" / "manifest.json").samefile(bundle_path / "manifest.json")
    assert [file.name for file in place.parent.iterdir()] == ["toy"]
    scope: dict[str, Any] = {}
    exec((place / "1" / "model.py").read_text(), scope)
    assert scope["TritonPythonModel"] is TritonPythonModel


def test_a_folder_of_packages_is_one_that_python_looks_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(model_text(tmp_path / "it's"), {})
    compile(model_text(tmp_path / "it's"), "model.py", "exec")
    assert "it's" in model_text(tmp_path / "it's")


def test_the_configuration_is_what_triton_reads() -> None:
    parser = pytest.importorskip("google.protobuf.text_format")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    text = config_text("toy", 2, "gpu", {"backend": "tensorrt-rtx", "threads": "3"})
    found = parser.Parse(text, schema.ModelConfig())
    assert (found.name, found.backend, found.max_batch_size) == ("toy", "python", 0)
    assert [(each.name, each.data_type, list(each.dims)) for each in (*found.input, *found.output)] == [
        ("REQUEST", schema.TYPE_UINT8, [-1]),
        ("FRAMES", schema.TYPE_UINT8, [-1, -1, -1, 3]),
        ("RECORD", schema.TYPE_UINT8, [-1]),
    ]
    (group,) = found.instance_group
    assert (group.count, group.kind) == (2, schema.ModelInstanceGroup.KIND_GPU)
    given = {key: value.string_value for key, value in found.parameters.items()}
    assert given == {"backend": "tensorrt-rtx", "threads": "3"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--name", "a/b"), "a model's name has letters"),
        (("--backend", "nope"), "--backend nope: there are"),
        (("--packages", "nowhere"), "no such folder"),
        (("--kind", "tpu"), "tpu"),
    ],
)
def test_what_is_wrong_is_one_line(
    bundle_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    words: str,
) -> None:
    out = tmp_path / "models"
    monkeypatch.setattr(sys, "argv", ["stiv", "export-triton", str(bundle_path), "--out", str(out), *options])
    assert main() == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not out.exists()


class Asked:
    """A request as Triton's module has it; cancelled after some looks."""

    def __init__(self, text: bytes, looks: int = 10_000) -> None:
        self.tensor, self._looks = np.array(bytearray(text)), looks

    def is_cancelled(self) -> bool:
        self._looks -= 1
        return self._looks < 0


class Tensor(SimpleNamespace):
    @classmethod
    def from_dlpack(cls, name: str, array: Any) -> "Tensor":
        return cls(name=name, array=np.from_dlpack(array))


class Fault(Exception):
    INVALID_ARG, INTERNAL = "invalid", "internal"  # an older one, without a word for what was cancelled


@pytest.fixture
def model(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TritonPythonModel]:
    """The model as Triton loads it."""
    module = SimpleNamespace(
        Tensor=Tensor,
        TritonError=Fault,
        InferenceResponse=lambda outputs=(), error=None: SimpleNamespace(
            outputs={each.name: each.array for each in outputs}, error=error
        ),
        get_input_tensor_by_name=lambda request, name: {"REQUEST": request.tensor}[name],
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    place = repository(bundle_path, tmp_path / "models")
    made, config = TritonPythonModel(), json.dumps({"parameters": {"threads": {"string_value": "1"}}})
    made.initialize(
        {
            "model_config": config,
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_repository": str(place),
            "model_version": "1",
        }
    )
    yield made
    made.finalize()


def test_a_request_gives_the_frames_that_it_gives_anywhere(model: TritonPythonModel, bundle_path: Path) -> None:
    request = GenerationRequest(prompt=PROMPT, seed=1, frames={0: np.zeros((8, 8, 3), np.uint8)})
    (response,) = model.execute([Asked(json.dumps(request.to_json()).encode())])
    with StivPipeline.from_bundle(bundle_path, "onnxruntime", threads=1) as pipe:
        expected = pipe.run(pipe.plan(request)).frames[0]
    assert response.error is None
    np.testing.assert_array_equal(response.outputs["FRAMES"], expected)
    assert json.loads(response.outputs["RECORD"].tobytes())["request"]["seed"] == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "is not JSON"),
        (b'{"prompt": "x", "num_frames": 100}', "num_frames|frames is 100"),
        (b'{"prompt": "x", "frames": {"0": "/etc/hostname"}}', "not by a path"),
        (b'{"prompt": "x", "frames": {"0": {"path": "/etc/hostname"}}}', "not by a path"),
        (b'{"prompt": "x", "count": 2}', "one video here"),
    ],
)
def test_a_bad_request_fails_alone(model: TritonPythonModel, body: bytes, words: str) -> None:
    bad, good = model.execute([Asked(body), Asked(json.dumps({"prompt": PROMPT, "num_frames": 1}).encode())])
    message, code = bad.error.args
    assert code == Fault.INVALID_ARG
    assert any(word in message for word in words.split("|")), message
    assert good.error is None


def test_a_client_that_has_left_stops_its_video(model: TritonPythonModel) -> None:
    request = Asked(json.dumps({"prompt": PROMPT, "num_inference_steps": 1000}).encode(), looks=3)
    (response,) = model.execute([request])
    assert (str(response.error.args[0]), request._looks) == ("the client has cancelled", -1)


def without_server() -> str:
    """Why there is no real Triton here; empty if there is one."""
    if not SERVER:
        return "no Triton: pip install nvidia-pytriton, in another environment with STIV_TRITON=<its folder pytriton>"
    if ctypes.util.find_library(f"python{PYTHON}") is None:
        return f"Triton's Python backend wants libpython{PYTHON}"
    return ""


@pytest.fixture
def triton(bundle_path: Path, tmp_path: Path) -> Iterator[str]:
    """Address of a real Triton that serves the toy bundle."""
    if without_server():
        pytest.skip(without_server())
    root, backend = Path(SERVER) / "tritonserver", tmp_path / "backends" / "python"
    shutil.copytree(root / "backends" / "python", backend)
    shutil.copy(root / "python_backend_stubs" / PYTHON / "triton_python_backend_stub", backend)
    repository(bundle_path, tmp_path / "models", Path(np.__file__).parents[1])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "model-repository": tmp_path / "models",
        "backend-directory": backend.parent,
        "http-address": "127.0.0.1",
        "http-port": port,
        "allow-grpc": "false",
        "allow-metrics": "false",
    }
    command = [root / "bin" / "tritonserver", *(f"--{name}={value}" for name, value in options.items())]
    command.append("--disable-auto-complete-config")
    variables = os.environ | {"LD_LIBRARY_PATH": str(Path(SERVER).parent / "nvidia_pytriton.libs")}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*map(str, command)], env=variables, stdout=log, stderr=log)
        try:
            wait_for_it(f"http://127.0.0.1:{port}/v2/health/ready", process, tmp_path / "log")
            yield f"http://127.0.0.1:{port}/v2/models/toy"
        finally:
            process.terminate()
            process.wait(60)


def wait_for_it(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(log.read_text()[-3000:])


def infer(address: str, request: dict[str, Any]) -> dict[str, np.ndarray]:
    """The outputs by Triton's HTTP API with binary tensors."""
    text = json.dumps(request).encode()
    tensor = {"name": "REQUEST", "shape": [len(text)], "datatype": "UINT8"}
    tensor["parameters"] = {"binary_data_size": len(text)}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/infer", head + text, headers), timeout=60) as answer:
        body, size = answer.read(), int(answer.headers["Inference-Header-Content-Length"])
    found, at = {}, size
    for each in json.loads(body[:size])["outputs"]:
        end = at + each["parameters"]["binary_data_size"]
        found[each["name"]] = np.frombuffer(body[at:end], np.uint8).reshape(each["shape"])
        at = end
    return found


@pytest.mark.slow
@pytest.mark.alone
def test_a_real_triton_makes_the_same_video(triton: str, bundle_path: Path) -> None:
    with urllib.request.urlopen(f"{triton}/config", timeout=10) as answer:
        config = json.load(answer)
    assert (config["backend"], config["max_batch_size"]) == ("python", 0)
    assert [group["kind"] for group in config["instance_group"]] == ["KIND_CPU"]
    found = infer(triton, {"prompt": PROMPT, "seed": 1})
    with StivPipeline.from_bundle(bundle_path, "onnxruntime", threads=1) as pipe:
        np.testing.assert_array_equal(found["FRAMES"], pipe(PROMPT, seed=1).frames[0])
    assert json.loads(found["RECORD"].tobytes())["request"]["prompt"] == PROMPT
    with pytest.raises(urllib.error.HTTPError) as caught:
        infer(triton, {"prompt": PROMPT, "num_frames": 100})
    assert (caught.value.code, "takes 1 to 6" in caught.value.read().decode()) == (400, True)
