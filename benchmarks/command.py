"""A benchmark as a command: where its result goes is checked before anything is measured, and errors are one line.

``--out`` and ``--json`` name a file, or what the option's metavar says: a folder (``DIR``), or the common start of
several files (``NAME``).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from stiv_deploy.runtime.errors import StivError
from stiv_deploy.runtime.files import check_file, make_folder
from stiv_deploy.stiv_ref.errors import StivRefError

RESULTS = ("out", "json")
SUFFIXES = (".json", ".md", ".png")
"""Of the files that begin with a ``NAME``."""


class Measurement(TyperCommand):
    """A command that refuses a place that takes no results before it begins."""

    def invoke(self, ctx: Any) -> Any:
        """Check, then run."""
        for parameter in self.params:
            target = ctx.params.get(parameter.name)
            if parameter.name in RESULTS and isinstance(target, Path):
                check_place(target, str(parameter.metavar))
        return super().invoke(ctx)


def check_place(target: Path, kind: str) -> None:
    """:class:`~stiv_deploy.runtime.errors.OutputError` if ``target``, of that ``kind``, cannot be written."""
    if kind == "DIR":
        make_folder(target)
    elif kind == "NAME":
        for suffix in SUFFIXES:
            check_file(target.with_name(target.name + suffix))
    else:
        check_file(target)


def run(main: Callable[..., None]) -> None:
    """Run ``main`` with the arguments of this process; what a user can mend is one line on stderr and its exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Measurement)(main)
    try:
        app()
    except (StivRefError, StivError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
