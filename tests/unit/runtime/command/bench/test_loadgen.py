"""MLPerf's LoadGen, the real one, over work that takes no time; and what becomes of faults."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from stiv_deploy.runtime.command.bench import loadgen
from stiv_deploy.runtime.command.bench.loadgen import Order, run_loadgen
from stiv_deploy.runtime.command.bench.mllog import DETAIL, Scenario, result_of
from stiv_deploy.runtime.command.bench.record import BenchReport
from stiv_deploy.runtime.errors import MeasurementError, StivError

Run = Callable[..., tuple[int, str, str]]
pytest.importorskip("mlperf_loadgen", reason="LoadGen has no wheel here, or the extra 'bench' is not installed")
SINGLE = Order(scenario="singlestream", queries=64, seconds=0.0, prompts=3, expected=1000.0)


def test_a_single_stream_asks_one_at_a_time(tmp_path: Path) -> None:
    asked: list[Sequence[int]] = []

    def make(numbers: Sequence[int]) -> None:
        asked.append(numbers)
        time.sleep(0.001)

    found = run_loadgen(SINGLE, make, 1, tmp_path)
    assert {len(each) for each in asked} == {1}
    assert {number for each in asked for number in each} == {0, 1, 2}
    assert (found.queries, found.valid) == (len(asked), True)
    assert found.p90_seconds is not None
    assert 0.001 <= found.measured_p90_seconds <= found.p90_seconds


def test_too_few_queries_are_invalid_to_loadgen(tmp_path: Path) -> None:
    found = run_loadgen(SINGLE._replace(queries=5), lambda _: None, 1, tmp_path)
    assert (found.valid, found.reason, found.p90_seconds) == (False, "it missed early stopping", None)


def test_offline_asks_for_all_and_gets_batches(tmp_path: Path) -> None:
    asked: list[Sequence[int]] = []
    order = SINGLE._replace(scenario="offline", queries=10, expected=1.0)
    found = run_loadgen(order, asked.append, 4, tmp_path)
    assert [len(each) for each in asked] == [4, 4, 2]
    assert found.samples_per_second is not None
    assert found.queries == 10


def test_a_clip_that_fails_ends_loadgen_and_is_told(tmp_path: Path) -> None:
    def fail(_: Sequence[int]) -> None:
        raise StivError("the latents are not finite")

    with pytest.raises(StivError, match="^the latents are not finite$"):
        run_loadgen(SINGLE, fail, 1, tmp_path)


def test_loadgen_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadgen, "CHILD", "no_such_module")
    with pytest.raises(MeasurementError, match="^LoadGen failed: .*No module named"):
        run_loadgen(SINGLE, lambda _: None, 1, tmp_path)


FEW = ("--backend", "onnxruntime", "--threads", 1, "--no-cold", "--steps", 1, "--percentile", 50)


@pytest.mark.usefixtures("quiet", "verified")
def test_a_scenario_of_the_command(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    target, logs = tmp_path / "a.json", tmp_path / "new" / "logs"
    options: tuple[Any, ...] = ("--scenario", "offline", "--queries", 15, "--batch", 2, "--seconds", 0)
    code, out, err = run("bench", bundle_path, *FEW, *options, "--json", target, "--loadgen-logs", logs)
    assert code == 0, err
    assert "MLPerf-style, not an MLPerf result: offline" in " ".join(out.split())
    report = BenchReport.read(target)
    assert report.loadgen is not None
    assert report.loadgen.valid
    assert len(report.points[0].samples) * 2 >= report.loadgen.queries >= 15
    assert report.invalid == ()
    assert result_of(logs, "offline") == report.loadgen


@pytest.mark.parametrize("scenario", ["singlestream", "offline"])
def test_mlcommons_own_parser_reads_the_same(scenario: Scenario, tmp_path: Path) -> None:
    path = os.environ.get("MLPERF_LOG_PARSER")
    if path is None:
        pytest.skip("MLPERF_LOG_PARSER does not name tools/submission/log_parser.py of github.com/mlcommons/inference")
    parser: Any = run_path(path)
    found = run_loadgen(SINGLE._replace(scenario=scenario), lambda _: time.sleep(0.001), 1, tmp_path)
    log = parser["MLPerfLog"](str(tmp_path / DETAIL), strict=True)
    assert log["result_validity"] == ("VALID" if found.valid else "INVALID")
    assert log["loadgen_version"] == found.loadgen
    assert log["result_90.00_percentile_latency_ns"] == pytest.approx(1e9 * found.measured_p90_seconds)
    assert (log["num_errors"], log.has_error()) == (0, False)
    if scenario == "singlestream":
        assert log["result_query_count"] == found.queries
        assert log["early_stopping_latency_ss"] == pytest.approx(1e9 * (found.p90_seconds or 0))
    else:
        assert log["result_samples_per_second"] == found.samples_per_second


def test_logs_replace_nothing(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mine.txt").write_text("kept")
    command = ("bench", bundle_path, *FEW, "--scenario", "singlestream", "--loadgen-logs")
    code, _, err = run(*command, tmp_path / "logs")
    assert (code, err.count("\n")) == (2, 1)
    assert "holds files already" in err
    assert "holds its own files only" in run(*command, bundle_path / "logs")[2]
    assert "give --scenario, too" in run("bench", bundle_path, *FEW, "--loadgen-logs", tmp_path / "new")[2]


WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "sweep": (("--steps", 2), "a scenario is of one kind of work, got 2; give one batch, size and steps"),
    "batch": (("--batch", 2), "a single stream asks for one clip at a time, got --batch 2"),
    "samples": (("--samples", 9), "--samples is for the quick mode; give --queries with a scenario"),
    "seconds": (("--seconds", -1), "a scenario takes 1 query or more and 0 to 1e+06 seconds, got 64 and -1"),
    "queries": (("--queries", 20, "--percentile", 90), "20 samples are too few for the percentile 90; take 36"),
}


@pytest.mark.usefixtures("quiet", "verified")
@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_scenario(run: Run, bundle_path: Path, case: str) -> None:
    options, words = WRONG[case]
    code, out, err = run("bench", bundle_path, *FEW, "--scenario", "singlestream", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


@pytest.mark.usefixtures("quiet", "verified")
def test_loadgen_absent_is_one_line(run: Run, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("No module named 'mlperf_loadgen'", name="mlperf_loadgen")

    monkeypatch.setattr("stiv_deploy.runtime.command.bench.stage.check_loadgen", absent)
    code, _, err = run("bench", bundle_path, *FEW, "--scenario", "singlestream")
    assert (code, err) == (2, "error: mlperf_loadgen is not installed; run: pip install 'stiv-deploy[bench]'\n")
