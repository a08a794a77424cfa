"""`stiv parity --explain` on the shipped model: the module with the planted fault is named, and its folder shows it."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from stiv_deploy.export.parity.explain import ExplainRequest, explain
from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, write_manifest


def with_swapped_rows(bundle: Path, target: Path, graph: str, weight: str) -> Path:
    """A bundle of links to ``bundle``, but for one graph whose weight has two rows in each other's place."""

    shutil.copytree(bundle, target)
    opened = Bundle.open(target)
    record = opened.manifest.graphs[graph]
    assert record.data is not None
    model = onnx.load(target / record.file.path, load_external_data=False)
    (tensor,) = (each for each in model.graph.initializer if each.name == weight)
    start = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    values = np.memmap(target / record.data.path, np.float32, "r+", offset=start, shape=tuple(tensor.dims))
    values[[0, 1]] = values[[1, 0]]
    values.flush()
    changed = record.model_copy(update={"data": file_record(target, record.data.path)})
    graphs = opened.manifest.graphs | {graph: changed}
    write_manifest(target, opened.manifest.model_copy(update={"graphs": graphs}))
    return target


@pytest.mark.slow
def test_two_swapped_rows_are_traced_to_their_module(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    wrong = with_swapped_rows(bundle, tmp_path / "wrong", "block_01", "temporal.out.weight")
    out = tmp_path / "out" / "why"
    request = ExplainRequest(bundle=wrong, out=out, checkpoint=checkpoint, backends=("onnxruntime",))
    report = explain(request)
    found = report.explanation
    assert found is not None
    assert not report.passed
    assert (found.graph, found.culprit) == ("block_01", "block_01.temporal.out")
    assert [row.name for row in report.rows if not row.passed] == ["block_01"]
    assert "| " not in (out / "README.md").read_text().splitlines()[0]
    done = subprocess.run([sys.executable, "-I", out / "reproduce.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("temporal.out.Add: relative L2 error")
    assert "WRONG" in done.stdout
    assert Bundle.open(wrong).manifest.parity == (), "rows up to a failure are not kept"
