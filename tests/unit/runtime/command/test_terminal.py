"""What commands have alike: the progress bar, tables, --json; the reference has bar and --json of its own."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer
from rich.console import Console

from stiv_deploy.runtime.command import terminal
from stiv_deploy.runtime.command.group import app
from stiv_deploy.runtime.command.terminal import Command, JsonTarget
from stiv_deploy.stiv_ref.commands import terminal as reference_terminal

both = pytest.mark.parametrize("module", [terminal, reference_terminal], ids=["runtime", "stiv_ref"])
Parse = Callable[..., tuple[Path | None, Path | None]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error counts as a terminal of 80 columns."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")


@both
@pytest.mark.usefixtures("shown")
def test_a_bar_tells_stage_count_and_what_on_standard_error(
    module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with module.progress_bar("export") as progress:
        progress("[block_00]", 3, 9)
        progress("[block_01]", 4, 9)
    out, err = capsys.readouterr()
    assert out == ""
    assert "export" in err
    assert "4/9" in err
    assert "[block_01]" in err, "square brackets are no markup"


@both
@pytest.mark.usefixtures("shown")
def test_a_bar_appears_with_the_first_news_only(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="first check"), module.progress_bar("export"):
        raise ValueError("first check")
    assert capsys.readouterr() == ("", "")


@both
@pytest.mark.usefixtures("shown")
def test_other_work_begins_anew(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with module.progress_bar("calibrate") as progress:
        progress("sampling", 8, 8)
        progress("sweeping", 1, 37)
    assert "1/37" in capsys.readouterr().err


@both
@pytest.mark.parametrize("quiet", [False, True])
def test_no_bar_in_a_short_run_without_a_terminal_or_if_quiet(
    module: ModuleType,
    quiet: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if quiet:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with module.progress_bar("export", quiet=quiet) as progress:
        progress("block_00", 3, 9)
    assert capsys.readouterr() == ("", "")


@both
def test_a_long_run_without_a_terminal_writes_lines_ever_fewer(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(100, 400))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(sys.modules[module.Lines.__module__], "FIRST_LINE", 10.0)
    with module.progress_bar("parity") as progress:
        for second in range(200):
            progress("block_00" if second < 50 else "", second, 300)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "parity 10/300 after 10 s block_00",
        "parity 30/300 after 30 s block_00",
        "parity 70/300 after 70 s",
        "parity 130/300 after 130 s",
        "parity 190/300 after 190 s",
    ]


@both
def test_a_quiet_run_writes_nothing_however_long(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(100, 400))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(sys.modules[module.Lines.__module__], "FIRST_LINE", 10.0)
    with module.progress_bar("parity", quiet=True) as progress:
        for second in range(200):
            progress("", second, 300)
    assert capsys.readouterr() == ("", "")


def test_tables_take_square_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    made = terminal.table("Tensors", ("name", "MiB"), [("x [red]", "7.5"), ("long name", "12.25")], numbers=("MiB",))
    Console(width=60).print(made)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "Tensors" in lines[0]
    rows = [line for line in lines if "7.5" in line or "12.25" in line]
    assert "x [red]" in rows[0]
    assert len(rows[0]) == len(rows[1]), "numbers end in one column"


@both
def test_a_report_is_text_json_or_both(module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(target: Path | None) -> str:
        module.answer(target, lambda: json.dumps({"passed": True}), lambda: typer.echo("text"))
        return capsys.readouterr().out

    assert answer(None) == "text\n"
    assert json.loads(answer(Path("-"))) == {"passed": True}
    assert answer(tmp_path / "report.json") == "text\n"
    assert json.loads((tmp_path / "report.json").read_text()) == {"passed": True}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@both
def test_a_target_that_cannot_be_written_after_all_is_one_line(module: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Exception, match="cannot be written .*; choose another --json") as caught:
        module.answer(tmp_path / "file" / "report.json", lambda: "{}", pytest.fail)
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]


@both
def test_a_target_that_cannot_be_a_file_is_one_line(module: ModuleType, tmp_path: Path) -> None:
    for target in (None, Path("-"), tmp_path / "new.json"):
        module.check_json(target)
    for target in (tmp_path, tmp_path / "absent" / "report.json", Path("/dev/null")):
        with pytest.raises(Exception, match="cannot be written") as caught:
            module.check_json(target)
        assert caught.value.exit_code == 2  # type: ignore[attr-defined]


@pytest.fixture
def parse() -> Parse:
    """Parses arguments of a command with ``--json``, an option, and an argument that it needs (or not)."""

    def call(*words: str, needs: bool = True) -> tuple[Path | None, Path | None]:
        found: list[tuple[Path | None, Path | None]] = []

        def with_bundle(bundle: Annotated[Path, typer.Argument()], steps: int = 1, json: JsonTarget = None) -> None:
            found.append((bundle, json))

        def alone(steps: int = 1, json: JsonTarget = None) -> None:
            found.append((None, json))

        app = typer.Typer(add_completion=False)
        app.command(cls=Command)(with_bundle if needs else alone)
        typer.main.get_command(app).main([*words], standalone_mode=False)
        return found[0]

    return call


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["bundle"], None),
        (["bundle", "--json"], "-"),
        (["--json", "bundle"], "-"),
        (["--json", "--steps", "2", "bundle"], "-"),
        (["bundle", "--json", "--steps", "2"], "-"),
        (["bundle", "--json", "-"], "-"),
        (["bundle", "--json", "report"], "report"),
        (["--json", "report", "bundle"], "report"),
        (["--steps", "2", "--json", "report", "bundle"], "report"),
        (["bundle", "--json=report"], "report"),
        (["--json=report", "bundle"], "report"),
    ],
)
def test_json_stands_alone_or_names_a_file(parse: Parse, words: list[str], target: str | None) -> None:
    assert parse(*words) == (Path("bundle"), None if target is None else Path(target))


def test_json_of_a_command_without_arguments(parse: Parse) -> None:
    assert parse("--json", needs=False) == (None, Path("-"))
    assert parse("--json", "report", needs=False) == (None, Path("report"))


def test_faults_beside_json_are_those_of_the_command(parse: Parse) -> None:
    with pytest.raises(Exception, match="No such option: --stops"):
        parse("--json", "bundle", "--stops", "2")
    with pytest.raises(Exception, match="(?i)missing"):
        parse("--json")


def test_json_is_one_option_in_all_commands() -> None:
    """Alone or with a file, whatever the command; what else the commands take is their own."""
    group = typer.main.get_command(app)
    commands = [group.get_command(None, name) for name in group.list_commands(None)]
    found = {
        command.name: (parameter.metavar, parameter.help, parameter.is_flag, parameter.default)
        for command in commands
        for parameter in command.params
        if "--json" in parameter.opts
    }
    assert found.keys() >= {"inspect", "doctor", "audit", "export", "build"}
    assert len(set(found.values())) == 1
