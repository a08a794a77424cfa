"""A benchmark as a command: where its result goes is checked before anything is measured, exit codes are kept."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer

from stiv_deploy.runtime.errors import BundleError

ROOT = Path(__file__).parents[3]
Call = Callable[..., tuple[int, str]]
calls: list[str] = []


def to_file(out: Path | None = None, json: Path | None = None) -> None:
    calls.append(f"measured for {out} and {json}")


def to_folder(out: Annotated[Path, typer.Option(metavar="DIR")]) -> None:
    calls.append(f"measured for {out}")


def to_name(out: Annotated[Path, typer.Option(metavar="NAME")]) -> None:
    calls.append(f"measured for {out}")


def failing(kind: str) -> None:
    if kind == "gate":
        raise typer.Exit(1)
    raise BundleError("bundle: no such folder")


@pytest.fixture
def call(
    benchmark_module: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Call:
    """Run a command in a folder of its own, as a script would; its exit code and what it said on stderr."""
    run = benchmark_module("command").run
    monkeypatch.chdir(tmp_path)
    calls.clear()

    def use(main: Callable[..., None], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        with pytest.raises(SystemExit) as ended:
            run(main)
        return int(ended.value.code or 0), capsys.readouterr().err

    return use


@pytest.mark.parametrize(
    ("main", "arguments", "found"),
    [
        (to_file, ("--out", "none/a.json"), "the folder none does not exist; make it first"),
        (to_file, ("--json", "none/a.json"), "the folder none does not exist; make it first"),
        (to_file, ("--out", "."), "it is a folder"),
        (to_folder, ("--out", "file"), "cannot be written (File exists)"),
        (to_name, ("--out", "name"), "name.md: cannot be written, it is a folder"),
    ],
)
def test_a_place_that_takes_no_result_is_refused_before_the_measurement(
    call: Call, main: Callable[..., None], arguments: tuple[str, ...], found: str
) -> None:
    Path("file").touch()
    Path("name.md").mkdir()
    code, err = call(main, *arguments)
    assert (code, err.count("\n"), calls) == (2, 1, [])
    assert found in err


@pytest.mark.parametrize(
    ("main", "arguments"),
    [(to_file, ()), (to_file, ("--out", "a.json")), (to_folder, ("--out", "a/b")), (to_name, ("--out", "a"))],
)
def test_a_place_that_takes_it_is_measured_for(
    call: Call, main: Callable[..., None], arguments: tuple[str, ...]
) -> None:
    assert call(main, *arguments) == (0, "")
    assert len(calls) == 1


def test_exit_codes_are_kept_and_errors_are_one_line(call: Call) -> None:
    assert call(failing, "gate") == (1, "")
    assert call(failing, "bundle") == (2, "error: bundle: no such folder\n")
    assert call(failing)[0] == 2


def test_every_benchmark_is_such_a_command() -> None:
    scripts = [file for file in (ROOT / "benchmarks").rglob("*.py") if '__name__ == "__main__"' in file.read_text()]
    told = {
        file.name: file.read_text() for file in scripts if re.search(r"^def main\(", file.read_text(), re.MULTILINE)
    }
    assert len(told) > 15
    assert [name for name, text in told.items() if not re.search(r"\b(command\.)?run\(main\)", text)] == []
    assert [name for name, text in told.items() if "typer.run(" in text or "ArgumentParser" in text] == []
