"""The rules of the parity ladder that need no bundle: errors, gates, the report."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from stiv_deploy.export.parity.files import report_json
from stiv_deploy.export.parity.ladder import UNIT_ROUNDING, Ladder, ParityReport, VideoGate, gate_of, rel_l2
from stiv_deploy.runtime.bundle.manifest import ParityRow


def row(error: float, passed: bool) -> ParityRow:
    return ParityRow(
        level="block",
        name="block_00",
        backend="onnxruntime",
        precision="float32",
        rel_l2=error,
        max_abs=error,
        gate=1e-5,
        passed=passed,
    )


def test_relative_error_is_the_ratio_of_norms() -> None:
    assert rel_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_relative_error_of_nan_is_nan_which_no_gate_passes() -> None:
    error = rel_l2(torch.tensor([float("nan"), 1.0]), torch.ones(2))
    assert math.isnan(error)
    assert not error <= gate_of("block", "float32", 0.0)


@pytest.mark.parametrize(("level", "cap"), [("op", 1e-5), ("block", 1e-5), ("step", 1e-4), ("teacher_forced", 1e-4)])
def test_float32_gates_have_the_promised_caps(level: str, cap: float) -> None:
    assert gate_of(level, "float32", 1.0) == cap


def test_gates_follow_the_yardstick_below_the_cap() -> None:
    assert gate_of("block", "float32", 1e-7) == pytest.approx(2e-7 + 4 * UNIT_ROUNDING["float32"])
    assert gate_of("free_run", "float32", 1e-2) == pytest.approx(4e-2, rel=1e-4)
    assert gate_of("block", "bfloat16", 1e-2) == pytest.approx(2e-2 + 4 * UNIT_ROUNDING["bfloat16"])


@pytest.mark.parametrize(
    ("graph", "engines", "precision", "vae", "type_of"),
    [
        ("decoder", None, "float16", "bfloat16", "float16"),
        ("decoder", "0" * 64, "float16", "bfloat16", "bfloat16"),
        ("image_encoder", "0" * 64, "bfloat16", "float16", "bfloat16"),
        ("decoder", "0" * 64, "bfloat16", "float32", "bfloat16"),
        ("decoder", "0" * 64, "float32", "float32", "float32"),
        ("head", "0" * 64, "float16", "bfloat16", "float16"),
    ],
)
def test_the_vae_of_engines_is_gated_by_what_they_compute_it_in(
    graph: str, engines: str | None, precision: str, vae: str, type_of: str
) -> None:
    backend, manifest = SimpleNamespace(engines=engines), SimpleNamespace(precision=precision, vae_precision=vae)
    ladder = SimpleNamespace(backend=backend, manifest=manifest, precision=precision)
    assert Ladder.type_of(ladder, graph) == type_of  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "passed", "value", "expected"),
    [(1e-7, True, 1.0, True), (1.0, False, 1.0, False), (1e-7, True, 0.5, False), (1e-7, True, math.nan, False)],
)
def test_a_report_passes_only_if_every_row_and_video_gate_does(
    error: float, passed: bool, value: float, expected: bool
) -> None:
    report = ParityReport((row(error, passed),), (1e-7,), (VideoGate("motion", "onnxruntime", value, 0.9),))
    assert report.passed is expected


def test_json_has_the_promised_fields_and_is_strict_json() -> None:
    report = ParityReport((row(math.nan, False),), (1e-7,), (VideoGate("motion", "onnxruntime", math.inf, 0.9),))

    def refuse(text: str) -> None:
        raise AssertionError(text)

    read = json.loads(report_json(report), parse_constant=refuse)
    assert read["passed"] is False
    (only,) = read["rows"]
    assert {"level", "name", "backend", "precision", "rel_l2", "max_abs", "gate", "passed"} <= set(only)
    assert only["rel_l2"] is None
