"""LoadGen's log, as it writes it."""

import json
from pathlib import Path
from typing import Any

import pytest

from stiv_deploy.runtime.command.bench.mllog import DETAIL, result_of
from stiv_deploy.runtime.errors import MeasurementError

SINGLE: dict[str, Any] = {
    "loadgen_version": "6.0.17 @ d6147c7eb7",
    "effective_min_query_count": 64,
    "effective_min_duration_ms": 600_000,
    "result_validity": "VALID",
    "result_min_duration_met": True,
    "result_min_queries_met": True,
    "early_stopping_met": True,
    "result_query_count": 70,
    "early_stopping_latency_ss": 28_052_532,
    "result_90.00_percentile_latency_ns": 15_275_002,
    "num_errors": 0,
}


def written(folder: Path, **values: Any) -> Path:
    lines = [f":::MLLOG {json.dumps({'key': key, 'value': value})}" for key, value in (SINGLE | values).items()]
    (folder / DETAIL).write_text("\n".join(["no line of the log", *lines]) + "\n")
    return folder


def test_a_single_stream_counts_the_estimate_of_early_stopping(tmp_path: Path) -> None:
    found = result_of(written(tmp_path), "singlestream")
    assert (found.valid, found.queries, found.least_queries, found.least_seconds) == (True, 70, 64, 600.0)
    assert found.p90_seconds == pytest.approx(0.028052532)
    assert found.measured_p90_seconds == pytest.approx(0.015275002)
    assert found.label == "MLPerf-style, not an MLPerf result"


def test_what_was_missed_is_told(tmp_path: Path) -> None:
    missed = {"result_validity": "INVALID", "early_stopping_met": False, "early_stopping_latency_ss": 0}
    found = result_of(written(tmp_path, **missed), "singlestream")
    assert (found.valid, found.reason, found.p90_seconds) == (False, "it missed early stopping", None)
    assert not result_of(written(tmp_path, num_errors=1), "singlestream").valid


def test_offline_has_a_rate(tmp_path: Path) -> None:
    own = {"result_samples_per_second": 1.5, "generated_samples_per_query": 248, "effective_min_sample_count": 248}
    found = result_of(written(tmp_path, **own), "offline")
    assert (found.samples_per_second, found.queries, found.p90_seconds) == (1.5, 248, None)


@pytest.mark.parametrize(
    "text", ["", ":::MLLOG {", ':::MLLOG {"key": 1}', ':::MLLOG {"key": "result_validity", "value": 1}']
)
def test_no_log_is_one_line(tmp_path: Path, text: str) -> None:
    for there in (False, True):
        if there:
            (tmp_path / DETAIL).write_text(text)
        with pytest.raises(MeasurementError, match="run it again$"):
            result_of(tmp_path, "singlestream")
