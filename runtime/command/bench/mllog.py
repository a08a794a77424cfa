"""What LoadGen wrote about a run: lines of JSON, each a key and a value, behind a mark.

The format is that of ``mlperf_log_detail.txt`` (MLCommons Inference, ``loadgen/logging.cc``).
"""

import json
from pathlib import Path
from typing import Any, Literal

from stiv_deploy.runtime.bundle.bounds import Name
from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.errors import MeasurementError, one_line

MARK = ":::MLLOG "
DETAIL = "mlperf_log_detail.txt"
NANO = 1e-9
Scenario = Literal["singlestream", "offline"]
LABEL: Literal["MLPerf-style, not an MLPerf result"] = "MLPerf-style, not an MLPerf result"


class LoadgenResult(Frozen):
    """LoadGen's own account of a run, and what was asked of it.

    ``p90_seconds`` of a single stream is the estimate by early stopping, which MLPerf counts, ``measured_p90_seconds``
    the plain percentile; ``samples_per_second`` is of an offline run. ``valid`` is LoadGen's verdict, ``reason`` why.
    """

    label: Literal["MLPerf-style, not an MLPerf result"] = LABEL
    loadgen: Name
    scenario: Scenario
    valid: bool
    reason: str
    queries: int
    least_queries: int
    least_seconds: float
    p90_seconds: float | None
    measured_p90_seconds: float
    samples_per_second: float | None


def read_log(path: Path) -> dict[str, Any]:
    """Values by key, the last of each; :class:`~stiv_deploy.runtime.errors.MeasurementError` for other files."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
        found = {str(entry["key"]): entry["value"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MeasurementError(f"{path}: no log of LoadGen ({one_line(str(error), 200)}); run it again") from None
    if "result_validity" not in found:
        raise MeasurementError(f"{path}: LoadGen wrote no result; run it again")
    return found


def result_of(folder: Path, scenario: Scenario) -> LoadgenResult:
    """The result in LoadGen's ``folder``; :class:`~stiv_deploy.runtime.errors.MeasurementError` if there is none."""
    log = read_log(folder / DETAIL)
    try:
        return _result(log, scenario)
    except (KeyError, TypeError, ValueError) as error:
        raise MeasurementError(f"{folder / DETAIL}: LoadGen's result is not complete ({error}); run it again") from None


def _result(log: dict[str, Any], scenario: Scenario) -> LoadgenResult:
    single = scenario == "singlestream"
    estimate = float(log["early_stopping_latency_ss"]) * NANO if single else 0.0
    return LoadgenResult(
        loadgen=str(log["loadgen_version"]),
        scenario=scenario,
        valid=log["result_validity"] == "VALID" and not log.get("num_errors", 0),
        reason=_reason(log),
        queries=int(log["result_query_count" if single else "generated_samples_per_query"]),
        least_queries=int(log["effective_min_query_count" if single else "effective_min_sample_count"]),
        least_seconds=float(log["effective_min_duration_ms"]) / 1e3,
        p90_seconds=estimate or None,
        measured_p90_seconds=float(log["result_90.00_percentile_latency_ns"]) * NANO,
        samples_per_second=None if single else float(log["result_samples_per_second"]),
    )


WANTED = {
    "result_min_duration_met": "the least duration",
    "result_min_queries_met": "the least number of queries",
    "early_stopping_met": "early stopping",
}


def _reason(log: dict[str, Any]) -> str:
    missed = [words for key, words in WANTED.items() if log.get(key) is False]
    return f"it missed {', '.join(missed)}" if missed else "all that LoadGen asks for was met"
