"""``stiv verify`` on stand-in engines: a fault in one engine is found, and the next that is right takes its place."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from stiv_deploy.runtime import backends
from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.backends.cuda import Cuda
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend
from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.engine_files import profile
from stiv_deploy.runtime.bundle.manifest import PORTABLE
from stiv_deploy.runtime.errors import Quarantined
from stiv_deploy.runtime.pipeline.verification import VerifyRequest, proven_backend, verify

OWN = "89"


def renamed(node: onnx.NodeProto, kind: str) -> None:
    node.op_type = kind


def node_of(graph: onnx.GraphProto, kind: str, index: int = 0) -> onnx.NodeProto:
    return [node for node in graph.node if node.op_type == kind][index]


def scaled(graph: onnx.GraphProto) -> None:
    tensor = graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))


def transposed(graph: onnx.GraphProto) -> None:
    node_of(graph, "Transpose").attribute[0].ints[:] = [0, 1, 2, 3]


FAULTS: dict[str, Callable[[onnx.GraphProto], None]] = {
    "text_kv": lambda graph: renamed(node_of(graph, "Neg"), "Abs"),
    "block_00": lambda graph: renamed(node_of(graph, "Exp"), "Neg"),  # the mask is another one
    "block_01": scaled,
    "head": transposed,
    "step": lambda graph: renamed(node_of(graph, "Greater"), "Less"),  # renormalizes where it should not
    "decoder": lambda graph: node_of(graph, "Slice").input.__setitem__(1, "axis"),
}
"""By graph what is another one in its engine: the graph in the bundle is right."""


def planted(folder: Path, sm: str, graph: str, change: Callable[[onnx.GraphProto], None]) -> None:
    """Let the engine of ``graph`` for ``sm`` compute something else than the graph does."""
    record = read_manifest(folder).graphs[graph]
    other = folder.parent / f"other-{graph}"
    other.mkdir(exist_ok=True)
    model = onnx.load(folder / record.file.path)
    change(model.graph)
    onnx.save(model, other / "graph.onnx")
    manifest = read_manifest(folder)
    path = next(each.file.path for each in manifest.engines if (each.graph, each.sm) == (graph, sm))
    scratch = (folder / path).read_text().split("\n")[-1]
    (folder / path).write_text(f"{graph}\n{other / 'graph.onnx'}\n{scratch}")
    engines = tuple(
        each.model_copy(update={"file": file_record(folder, path)}) if each.file.path == path else each
        for each in manifest.engines
    )
    write_manifest(folder, manifest.model_copy(update={"engines": engines}))


@pytest.fixture
def engines(sampled: Path, stand_ins: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with answers and stand-in engines, on a machine where they run; those of one GPU and portable ones."""
    for sm in (OWN, PORTABLE):
        stand_ins.add_engines(sampled, sm)

    def opens(bundle: Bundle, _threads: int | None, device: int) -> TensorRTBackend:
        manifest, cudart = bundle.manifest, stand_ins.cudart()
        profiles = {
            name: [profile(record.spec, manifest.model, bucket) for bucket in manifest.buckets]
            for name, record in manifest.graphs.items()
        }
        return TensorRTBackend(bundle, "tensorrt", trt=stand_ins.trt(cudart, profiles), cuda=Cuda(cudart, device))

    monkeypatch.setitem(backends.TABLE, "tensorrt", backends.Entry(lambda _: None, lambda _: None, opens))
    return sampled


def failed(folder: Path) -> list[tuple[str, ...]]:
    report = verify(VerifyRequest(bundle=folder, backends=("tensorrt",), record=False, quick=True))
    return [proof.result.failed for proof in report.proofs]


def test_a_fault_in_an_engine_is_found_by_its_name(engines: Path) -> None:
    for graph, change in FAULTS.items():
        planted(engines, OWN, graph, change)
    own, portable = failed(engines)
    assert [name for name in own if not name.startswith("sampling")] == list(FAULTS)
    assert portable == (), "the others are right"


def test_other_engines_are_taken_then_onnxruntime(engines: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph, change = "block_01", scaled
    planted(engines, OWN, graph, change)
    bundle = Bundle.open(engines)
    with proven_backend(bundle, None) as backend:
        assert (backend.name, {record.sm for record in backend.records}) == ("tensorrt", {PORTABLE})
    said = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    assert said == {
        f"backend tensorrt is quarantined: {graph}, sampling without guidance, sampling sit by heun and 2 more gave "
        "wrong results in 'stiv verify'; its engines for portable are taken"
    }
    with open_backend("tensorrt", bundle) as backend:
        assert backend.records[0].sm == PORTABLE
    with pytest.raises(Quarantined, match="without --strict another one is taken"):
        proven_backend(bundle, None, strict=True)
    planted(engines, PORTABLE, graph, change)
    bundle = Bundle.open(engines)
    with proven_backend(bundle, None) as backend:
        assert backend.name == "onnxruntime"
    with pytest.raises(Quarantined, match="block_01"):
        proven_backend(bundle, "tensorrt")


def test_a_step_that_is_wrong_in_the_loop_alone_is_found(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy within the device that does nothing: every graph is right, rows keep what they had."""
    monkeypatch.setattr(TensorRTBackend, "copy", lambda *_: None)
    (own, _) = failed(engines)
    assert own
    assert all(name.startswith("sampling") for name in own)
