"""What all commands have alike: a progress bar on stderr, tables, and ``--json``.

``--json`` alone prints JSON in place of tables; ``--json FILE`` writes it beside them. It stands alone where it is
last, before another option, or before what the command needs as an argument: ``stiv inspect --json bundle``.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from stiv_deploy.runtime.errors import OutputError, briefly
from stiv_deploy.runtime.files import check_apart, check_file, check_no_bundle, write_text
from stiv_deploy.runtime.progress import Lines, Progress, unheard

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table

JSON = "--json"
STDOUT = Path("-")
NAME_BYTES = 255
JsonTarget = Annotated[
    Path | None, typer.Option(JSON, metavar="[FILE]", help="Print JSON; with FILE write it there, beside the text.")
]
"""The option of a command that has its report as JSON too; see :func:`answer`."""


@contextmanager
def progress_bar(stage: str, quiet: bool = False) -> Iterator[Progress]:
    """A bar on stderr as the progress of ``stage``, lines where that is no terminal; nothing if ``quiet``.

    It appears with the first news, so that an error of the first checks stands alone, and begins again where the total
    changes or the count goes back: there other work begins.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield unheard if quiet else Lines(stage)
        return
    what = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    bar = Bar(TextColumn(stage), BarColumn(), MofNCompleteColumn(), *times, what, console=console, transient=True)
    task = bar.add_task("", total=None)

    def show(what: str, done: int, total: int) -> None:
        bar.start()
        if bar.tasks[task].total != total or done < bar.tasks[task].completed:
            bar.reset(task, total=total)
        bar.update(task, description=what, completed=done)

    try:
        yield show
    finally:
        bar.stop()


def table(
    title: str,
    columns: Iterable[str],
    rows: Iterable[Iterable[str]],
    numbers: Collection[str] = (),
    caption: str | None = None,
) -> "Table":
    """``rows`` of plain text (square brackets stay as they are) under ``columns``; ``numbers`` go to the right."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=title, title_justify="left", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left")
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def check_json(target: Path | None, *inputs: Path | None) -> None:
    """Raise :class:`~stiv_deploy.runtime.errors.OutputError` if ``--json`` names what cannot become a file.

    Nor may it replace one of ``inputs``, or lie in a bundle.
    """
    if target is None or target == STDOUT:
        return
    check_file(target, "name a file in a folder that exists")
    check_apart([target], inputs)
    check_no_bundle(target)


def json_text(report: "BaseModel", indent: int = 2) -> str:
    """``report`` as JSON; names of files that are not Unicode are written with escapes."""
    from pydantic_core import PydanticSerializationError

    try:
        return report.model_dump_json(indent=indent)
    except PydanticSerializationError:
        return json.dumps(report.model_dump(mode="json"), indent=indent)


def answer(target: Path | None, report: Callable[[], str], show: Callable[[], None]) -> None:
    """``show`` the report as text, or print it as JSON where ``--json`` stands alone; write it if that names a file."""
    if target == STDOUT:
        typer.echo(report())
        return
    if target is not None:
        write_text(target, report() + "\n", "choose another --json")
    show()


def check_name(path: Path) -> None:
    """:class:`OutputError` for a path that no file system takes."""
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > NAME_BYTES:
        raise OutputError(f"{path}: a name of {longest} bytes, file systems take {NAME_BYTES}; choose a shorter one")
    if "\0" in str(path):
        raise OutputError(f"{briefly(str(path))}: a name with a NUL in it, which no file has; choose another")


def reflowed(text: str) -> str:
    """A docstring's paragraphs as lines of their own, for a terminal of any width; those of commands as they are."""
    paragraphs = [each.splitlines() for each in cleandoc(text).split("\n\n")]
    return "\n\n".join(("\n" if lines[0].startswith("stiv ") else " ").join(lines) for lines in paragraphs if lines)


class Command(TyperCommand):
    """A command whose ``--json``, if it has one, may stand alone or name a file, and whose help fills the terminal."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.help = None if self.help is None else reflowed(self.help)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a ``--json`` that stands alone the value of standard output, then parse as always, and check names."""
        has_option = any(JSON in parameter.opts for parameter in self.params)
        if has_option and JSON in args and self._stands_alone(ctx, args):
            at = args.index(JSON)
            args = [*args[:at], f"{JSON}={STDOUT}", *args[at + 1 :]]
        rest = super().parse_args(ctx, args)
        for value in ctx.params.values():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path):
                    check_name(path)
        return rest

    def _stands_alone(self, ctx: Any, args: list[str]) -> bool:
        following = args[args.index(JSON) + 1 :]
        if not following or (following[0].startswith("-") and following[0] != str(STDOUT)):
            return True
        found, _, _ = self.make_parser(ctx).parse_args(args=[*args])
        needed = [each.name for each in self.params if each.param_type_name == "argument" and each.required]
        return any(not isinstance(found.get(name), str) for name in needed)
