"""`stiv verify` on the shipped model: it passes with any number of threads, and names a block that is wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, write_manifest
from stiv_deploy.runtime.pipeline.verification import VerifyReport, VerifyRequest, verify

pytestmark = pytest.mark.slow


def verified(bundle: Path, threads: int = 1) -> VerifyReport:
    return verify(VerifyRequest(bundle=bundle, backends=("onnxruntime",), threads=threads, record=False))


def test_a_right_bundle_passes_and_its_answers_are_small(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.golden is not None
    files = [file for record in manifest.graphs.values() for file in (record.file, record.data) if file]
    assert manifest.golden.bytes < 0.02 * sum(file.bytes for file in files)
    for threads in (1, 2):
        report = verified(bundle, threads)
        assert report.passed
        assert not report.unanswered
        (proof,) = report.proofs
        runs = {"without guidance", "forced jit", "sit by heun", "jit by ab2"}
        assert {row.subject for row in proof.rows} == {*manifest.graphs, *(f"sampling {name}" for name in runs)}
        assert max(row.error / row.gate for row in proof.rows) < 0.8


def test_one_weight_of_300000_is_found(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    record = opened.manifest.graphs["block_03"]
    assert record.data is not None
    weights = np.memmap(opened.folder / record.data.path, np.float32, "r+")
    index = int(np.argsort(np.abs(weights))[len(weights) // 2])  # of middling size
    weights[index] *= -1
    weights.flush()
    changed = record.model_copy(update={"data": file_record(opened.folder, record.data.path)})
    graphs = opened.manifest.graphs | {"block_03": changed}
    write_manifest(opened.folder, opened.manifest.model_copy(update={"graphs": graphs}))
    (proof,) = verified(opened.folder).proofs
    assert proof.result.failed[0] == "block_03"
