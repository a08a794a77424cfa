"""``stiv verify``: a bundle that is right passes, planted faults do not, and bad input is one line."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from stiv_deploy.runtime import backends
from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.verified import read_result, results_file
from stiv_deploy.runtime.errors import BundleError, OutputError, Quarantined
from stiv_deploy.runtime.pipeline import verification
from stiv_deploy.runtime.pipeline.verification import proven_backend
from stiv_deploy.runtime.sampling.golden_run import rounded_bfloat16

Run = Callable[..., tuple[int, str, str]]


def planted(folder: Path, graph: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph, with a manifest that believes it."""
    manifest = read_manifest(folder)
    record = manifest.graphs[graph]
    path = folder / record.file.path
    model = onnx.load(path)
    change(model)
    location = None if record.data is None else f"{path.name}.data"
    path.unlink()
    if location:
        (path.parent / location).unlink()
    onnx.save_model(model, path, save_as_external_data=location is not None, location=location, size_threshold=0)
    data = None if record.data is None else file_record(folder, record.data.path)
    changed = record.model_copy(update={"file": file_record(folder, record.file.path), "data": data})
    write_manifest(folder, manifest.model_copy(update={"graphs": manifest.graphs | {graph: changed}}))


def slightly_other(model: onnx.ModelProto) -> None:
    """One weight is 1 % larger."""
    tensor = model.graph.initializer[0]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[0] *= np.float32(1.01)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def test_a_right_bundle_passes_and_is_known_for_it(run: Run, proven: Path) -> None:
    code, out, err = run("verify", proven, "--json")
    assert (code, err) == (0, "")
    (proof,) = json.loads(out)["proofs"]
    assert proof["result"]["failed"] == []
    assert {row["subject"] for row in proof["rows"]} == set(read_manifest(proven).graphs)
    assert len(proof["rows"]) == proof["result"]["compared"] == 2 * 16
    with open_backend("onnxruntime", Bundle.open(proven)) as backend:
        assert read_result(Bundle.open(proven), backend.machine).state == "verified"


def test_a_planted_weight_is_found_by_its_graph(run: Run, proven: Path) -> None:
    planted(proven, "block_01", slightly_other)
    code, out, _ = run("verify", proven)
    assert code == 1
    assert "onnxruntime: WRONG results in 1 of 10: block_01" in out
    with open_backend("onnxruntime", Bundle.open(proven), quarantined=True) as backend:
        assert read_result(Bundle.open(proven), backend.machine).state == "failed"


def test_a_graph_that_does_not_run_is_wrong(run: Run, proven: Path) -> None:
    def unrunnable(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Reshape")
        shape = next(each for each in model.graph.node if each.output[0] == node.input[1])
        node.input[1] = "bad"
        values = onnx.numpy_helper.from_array(np.array([7], np.int64), "bad")
        model.graph.node.remove(shape)
        model.graph.initializer.append(values)

    planted(proven, "head", unrunnable)
    code, out, _ = run("verify", proven, "--no-record")
    assert code == 1
    assert "graph head failed in ONNX Runtime" in " ".join(out.split())
    assert not results_file(proven).exists()


def test_quick_takes_one_size_of_each_graph(run: Run, proven: Path) -> None:
    code, out, _ = run("verify", proven, "--quick", "--json")
    (proof,) = json.loads(out)["proofs"]
    assert (code, proof["result"]["quick"], len(proof["rows"])) == (0, True, 16)


WRONG = {
    "older": ((), "has no golden answers, an older export made it; make the bundle again with 'stiv export'"),
    "backend": (("--backend", "cuda"), "unknown backend 'cuda'"),
    "absent": (("--backend", "tensorrt"), "backend tensorrt does not work here"),
    "inside": (("--json", "{bundle}/a.json"), "holds its own files only"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(run: Run, proven: Path, case: str) -> None:
    options, words = WRONG[case]
    if case == "older":
        write_manifest(proven, read_manifest(proven).model_copy(update={"golden": None}))
    code, out, err = run("verify", proven, *(option.format(bundle=proven) for option in options))
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())
    assert not results_file(proven).exists()


def test_a_damaged_file_is_damage(run: Run, proven: Path) -> None:
    data = proven / "onnx" / "block_00.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[0] ^= 1
    data.write_bytes(raw)
    code, _, err = run("verify", proven)
    assert (code, "damaged (its SHA-256 differs" in " ".join(err.split())) == (2, True)


def test_bfloat16_is_rounded_to_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-7), np.inf, np.nan], np.float32)
    assert rounded_bfloat16(values)[:5].tolist() == [0x3F80, 0x3F80, 0x3F82, 0xBF81, 0x7F80]
    assert rounded_bfloat16(values)[5] == 0x7FC0


@pytest.fixture
def wrong_gpu(proven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A right bundle on a machine whose better backend computes something else."""
    other = tmp_path / "other"
    shutil.copytree(proven, other)
    planted(other, "block_01", slightly_other)

    def opens(bundle: Bundle, threads: int | None, device: int) -> OnnxRuntimeBackend:
        backend = OnnxRuntimeBackend(Bundle.open(other))
        backend.name = "onnxruntime-cuda"
        return backend

    entry = backends.Entry(lambda _: None, lambda _: None, opens)
    monkeypatch.setitem(backends.TABLE, "onnxruntime-cuda", entry)
    return proven


def test_a_wrong_backend_is_passed_over_and_refused_by_name(wrong_gpu: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = Bundle.open(wrong_gpu)
    with proven_backend(bundle, None) as backend:
        assert backend.name == "onnxruntime"
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("backend onnxruntime-cuda is quarantined: block_01 gave wrong results in 'stiv verify'")
    with open_backend(None, bundle) as backend:
        assert backend.name == "onnxruntime"
    for refused in (partial(open_backend, "onnxruntime-cuda"), partial(proven_backend, name="onnxruntime-cuda")):
        with pytest.raises(Quarantined, match="block_01 gave wrong results"):
            refused(bundle=bundle)
    with pytest.raises(Quarantined, match="without --strict another one is taken"):
        proven_backend(bundle, None, strict=True)
    with open_backend("onnxruntime-cuda", bundle, quarantined=True) as backend:
        assert backend.name == "onnxruntime-cuda"


def test_a_right_backend_is_verified_once(proven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(proven)
    with proven_backend(bundle, "onnxruntime"):
        pass
    with open_backend("onnxruntime", bundle) as backend:
        verdict = read_result(bundle, backend.machine)
    assert verdict.state == "verified"
    monkeypatch.setattr(verification, "verify", None)
    with proven_backend(bundle, "onnxruntime"):
        pass


def test_a_place_that_takes_no_files_is_no_hindrance(proven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OutputError("no files here")

    monkeypatch.setattr(verification, "check_file", refused)
    with proven_backend(Bundle.open(proven), "onnxruntime") as backend:
        assert backend.name == "onnxruntime"
    assert not results_file(proven).exists()
    planted(proven, "block_01", slightly_other)
    with pytest.raises(Quarantined, match="block_01 gave wrong results; no files here, or name another backend"):
        proven_backend(Bundle.open(proven), None)


def test_nothing_but_a_wrong_one_is_an_error(proven: Path) -> None:
    planted(proven, "head", lambda model: model.graph.node[-1].__setattr__("op_type", "Sub"))
    with pytest.raises(Quarantined, match="head gave wrong results"):
        proven_backend(Bundle.open(proven), None)


def test_an_older_bundle_is_taken_but_not_strictly(proven: Path) -> None:
    write_manifest(proven, read_manifest(proven).model_copy(update={"golden": None}))
    with proven_backend(Bundle.open(proven), "onnxruntime"):
        pass
    with pytest.raises(BundleError, match="has no golden answers"):
        proven_backend(Bundle.open(proven), "onnxruntime", strict=True)
