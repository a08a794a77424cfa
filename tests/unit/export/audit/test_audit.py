"""What an audit hands back: the report as JSON, and what is refused before anything is opened."""

import json
from pathlib import Path

import pytest

from stiv_deploy.export.audit.audit import AuditedEngine, AuditReport, AuditRequest
from stiv_deploy.export.audit.cli import show
from stiv_deploy.export.audit.fusion_audit import AuditRow
from stiv_deploy.export.audit.lost_fusions import AuditNote
from stiv_deploy.runtime.errors import EngineError

ENGINE = AuditedEngine(
    target="sm89", bucket="default", graph="head", same=("head",), kernels=3, build_seconds=1.0, plan_bytes=4
)


def row(*, passed: bool) -> AuditRow:
    found = "3" if passed else "4"
    return AuditRow(
        target="sm89", bucket="default", graph="head", name="kernels", expected="3", found=found, passed=passed
    )


@pytest.mark.parametrize("passed", [True, False])
def test_a_report_says_whether_everything_passed(passed: bool) -> None:
    report = AuditReport(
        model="toy",
        precision="float16",
        quantization="fp8",
        builder="TensorRT-RTX 1.7",
        engines=(ENGINE,),
        rows=(row(passed=True), row(passed=passed)),
    )
    written = json.loads(report.to_json())
    assert report.passed is written["passed"] is passed
    assert [each["found"] for each in written["rows"]] == ["3", "3" if passed else "4"]
    assert written["engines"][0]["same"] == ["head"]
    assert (written["model"], written["quantization"], written["builder"]) == ("toy", "fp8", "TensorRT-RTX 1.7")


def test_less_than_one_job() -> None:
    with pytest.raises(EngineError, match="--jobs must be at least 1, got 0"):
        AuditRequest(bundle=Path("absent"), jobs=0)


def test_notes_are_printed_and_fail_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    note = AuditNote(target="sm89", bucket="default", graph="head", text="3 kernels; 2 with its weights")
    report = AuditReport(
        model="toy",
        precision="float16",
        quantization=None,
        builder="TensorRT-RTX 1.7",
        engines=(ENGINE,),
        rows=(row(passed=True),),
        notes=(note,),
    )
    show(report)
    text = capsys.readouterr().out
    assert "\nnote: head: 3 kernels; 2 with its weights (sm89, bucket default)\n" in text
    assert text.endswith("audit passed: 1 checks on 1 engines\n")
