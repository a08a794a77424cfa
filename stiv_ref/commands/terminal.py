"""What the commands of reference and calibration have alike: a progress bar on stderr, and ``--json``.

The runtime's commands have the same, in ``runtime/command/terminal.py``, with the rule when ``--json`` stands alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from stiv_deploy.stiv_ref.errors import StivRefError
from stiv_deploy.stiv_ref.files import refuse_bundle, refuse_device, told, write_text
from stiv_deploy.stiv_ref.progress import Lines, Progress, unheard

STDOUT = Path("-")
JsonTarget = Annotated[
    Path | None, typer.Option("--json", metavar="[FILE]", help="Print JSON; with FILE write it there, beside the text.")
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


def check_json(target: Path | None) -> None:
    """:class:`StivRefError` if ``--json`` names what cannot become a file, or a place in a bundle."""
    if target is None or target == STDOUT:
        return
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise StivRefError(f"{target}: cannot be written; name a file in a folder that exists")
    with told(target, "name a file"):
        refuse_device(target)
        refuse_bundle(target)


def answer(target: Path | None, report: Callable[[], str], show: Callable[[], None]) -> None:
    """``show`` the report as text, or print it as JSON where ``--json`` stands alone; write it if that names a file."""
    if target == STDOUT:
        typer.echo(report())
        return
    if target is not None:
        try:
            write_text(target, report() + "\n")
        except OSError as error:
            raise StivRefError(f"{target}: cannot be written ({error.strerror}); choose another --json") from None
    show()
