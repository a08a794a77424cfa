"""The memory measurement, on commands whose memory is known, and the limits."""

import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

ALLOCATE = "import time; data = bytearray({mib} * 2**20); time.sleep(0.4)"


@pytest.fixture
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("big_blocks")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.alone
def test_peak_memory_counts_children(script: ModuleType) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATE.format(mib=160)!r}])"
    small = script.run_stage("small", python(ALLOCATE.format(mib=0)))
    large = script.run_stage("large", python(child))
    assert 0.15 < large.peak_gib < small.peak_gib + 0.4
    assert small.peak_gib < 0.1
    assert 0.4 <= large.seconds < 10


def test_a_failed_stage_says_why(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="export failed: error: no such file"):
        script.run_stage("export", python("import sys; print('ok'); sys.exit('error: no such file')"))
    with pytest.raises(SystemExit, match="build failed: no output"):
        script.run_stage("build", python("raise SystemExit(3)"))


def test_commands_exist_with_their_options(script: ModuleType, tmp_path: Path) -> None:
    """Every option that a stage gives is one that the command has."""
    commands = script.stage_commands(tmp_path, "fp8", 4, 64, "89", check=False)
    assert list(commands) == ["calibrate", "export", "build"]
    for command in commands.values():
        options = {str(part) for part in command if str(part).startswith("--")}
        known = known_options(str(command[0]))
        assert options <= known, command


def test_command_is_whole(script: ModuleType) -> None:
    found = script.command_line(["M"], ["fp8"], 20, 256, "89", True)
    assert found == "python benchmarks/big_blocks.py --model M --precision fp8 --frames 20 --size 256 --sm 89 --check"


def known_options(command: str) -> set[str]:
    (entry,) = importlib.metadata.entry_points(group="stiv_deploy.commands", name=command)
    names = set(inspect.signature(entry.load()).parameters)
    return {f"--{name.replace('_', '-')}" for name in names}


def result_of(memory: float, file: float) -> dict[str, Any]:
    stages = [{"name": name, "seconds": 3.0, "peak_gib": memory} for name in ("calibrate", "export", "build")]
    row = {
        "stages": stages,
        "largest_file": "onnx/embed.onnx.data",
        "largest_file_gib": file,
        "block_weights_mib": 90.0,
        "block_plan_mib": 31.0,
        "block_build_seconds": 1.5,
    }
    return {"models": {"M": {"fp8": row}}}


@pytest.mark.parametrize(
    ("memory", "file", "words"),
    [(7.9, 1.9, []), (8.0, 1.9, ["8.0 GiB of memory"] * 3), (1.0, 2.0, ["onnx/embed.onnx.data has 2.0 GiB"])],
)
def test_limits(script: ModuleType, memory: float, file: float, words: list[str]) -> None:
    found = script.faults(result_of(memory, file))
    assert len(found) == len(words)
    assert all(word in fault for word, fault in zip(words, found, strict=True))


def test_table(script: ModuleType) -> None:
    head, _, row = script.table(result_of(1.0, 0.1)).splitlines()
    assert head.count("|") == row.count("|")
    assert row == "| M | fp8 | 3 s, 1.0 GiB | 3 s, 1.0 GiB | 3 s, 1.0 GiB | 90 MiB, 31 MiB | 1.5 s |"


def test_exit_1_beyond_a_limit(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = result_of(9.0, 0.1)["models"]["M"]["fp8"]
    monkeypatch.setattr(script, "prepare", lambda *arguments: None)
    monkeypatch.setattr(script, "measure", lambda *arguments: row)
    app = typer.Typer()
    app.command()(script.main)
    out = tmp_path / "result.json"
    result = CliRunner().invoke(app, ["--model", "M", "--precision", "fp8", "--out", str(out)])
    assert result.exit_code == 1, result.output
    assert "M fp8 export: 9.0 GiB" in result.output
    assert "M fp8 export: 9.0 GiB" in out.read_text(encoding="utf-8")
