"""``stiv verify`` names the graph, whichever class of fault it has: in stand-in engines, and in ONNX Runtime's graphs.

The classes are those of ``benchmarks/graph_faults.py``; faults of the runtime's own code, which is no graph, are in
``tests/unit/benchmarks/test_mutations.py``, those of kernels in ``test_kernel_faults.py`` there.
"""

import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

sys.path.append(str(Path(__file__).parents[3]))
sys.path.append(str(Path(__file__).parents[5] / "benchmarks"))
from graph_faults import PLANTS
from toys import BLOCK, Toy, make_bundle, with_answers

from stiv_deploy.runtime import backends
from stiv_deploy.runtime.bundle.bundle import file_record, read_manifest, write_manifest
from stiv_deploy.runtime.pipeline.verification import VerifyRequest, verify

QUANTIZED = BLOCK.replace(
    "scaled = Mul (x, slope)",
    """q = QuantizeLinear (x, first, none)
    d = DequantizeLinear (q, first, none)
    scaled = MatMul (d, matrix)""",
).replace(
    "text = Add (keys, halved)",
    """said = Add (keys, halved)
    q2 = QuantizeLinear (said, second, none)
    text = DequantizeLinear (q2, second, none)""",
)
CONSTANTS = {
    "first": np.array(0.03, np.float32),
    "second": np.array(0.004, np.float32),
    "none": np.array(0, np.int8),
    "matrix": np.array([[0.5, 0, 0.25, 0], [0, 1, 0, 0.5], [0.75, 0, 0.25, 0], [0, 0.125, 0, 1]], np.float32),
}
ROUNDS: tuple[dict[str, str], ...] = (
    {
        "turned mask": "text_encoder",
        "order of inputs": "text_kv",
        "bit of a weight": "embed",
        "swapped rows": "block_00",
        "stride of a table": "block_01",
        "attribute": "head",
        "wire": "step",
        "operator": "frames",
    },
    {
        "stale scale": "embed",
        "scale of a quantizer": "block_00",
        "swapped scales": "block_01",
        "dropped branch": "head",
    },
    {"lost quantizer": "block_00", "moved quantizer": "block_01"},
)
"""Classes by the graph that each is planted into; what stands together is there at the same time."""

SEEDS = {"wire": 4}
"""Of a place where the graph still runs, where it is not 1."""


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with 8-bit blocks, with golden answers."""
    block = (QUANTIZED, CONSTANTS)
    folder = tmp_path_factory.mktemp("right") / "bundle"
    return with_answers(make_bundle(folder, Toy(), {"block_00": block, "block_01": block}))


@pytest.fixture
def folder(right: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(right, tmp_path / "bundle")


def faulty(folder: Path, classes: dict[str, str], elsewhere: Path) -> dict[str, Path]:
    """Graphs with faults, each in a file of its own, by graph; the bundle's own stay as they are."""
    files = {}
    for fault, graph in classes.items():
        model = onnx.load(folder / read_manifest(folder).graphs[graph].file.path)
        assert PLANTS[fault](model.graph, random.Random(SEEDS.get(fault, 1))), f"{graph} has no place for {fault}"
        files[graph] = elsewhere / f"{graph}.onnx"
        onnx.save(model, files[graph])
    return files


def failed(folder: Path, backend: str) -> set[str]:
    (proof,) = verify(VerifyRequest(bundle=folder, backends=(backend,), record=False, quick=True)).proofs
    return set(proof.result.failed)


def test_every_class_has_its_place() -> None:
    assert sorted(fault for classes in ROUNDS for fault in classes) == sorted(PLANTS)


@pytest.mark.parametrize("classes", [{}, *ROUNDS], ids=lambda classes: next(iter(classes), "none"))
def test_verify_names_the_engine(
    folder: Path, tmp_path: Path, stand_ins: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, classes: dict[str, str]
) -> None:
    """The graphs in the bundle are right, and so are the engines' hashes: they compute something else."""
    stand_ins.add_engines(folder)
    entry = backends.Entry(lambda _: None, lambda _: None, lambda bundle, *_: stand_ins.open(bundle.folder)[0])
    monkeypatch.setitem(backends.TABLE, "tensorrt", entry)
    files, manifest = faulty(folder, classes, tmp_path), read_manifest(folder)
    for record in manifest.engines:
        if record.graph in files:
            plan = f"{record.graph}\n{files[record.graph]}\n{stand_ins.scratch_of(record.graph)}"
            (folder / record.file.path).write_text(plan)
    engines = tuple(
        record.model_copy(update={"file": file_record(folder, record.file.path)}) for record in manifest.engines
    )
    write_manifest(folder, manifest.model_copy(update={"engines": engines}))
    assert failed(folder, "tensorrt") == set(classes.values())


@pytest.mark.parametrize("classes", [{}, *ROUNDS], ids=lambda classes: next(iter(classes), "none"))
def test_verify_names_the_graph(folder: Path, tmp_path: Path, classes: dict[str, str]) -> None:
    """The manifest believes in the changed files, so that no hash finds them."""
    manifest = read_manifest(folder)
    graphs = dict(manifest.graphs)
    for graph, file in faulty(folder, classes, tmp_path).items():
        path = graphs[graph].file.path
        shutil.move(file, folder / path)
        graphs[graph] = graphs[graph].model_copy(update={"file": file_record(folder, path), "data": None})
    write_manifest(folder, manifest.model_copy(update={"graphs": graphs}))
    assert failed(folder, "onnxruntime") == set(classes.values())
