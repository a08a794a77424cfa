"""What the list of commands says about each is what the command itself says."""

from importlib.metadata import EntryPoint
from inspect import cleandoc, getdoc
from pathlib import Path

import pytest
import typer

from stiv_deploy.runtime.command.description import description
from stiv_deploy.runtime.command.group import GROUP, _commands


def said(loaded: object) -> str | None:
    return typer.main.get_group(loaded).help if isinstance(loaded, typer.Typer) else getdoc(loaded)


@pytest.mark.parametrize("name", list(_commands()))
def test_a_command_is_described_by_its_own_words(name: str) -> None:
    point = _commands()[name]
    assert description(point) == cleandoc(said(point.load()) or "")


@pytest.mark.parametrize("source", ["", "def other() -> None: ...", "command = print(help=2)", "((", None])
def test_no_words_where_the_source_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None
) -> None:
    if source is not None:
        (tmp_path / "test_only_described.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("command", "test_only_described:command", GROUP)
    assert description(point) in (None, "")
