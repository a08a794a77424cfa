"""What a command is for, read off its source: the list of all commands imports none of them."""

import ast
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path


def description(point: EntryPoint) -> str | None:
    """Docstring of the function, or ``help`` of the Typer app, that ``point`` names; None if its source has neither."""
    try:
        spec = find_spec(point.module)
        body = ast.parse(Path((spec and spec.origin) or "").read_bytes()).body
        found = next((words for node in body for words in _words(node, point.attr)), None)
    except (OSError, ValueError, SyntaxError, ImportError):
        return None
    return None if found is None else cleandoc(found)


def _words(node: ast.stmt, name: str) -> Iterator[str]:
    """What ``node`` says about ``name``, if it defines that."""
    match node:
        case ast.FunctionDef(name=found) if found == name:
            yield ast.get_docstring(node) or ""
        case ast.Assign(targets=[ast.Name(id=found)], value=ast.Call(keywords=options)) if found == name:
            yield from (_text(option) for option in options if option.arg == "help")


def _text(option: ast.keyword) -> str:
    value = ast.literal_eval(option.value)  # ValueError if it is no literal
    if not isinstance(value, str):
        raise ValueError(f"a help is text, not {value!r}")
    return value
