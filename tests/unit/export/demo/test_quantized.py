"""The demo of a quantized bundle: its commands in order, what stops it, what only fails it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stiv_deploy.export.demo import quantized as demo_quantized
from stiv_deploy.export.demo.quantized import QuantizedDemo, quantized_demo
from stiv_deploy.export.errors import StageError

CHECKPOINT = Path("checkpoints/tiny")


class Commands:
    """Stands for the command line: keeps what was asked and answers with chosen exit codes."""

    def __init__(self, **codes: int) -> None:
        self.codes, self.asked = codes, []

    def __call__(self, words: list[str], check: bool) -> Any:
        assert words[1:3] == ["-m", "stiv_deploy.runtime.command.main"]
        self.asked.append(words[3:])
        return subprocess.CompletedProcess(words, self.codes.get(words[3], 0))

    @property
    def names(self) -> list[str]:
        return [words[0] for words in self.asked]


@pytest.fixture
def run(tmp_path: Path) -> QuantizedDemo:
    return QuantizedDemo(tmp_path, Console(quiet=True))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setattr(demo_quantized, "held_out_image", lambda _: np.zeros((32, 32, 3), dtype=np.uint8))
    monkeypatch.setattr(demo_quantized, "missing_library", lambda _: None)


def using(monkeypatch: pytest.MonkeyPatch, commands: Commands) -> Commands:
    monkeypatch.setattr(demo_quantized.subprocess, "run", commands)
    return commands


def test_commands_run_in_a_row_on_one_set_of_scales(run: QuantizedDemo, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = using(monkeypatch, Commands())
    written = quantized_demo(run, CHECKPOINT, "89", "fp8")
    assert commands.names == ["calibrate", "export", "build", "audit", "parity", *["generate"] * 4]
    scales = str(run.out / "scales.safetensors")
    assert all(scales in words for words in commands.asked[:2])
    targets = [words[words.index("--json") + 1] for words in commands.asked[3:5]]
    assert targets == [str(run.out / f"{name}.json") for name in ("audit", "parity")]
    assert commands.asked[4][commands.asked[4].index("--scales") + 1] == scales
    made = [words[words.index("--out") + 1] for words in commands.asked[5:]]
    assert [Path(path).name for path in made] == ["t2v.mp4", "t2v.png", "ti2v.mp4", "ti2v.png"]
    assert not run.failed
    text = written.read_text(encoding="utf-8")
    assert "all gates passed" in text
    assert text.count("| `stiv ") == len(commands.asked)


@pytest.mark.parametrize("gate", ["audit", "parity"])
def test_a_failed_gate_fails_the_demo_and_stops_nothing(
    run: QuantizedDemo, monkeypatch: pytest.MonkeyPatch, gate: str
) -> None:
    commands = using(monkeypatch, Commands(**{gate: 1}))
    written = quantized_demo(run, CHECKPOINT, "89", "int8")
    assert run.failed == [gate]
    assert commands.names[-1] == "generate"
    assert f"FAILED: {gate}" in written.read_text(encoding="utf-8")


@pytest.mark.parametrize(("command", "code"), [("export", 1), ("calibrate", 2), ("parity", 2), ("generate", 130)])
def test_anything_else_stops_it(run: QuantizedDemo, monkeypatch: pytest.MonkeyPatch, command: str, code: int) -> None:
    commands = using(monkeypatch, Commands(**{command: code}))
    with pytest.raises(StageError, match=f"'stiv {command}' ended with {code}") as caught:
        quantized_demo(run, CHECKPOINT, "89", "fp8")
    assert caught.value.exit_code == code
    assert commands.names[-1] == command


def test_without_the_builder_the_report_says_why(run: QuantizedDemo, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = using(monkeypatch, Commands())
    monkeypatch.setattr(demo_quantized, "missing_library", lambda _: "not installed")
    written = quantized_demo(run, CHECKPOINT, "89", "fp8")
    assert not {"build", "audit"} & set(commands.names)
    assert "No engines were built or audited: not installed." in written.read_text(encoding="utf-8")


def test_unknown_precision_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    from stiv_deploy.export.demo.demo import demo
    from stiv_deploy.export.errors import ExportError

    with pytest.raises(ExportError, match="--precision fp4: the demo has fp8 and int8"):
        demo(out=tmp_path / "out", precision="fp4")
    assert not (tmp_path / "out").exists()
