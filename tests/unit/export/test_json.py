"""``--json`` of every command with a stage: alone it is all of standard output, with a file it is beside the text."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stiv_deploy.calibration import stage as calibration_stage
from stiv_deploy.calibration.stage import CalibrationReport
from stiv_deploy.export import bundle_from_checkpoint
from stiv_deploy.export.audit import audit
from stiv_deploy.export.audit.audit import AuditedEngine, AuditReport
from stiv_deploy.export.audit.fusion_audit import AuditRow
from stiv_deploy.export.bundle_from_checkpoint import ExportReport
from stiv_deploy.export.engines import build
from stiv_deploy.export.engines.build import BuildReport, BuiltEngine
from stiv_deploy.export.engines.plan_cache import CachedPlan
from stiv_deploy.export.parity import stage as parity_stage
from stiv_deploy.export.parity.ladder import ParityReport, VideoGate
from stiv_deploy.runtime.bundle.bundle import read_manifest
from stiv_deploy.runtime.bundle.manifest import ParityRow
from stiv_deploy.runtime.command.main import main
from stiv_deploy.runtime.pipeline import stage as clips_stage
from stiv_deploy.runtime.pipeline.output import StivOutput
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.stage import ClipsReport

Run = Callable[..., tuple[int, str]]


def calibrated(_: Path) -> CalibrationReport:
    return CalibrationReport(
        scales=Path("s.safetensors"), quantization="fp8", checkpoint="0" * 64, sweep=None, plan=None, seconds=1.0
    )


def exported(bundle: Path) -> ExportReport:
    return ExportReport(bundle=bundle, manifest=read_manifest(bundle), checked=True, seconds=1.0)


def built(bundle: Path) -> BuildReport:
    plan = CachedPlan(path=bundle / "a.plan", sha256="0" * 64, bytes=4, build_seconds=1.5)
    engine = BuiltEngine(graph="head", file="head.engine", attention="native", plan=plan, cached=False)
    return BuildReport(bundle=bundle, backend="tensorrt-rtx", version="1.7", sm="89", engines=(engine,))


def audited(passed: bool) -> AuditReport:
    engine = AuditedEngine(
        target="sm89", bucket="short", graph="head", same=("head",), kernels=3, build_seconds=1.0, plan_bytes=4
    )
    row = AuditRow(target="sm89", bucket="short", graph="head", name="kernels", expected="3", found="4", passed=passed)
    facts: dict[str, Any] = {"model": "toy", "precision": "float32", "quantization": None, "builder": "RTX"}
    return AuditReport(engines=(engine,), rows=(row,), **facts)


def measured(passed: bool) -> ParityReport:
    row = ParityRow(
        level="block",
        name="block_00",
        backend="onnxruntime",
        precision="float32",
        rel_l2=1e-7,
        max_abs=1e-6,
        gate=1e-6,
        passed=passed,
    )
    return ParityReport((row,), (1e-7,), (VideoGate("motion", "onnxruntime", 1.0, 0.9),))


def made(_: Path) -> ClipsReport:
    request = GenerationRequest(prompt="a", seed=1, num_frames=1, height=8, width=8, fps=8.0)
    output = StivOutput(
        frames=np.zeros((1, 1, 8, 8, 3), dtype=np.uint8),
        latents=np.zeros((1, 1, 4, 4, 4), dtype=np.float32),
        requests=[request],
        bundle="0" * 64,
        backend="onnxruntime",
        timings={"total": 1.0},
    )
    return ClipsReport(written=(Path("a.mp4"),), output=output)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``stiv`` with arguments: exit code and standard output."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["stiv", *map(str, words)])
        code = main()
        return code, capsys.readouterr().out

    return call


COMMANDS = [
    ("calibrate", ["--precision", "fp8", "--out", "s.safetensors"], calibration_stage, "calibrate", calibrated),
    ("export", ["--out", "bundle"], bundle_from_checkpoint, "export_bundle", exported),
    ("build", [], build, "build_engines", built),
    ("audit", [], audit, "audit_bundle", lambda _: audited(True)),
    ("audit", [], audit, "audit_bundle", lambda _: audited(False)),
    ("parity", [], parity_stage, "run_parity", lambda _: measured(True)),
    ("parity", [], parity_stage, "run_parity", lambda _: measured(False)),
    ("generate", ["--prompt", "a", "--out", "a.mp4"], clips_stage, "make_clips", made),
]


@pytest.mark.parametrize(("command", "options", "module", "worker", "report"), COMMANDS)
def test_a_report_is_a_text_or_json_or_both(
    run: Run,
    words_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    options: list[str],
    module: Any,
    worker: str,
    report: Callable[[Path], Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    found = report(words_bundle)
    failed = int(not getattr(found, "passed", True))
    monkeypatch.setattr(module, worker, lambda _request, _progress: found)
    words = (command, words_bundle, *options)
    code, text = run(*words)
    assert code == failed
    assert text
    code, alone = run(*words, "--json")
    values = json.loads(alone)
    assert code == failed
    assert values.get("passed", True) is not bool(failed)
    assert run(*words, "--json", tmp_path / "report.json") == (failed, text)
    assert json.loads((tmp_path / "report.json").read_text()) == values
    code, nothing = run(*words, "--json", tmp_path / "absent" / "report.json")
    assert (code, nothing) == (2, "")
