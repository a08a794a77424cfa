"""The ``stiv`` command as a whole: its codes, its help, what it imports, and a full or a closed output."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest

from stiv_deploy.runtime.command import group as group_module
from stiv_deploy.runtime.command.main import main

Run = Callable[..., tuple[int, str, str]]


COMMANDS = """
import typer
from stiv_deploy.runtime.errors import Cancelled, OutputError

def refused() -> None:
    "Raises a user error of several lines."
    raise OutputError("first\\n  second")

def broken() -> None:
    "Has a fault."
    raise ZeroDivisionError("ours")

def interrupted() -> None:
    "Is stopped by Ctrl-C."
    raise KeyboardInterrupt

def cancelled() -> None:
    "Is cancelled."
    raise Cancelled("stopped after step 3")

def failing() -> None:
    "Ends with its own code."
    raise typer.Exit(3)

def heavy() -> None:
    "Needs a library when it runs."
    raise ModuleNotFoundError("No module named 'torch'", name="torch")

several = typer.Typer(help="Has commands of its own.")

@several.command()
def first(number: int) -> None:
    "The first of them."
    typer.echo(f"first {number}")

@several.command()
def second() -> None:
    "The second, which refuses."
    raise OutputError("refused")

def quiet() -> None:
    "Prints, and flushes nothing."
    print("words")

def stopped() -> None:
    "Imports a module of C that Ctrl-C stops."
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as stop:
        raise ImportError("initialization failed") from stop

def buggy() -> None:
    "Imports a module that does not exist."
    import stiv_deploy.runtime.nonsense
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Register the commands above, and ``absent`` and ``damaged``, whose modules need what is missing."""
    (tmp_path / "test_only_commands.py").write_text(COMMANDS)
    (tmp_path / "test_only_absent.py").write_text("raise ModuleNotFoundError('No module named onnx', name='onnx')")
    (tmp_path / "test_only_imported.py").write_text("raise SystemError('imported by mistake')")
    monkeypatch.syspath_prepend(tmp_path)
    names = (
        "refused",
        "broken",
        "interrupted",
        "cancelled",
        "failing",
        "heavy",
        "buggy",
        "stopped",
        "quiet",
        "several",
    )
    values = {name: f"test_only_commands:{name}" for name in names} | {"absent": "test_only_absent:absent"}
    points = {name: EntryPoint(name, value, group_module.GROUP) for name, value in values.items()}
    monkeypatch.setattr(group_module, "_commands", lambda: points)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("refused", 2, "error: first second\n"),
        ("interrupted", 130, "interrupted\n"),
        ("stopped", 130, "interrupted\n"),
        ("cancelled", 130, "error: stopped after step 3\n"),
        ("failing", 3, ""),
        ("heavy", 2, "error: torch is not installed; run: pip install 'stiv-deploy[ref]'\n"),
        ("absent", 2, "error: onnx is not installed; run: pip install 'stiv-deploy[export]'\n"),
        ("nothing", 2, "error: No such command 'nothing'. (see 'stiv --help')\n"),
    ],
)
def test_exit_codes(run: Run, commands: Path, name: str, code: int, message: str) -> None:
    assert run(name) == (code, "", message)


@pytest.mark.parametrize(("name", "error"), [("broken", ZeroDivisionError), ("buggy", ModuleNotFoundError)])
def test_a_fault_of_ours_keeps_its_traceback(run: Run, commands: Path, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run(name)


def test_help_survives_a_command_that_cannot_be_imported(run: Run, commands: Path) -> None:
    code, out, _ = run("--help")
    words = " ".join(out.replace("│", " ").split())
    assert code == 0
    assert "absent" in words
    assert "(not available: onnx is not installed; run: pip install 'stiv-deploy[export]')" in words
    assert "Needs a library when it runs." in words


def test_a_command_may_have_commands_of_its_own(run: Run, commands: Path) -> None:
    assert run("several", "first", 3) == (0, "first 3\n", "")
    assert run("several", "second") == (2, "", "error: refused\n")
    assert run("several", "third") == (2, "", "error: No such command 'third'. (see 'stiv several --help')\n")
    assert run("several", "first") == (2, "", "error: Missing argument 'number'. (see 'stiv several first --help')\n")
    code, out, _ = run("several", "--help")
    assert code == 0
    assert all(words in out for words in ("stiv several", "The first of them.", "The second, which refuses."))
    words = " ".join(run("--help")[1].replace("│", " ").split())
    assert "several Has commands of its own." in words


def test_only_the_command_that_runs_is_imported(run: Run, commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = group_module._commands() | {"other": EntryPoint("other", "test_only_imported:other", group_module.GROUP)}
    monkeypatch.setattr(group_module, "_commands", lambda: points)
    assert run("failing")[0] == 3


def test_help_teaches_the_workflow(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    places = [out.index(f"stiv {name} ") for name in ("train", "export", "build", "parity", "generate")]
    assert places == sorted(places)
    assert all(name in out for name in ("inspect", "doctor", "--version"))
    assert run("--help")[1] == out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"stiv-deploy {version('stiv-deploy')}\n", "")


def test_usage_error_is_one_line(run: Run) -> None:
    code, out, err = run("generate", "bundle", "--colour", "red")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: No such option: --colour")
    assert err.endswith("(see 'stiv generate --help')\n")


def test_help_is_fast() -> None:
    """Neither a command nor a heavy library is imported for --help."""
    code = (
        "import sys; sys.argv = ['stiv', '--help']; from stiv_deploy.runtime.command.main import main; main();"
        "heavy = {'onnxruntime', 'torch', 'onnx', 'av', 'sklearn', 'pydantic', 'stiv_deploy.runtime.command.cli'};"
        "sys.exit(str(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize("command", [["--version"], ["--help"], ["quiet"]])
def test_a_standard_output_that_is_full_is_one_line(
    commands: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stiv", *command])
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "cannot be written (No space left on device)" in err


def test_a_reader_that_has_seen_enough_hears_no_complaint(
    commands: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stiv", "quiet"])
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main() == 1
    assert capsys.readouterr().err == ""
