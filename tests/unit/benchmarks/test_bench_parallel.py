"""``benchmarks/bench_parallel.py``: a dry run on CPUs, and a clip that is another one."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import typer
from mixing_toys import mixing_graphs
from toys import Toy, make_bundle, with_answers, with_runs
from typer.testing import CliRunner

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import BundleError, MeasurementError
from stiv_deploy.runtime.sampling.parallel.clock import Spent
from stiv_deploy.runtime.sampling.parallel.shards import switch_bytes


@pytest.fixture
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("bench_parallel")


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle with halves and golden runs; their gates stand for any."""
    folder = make_bundle(tmp_path_factory.mktemp("bench") / "bundle", Toy(), mixing_graphs())
    return with_runs(with_answers(folder))


def run(script: ModuleType, *arguments: object) -> None:
    app = typer.Typer()
    app.command()(script.main)
    CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_a_dry_run_on_cpus(script: ModuleType, halved: Path, tmp_path: Path) -> None:
    out = tmp_path / "parallel.json"
    asked = ("--devices", "cpu,cpu", "--parallel", "dsp2", "--parallel", "cfg2", "--threads", 2, "--steps", 2)
    run(script, halved, *asked, "--repeats", 2, "--out", out)
    told = json.loads(out.read_text())
    assert [row["parallel"] for row in told["rows"]] == ["cfg1xdsp2", "cfg2xdsp1"]
    assert all(row["distance"] <= row["gate"] and row["speedup"] > 0 for row in told["rows"])
    latents = 2 * 2 * 4 * 16 * 4  # of the other's two frames, both rows
    switches = 2 * 2 * switch_bytes(2, 2, 4, 16, 16) // 2
    assert told["rows"][0]["leader_received_bytes"] == 2 * (latents + switches)
    assert told["rows"][0]["transport"] == "HostTransport"
    assert told["threads_each"] == 1
    for row in told["rows"]:
        assert len(row["exchange"]) == 2
        assert all(each["waiting"] >= 0 and each["copying"] > 0 and 0 < each["share"] < 1 for each in row["exchange"])
        assert row["explained"] >= row["explained_least"] > row["speedup"]
        assert row["seconds_apart"] > 0
        assert row["seconds_exchange"] > 0


@pytest.mark.slow
def test_a_dry_run_of_processes(
    script: ModuleType, halved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(script.__file__.rpartition("/")[0])
    out = tmp_path / "parallel.json"
    asked = ("--devices", "cpu,cpu", "--parallel", "dsp2", "--threads", 2, "--steps", 1, "--repeats", 1)
    run(script, halved, *asked, "--processes", "--out", out)
    told = json.loads(out.read_text())
    assert told["rows"][0]["transport"] == "SocketTransport"
    assert told["rows"][0]["seconds_apart"] > 0
    assert told["rows"][0]["seconds_exchange"] > 0
    assert [each["copying"] > 0 for each in told["rows"][0]["exchange"]] == [True, True]


def test_what_explains_the_seconds_of_a_clip(script: ModuleType) -> None:
    """By hand: medians of ratios, not ratios of medians."""
    turns = [
        script.Turn(1.0, 2.0, [Spent(0.5, 0.1), Spent(0.25, 0.15)], 0.8, 0.4),
        script.Turn(2.0, 2.5, [Spent(0.2, 0.3), Spent(0.75, 0.0)], 1.0, 0.5),
        script.Turn(1.5, 2.0, [Spent(0.5, 0.0), Spent(0.1, 0.0)], 0.9, 0.2),
    ]
    told = script.account(turns)
    assert told["explained"] == 1.0  # of 1.6 / 2, 2.5 / 2.5, 2 / 2
    assert told["explained_least"] == 0.8  # of 1.4 / 2, 2.5 / 2.5, 1.6 / 2
    assert told["explained_apart"] == 0.6  # of 1.2 / 2, 1.5 / 2.5, 1.1 / 2
    assert (told["seconds_one"], told["seconds"], told["seconds_apart"]) == (1.5, 2.0, 0.9)
    assert told["speedup"] == 0.75
    assert told["exchange"][0] == {"waiting": 0.5, "copying": 0.1, "share": 0.25}
    assert told["exchange"][1] == {"waiting": 0.25, "copying": 0.0, "share": 0.2}


def test_gpus_are_not_compared_with_clips_made_apart(script: ModuleType) -> None:
    told = script.account([script.Turn(1.0, 0.5, [Spent(), Spent()])])
    assert told["seconds_apart"] is told["explained_apart"] is None
    assert told["speedup"] == told["explained"] == 2.0


def test_one_device_has_the_threads_of_all_be_they_more_than_the_cores(
    script: ModuleType, halved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, pipeline = [], script.cpu_pipeline
    monkeypatch.setattr(script, "cpu_pipeline", lambda folder, threads: asked.append(threads) or pipeline(folder, 1))
    run(script, halved, "--devices", "cpu,cpu,cpu", "--parallel", "cfg3", "--threads", 1, "--steps", 1, "--repeats", 1)
    assert asked == [3]


def test_another_clip_is_no_measurement(script: ModuleType, halved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "gate_of", lambda _: -1.0)
    with pytest.raises(MeasurementError, match="^the clip of several devices is another: distance .*, at most -1"):
        run(script, halved, "--devices", "cpu,cpu", "--parallel", "dsp2", "--threads", 1, "--steps", 1)


def test_a_bundle_without_golden_runs(script: ModuleType, tmp_path: Path) -> None:
    folder = with_answers(make_bundle(tmp_path / "bundle", Toy()))
    with pytest.raises(BundleError, match="has no golden runs to take a gate from"):
        script.gate_of(Bundle.open(folder))
