"""`stiv parity` on a real bundle: it passes, and it bites when a bundle does not do what the reference does."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stiv_deploy.export.parity.stage import ParityRequest, run_parity
from stiv_deploy.runtime.backends import runnable
from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, write_manifest
from stiv_deploy.runtime.bundle.contract import FRAMES
from stiv_deploy.runtime.errors import BackendError, BundleError

LEVELS = {"op", "block", "step", "teacher_forced", "free_run"}


def stiv(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "stiv_deploy.runtime.command.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def edited(bundle: Path, target: Path, graph: str, edit: Callable[[np.ndarray], None]) -> Path:
    """A copy of ``bundle`` whose ``graph`` has edited weights, and a manifest that believes them."""
    shutil.copytree(bundle, target)
    opened = Bundle.open(target)
    record = opened.manifest.graphs[graph]
    assert record.data is not None
    path = target / record.data.path
    weights = np.fromfile(path, dtype=np.float32)
    edit(weights)
    weights.tofile(path)
    graphs = opened.manifest.graphs | {graph: record.model_copy(update={"data": file_record(target, record.data.path)})}
    write_manifest(target, opened.manifest.model_copy(update={"graphs": graphs}))
    return target


@pytest.mark.slow
def test_the_ladder_passes_on_every_level(bundle: Path, checkpoint: Path) -> None:
    told: list[tuple[str, int, int]] = []
    request = ParityRequest(bundle=bundle, checkpoint=checkpoint, backends=("onnxruntime",), steps=4, record=False)
    report = run_parity(request, lambda *step: told.append(step))
    assert report.passed, [row for row in report.rows if not row.passed]
    assert {row.level for row in report.rows} == LEVELS
    for level in ("step", "teacher_forced", "free_run"):
        names = {row.name.split(" ", 2)[-1] for row in report.rows if row.level == level}
        assert names == {"euler", "ab2", "ab2, interval", "heun, interval"}
    manifest = Bundle.open(bundle).manifest
    assert manifest.parity == ()
    assert sum(row.level == "block" for row in report.rows) == manifest.model.blocks
    total = len(manifest.graphs.keys() - {FRAMES}) + 3 * len(names)
    counts = [done for _, done, of in told if of == total]
    assert counts == sorted(counts)
    assert set(counts) == set(range(total))
    assert {step[1:] for step in told if step[2] != total} <= {(0, 1)}, "before it is known how much there is"
    assert max(row.rel_l2 for row in report.rows if row.level == "block") <= 1e-5
    assert max(row.rel_l2 for row in report.rows if row.level == "teacher_forced") <= 1e-4
    assert {"finite share", "given frames bit-equal, share"} <= {gate.name.split(": ")[1] for gate in report.video}


@pytest.mark.slow
def test_one_part_in_a_thousand_off_in_one_block_fails_that_block_and_the_steps(
    bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    def scale(weights: np.ndarray) -> None:
        weights *= 1.001

    off = edited(bundle, tmp_path / "off", "block_02", scale)
    report = run_parity(ParityRequest(bundle=off, checkpoint=checkpoint, backends=("onnxruntime",), steps=2))
    failed = {(row.level, row.name) for row in report.rows if not row.passed}
    assert not report.passed
    assert {name for level, name in failed if level == "block"} == {"block_02"}
    assert {"step", "teacher_forced"} <= {level for level, _ in failed}


@pytest.mark.slow
def test_command_writes_json_records_rows_and_exits_1_on_a_failed_gate(
    bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    good = shutil.copytree(bundle, tmp_path / "good")
    target = tmp_path / "parity.json"
    done = stiv("parity", good, "--checkpoint", checkpoint, "--json", target, "--steps", 2)
    assert done.returncode == 0, done.stderr
    read = json.loads(target.read_text())
    assert read["passed"] is True
    assert len(Bundle.open(good).manifest.parity) == len(read["rows"])

    def spoil(weights: np.ndarray) -> None:
        weights[: len(weights) // 2] = 0

    bad = edited(bundle, tmp_path / "bad", "head", spoil)
    done = stiv("parity", bad, "--checkpoint", checkpoint, "--json", target, "--steps", 2)
    assert done.returncode == 1
    assert "parity FAILED" in done.stdout
    assert json.loads(target.read_text())["passed"] is False


@pytest.mark.slow
def test_another_checkpoint_is_refused(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["sampling"]["steps"] += 1
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match="is not what .* was exported from"):
        run_parity(ParityRequest(bundle=bundle, checkpoint=other))
    with pytest.raises(BundleError, match="name it with --checkpoint"):
        run_parity(ParityRequest(bundle=bundle, checkpoints=tmp_path))


@pytest.mark.slow
def test_backends_that_do_not_exist_or_run_are_refused(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert "onnxruntime" in runnable(opened, ())
    with pytest.raises(BackendError, match="unknown backend 'cuda'; there are: onnxruntime"):
        runnable(opened, ["cuda"])
