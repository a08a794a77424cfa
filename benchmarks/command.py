"""A benchmark as a command: errors that a user can mend are one line on stderr and their exit code."""

import sys
from collections.abc import Callable

import typer

from stiv_deploy.runtime.errors import StivError
from stiv_deploy.stiv_ref.errors import StivRefError


def run(main: Callable[..., None]) -> None:
    """Run ``main`` with the arguments of this process."""
    app = typer.Typer(add_completion=False)
    app.command()(main)
    try:
        app(standalone_mode=False)
    except (StivRefError, StivError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
