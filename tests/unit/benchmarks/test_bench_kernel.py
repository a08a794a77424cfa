"""The kernel benchmark as a command: parts in processes of their own, files, exit codes; and all of it on the CPU."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

Load = Callable[[str], ModuleType]
BENCH = Path(__file__).parents[3] / "benchmarks" / "bench_kernel.py"


@pytest.fixture(scope="module")
def bench(benchmark_module: Load) -> ModuleType:
    return benchmark_module("bench_kernel")


@pytest.mark.alone
def test_children_that_break_leave_what_they_saved(bench: ModuleType, kernels: Load, tmp_path: Path) -> None:
    child, late = tmp_path / "child.py", tmp_path / "late"
    save = "import json, sys, time\norder = json.loads(sys.argv[1])\n" + (
        "saved = dict(part=order['part'], status='passed', markdown='half', data={'n': 1})\n"
        "open(order['result'], 'w').write(json.dumps(saved))\n"
    )
    order = kernels("parts").Order("check", None, 0.0, str(tmp_path / "result.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "CHILD", child)
        child.write_text(save)
        assert bench.run_child(order).status == "passed"
        child.write_text(save + "sys.exit(3)")
        outcome = bench.run_child(order)
        assert (outcome.status, outcome.markdown, outcome.data) == ("error", "half", {"n": 1})
        assert "code 3" in outcome.message
        patch.setattr(bench, "GRACE", 0.5)
        child.write_text(save + f"import subprocess\nsubprocess.run(['sh', '-c', 'sleep 3; touch {late}'])\n")
        started = time.monotonic()
        outcome = bench.run_child(order)
        assert outcome.status == "error"
        assert time.monotonic() - started < 2.5
        Path(order.result).unlink(missing_ok=True)
        child.write_text("raise SystemExit(1)")
        assert bench.run_child(order).status == "error"
    time.sleep(max(0.0, started + 3.5 - time.monotonic()))
    assert not late.exists()  # what the part had started was ended with it


def test_a_part_that_raises_is_an_error_with_what_came_before(
    kernels: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = kernels("parts")

    def breaks(order: object, save: Callable[[object], None]) -> object:
        save(kernels("outcome").Outcome("speed", "measured", markdown="one row"))
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    monkeypatch.setitem(parts.PARTS, "speed", breaks)
    parts.run_part(parts.Order("speed", None, 1.0, str(tmp_path / "speed.json")))
    outcome = kernels("outcome").Outcome.read(tmp_path / "speed.json")
    assert (outcome.status, outcome.markdown) == ("error", "one row")
    assert outcome.message == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_bad_options_are_one_line(bench: ModuleType, kernels: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    error = kernels("errors").BenchmarkError
    with pytest.raises(error, match=r"no part named speeed; there are: check"):
        bench.chosen_parts("check,speeed")
    with pytest.raises(error, match="no part named at all"):
        bench.chosen_parts(" ,")
    assert bench.chosen_parts("speed,check") == ["check", "speed"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match="--dry-run"):
        bench.capability(False)


@pytest.mark.parametrize(("status", "code"), [("passed", 0), ("not run", 0), ("failed", 1), ("error", 1)])
def test_exit_code_says_whether_a_check_failed(
    bench: ModuleType, kernels: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str, code: int
) -> None:
    import typer

    outcome = kernels("outcome").Outcome("check", status, "why", "table")
    monkeypatch.setattr(bench, "build", lambda sm: kernels("build").Built(Path(), Path(), Path(), 1.0, "g++"))
    monkeypatch.setattr(bench, "run_parts", lambda *_: iter([outcome]))
    app = typer.Typer()
    app.command()(bench.main)
    result = CliRunner().invoke(app, ["--dry-run", "--parts", "check", "--out", str(tmp_path / "results")])
    assert result.exit_code == code
    assert f"| check | {status} |" in result.output
    (report,) = (tmp_path / "results").glob("*-dry-run-kernels.md")
    assert "meaningless" in report.read_text()
    assert sorted(path.suffix for path in (tmp_path / "results").iterdir()) == [".json", ".md"]


def test_numbers_that_are_not_finite_are_null(kernels: Load, tmp_path: Path) -> None:
    outcome = kernels("outcome").Outcome("check", "failed", data={"worst": [float("inf"), (float("nan"), 1.5)]})
    outcome.write(tmp_path / "x.json")
    assert kernels("outcome").Outcome.read(tmp_path / "x.json").data == {"worst": [None, [None, 1.5]]}
    assert "Infinity" not in (tmp_path / "x.json").read_text()


def test_build_says_what_is_missing(kernels: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = kernels("build")
    monkeypatch.setattr(build, "build_folder", lambda sm: tmp_path / "build")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(kernels("errors").BenchmarkError, match="install CMake"):
        build.build(None)
    monkeypatch.undo()
    monkeypatch.setattr(build, "build_folder", lambda sm: tmp_path / "build")
    log = tmp_path / "build.log"
    log.write_text("")
    with pytest.raises(kernels("errors").BenchmarkError, match="building failed: .*error: no such thing; log: "):
        build._run(("sh", "-c", "echo a.cu: error: no such thing; exit 2"), log)


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """Every part on the CPU: build, check, tables, files; and one launch as a profiler would see it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH), "--dry-run"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (numbers,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-dry-run-kernels.json"))
    states = {name: part["status"] for name, part in numbers["parts"].items()}
    assert states == {
        "check": "passed",
        "sanitizer": "not run",
        "speed": "measured",
        "step": "measured",
        "blocks": "measured",
    }
    assert numbers["dry_run"] is True
    checked = numbers["parts"]["check"]["data"]["groups"]
    assert sum(group["cases"] for group in checked) > 150
    rows = numbers["parts"]["speed"]["data"]["rows"]
    assert [sorted(row["times"]) for row in rows] == [
        ["compile", "copy", "eager", "flex", "kernel", "no bias"],
        ["compile", "copy", "eager", "kernel", "no bias"],
        ["compile", "copy", "eager", "kernel", "no bias"],
    ]
    assert all(row["plan"]["threads"] == 128 for row in rows)
    assert len(list(tmp_path.glob("*-dry-run-kernels.png"))) == 1
    (report,) = (path.read_text() for path in tmp_path.glob("*-dry-run-kernels.md"))
    assert "meaningless" in report
    assert "| temporal-tiny-S3-T18 |" in report
    assert "meaningless" in done.stdout
    once = subprocess.run(
        [*command, "--one-launch", rows[0]["name"]], env=environment, capture_output=True, text=True, timeout=300
    )
    assert once.stdout.startswith("launched temporal-tiny-S3-T18 once")
    unknown = subprocess.run(
        [*command, "--one-launch", "none"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: --one-launch: no case named none")
