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


def test_another_clip_is_no_measurement(script: ModuleType, halved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "gate_of", lambda _: -1.0)
    with pytest.raises(MeasurementError, match="^the clip of several devices is another: distance .*, at most -1"):
        run(script, halved, "--devices", "cpu,cpu", "--parallel", "dsp2", "--threads", 1, "--steps", 1)


def test_a_bundle_without_golden_runs(script: ModuleType, tmp_path: Path) -> None:
    folder = with_answers(make_bundle(tmp_path / "bundle", Toy()))
    with pytest.raises(BundleError, match="has no golden runs to take a gate from"):
        script.gate_of(Bundle.open(folder))
