"""The ``stiv`` command: finds its subcommands by entry points and imports only the one that runs."""

import signal
import sys
from importlib.metadata import EntryPoint, entry_points, version
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperGroup

from stiv_deploy.runtime.command.terminal import Command

GROUP = "stiv_deploy.commands"
WORKFLOW = (
    *("data", "train", "plot", "consolidate", "calibrate", "export", "build", "audit", "parity", "generate"),
    *("inspect", "doctor", "demo"),
)
INTERRUPTED = 130

HELP = """STIV video diffusion: train it, export it, compile it, check it, run it.

[bold]The way from a recipe to a video[/bold]

[dim]1. a checkpoint, from a training recipe[/dim]
[cyan]stiv train recipes/tiny.toml --out runs/tiny[/cyan]

[dim]2. a bundle: the ONNX graphs, manifest and tokenizer that the runtime needs, no torch[/dim]
[cyan]stiv export checkpoints/tiny --out bundle[/cyan]

[dim]3. engines for a GPU, compiled ahead of time (optional; ONNX Runtime needs none)[/dim]
[cyan]stiv build bundle --backend tensorrt-rtx --sm 89[/cyan]

[dim]4. proof that what runs is what was trained[/dim]
[cyan]stiv parity bundle --json parity.json[/cyan]

[dim]5. a video from text, or from text and a first frame[/dim]
[cyan]stiv generate bundle --prompt "digit three moving left" --out three.mp4[/cyan]
[cyan]stiv generate bundle --prompt "digit three moving left" --image first.png --out three.gif[/cyan]

'stiv COMMAND --help' explains one command, 'stiv doctor' what works on this machine.
"""


def _commands() -> dict[str, EntryPoint]:
    """The registered subcommands, in the order of the workflow, others after them by name."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    order = [name for name in WORKFLOW if name in found] + sorted(name for name in found if name not in WORKFLOW)
    return {name: found[name] for name in order}


def _needs(error: ImportError) -> str | None:
    """What to install for a module that is missing; None if it is not one of our optional dependencies."""
    from stiv_deploy.runtime.command.doctor import DEPENDENCIES, installable

    missing = (error.name or "").partition(".")[0]
    found = next((each for each in DEPENDENCIES if missing and each.module.partition(".")[0] == missing), None)
    return None if found is None else f"{missing} is not installed; run: pip install '{installable(found)}'"


def _unavailable(name: str, error: ImportError) -> typer.Typer:
    """A command that stands for one whose module cannot be imported, and says what it needs."""
    app = typer.Typer(add_completion=False)
    reason = _needs(error) or str(error)

    @app.command(
        name,
        help=f"(not available: {escape(reason)})",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def unavailable() -> NoReturn:
        raise error

    return app


def _group(name: str, app: typer.Typer) -> Any:
    """The command ``name`` with subcommands of its own."""
    group = typer.main.get_group(app)
    group.name = name
    return group


class Commands(TyperGroup):
    """A group whose commands are entry points, functions or Typer apps, loaded when asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the workflow."""
        return list(_commands())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the command ``cmd_name``; None if there is no such one."""
        point = _commands().get(cmd_name)
        if point is None:
            return None
        try:
            loaded = point.load()
        except ImportError as error:
            return typer.main.get_command(_unavailable(cmd_name, error))
        if isinstance(loaded, typer.Typer):
            return _group(cmd_name, loaded)
        app = typer.Typer(add_completion=False)
        app.command(cmd_name, cls=Command)(loaded)
        return typer.main.get_command(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stiv-deploy {version('stiv-deploy')}")
        raise typer.Exit


app = typer.Typer(cls=Commands, help=HELP, add_completion=False, rich_markup_mode="rich")


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _message(error: Exception) -> str:
    """One line for an error that the user caused."""
    formatted = getattr(error, "format_message", None)  # Typer's usage errors say more there than in str()
    text = " ".join((formatted() if formatted else str(error)).split())
    context = getattr(error, "ctx", None)
    return f"{text} (see '{context.command_path} --help')" if context else text


def main() -> int:
    """Run ``stiv`` with the process's arguments and return its exit code.

    A user's error is one line and the error's ``exit_code`` (2 for usage), Ctrl-C and SIGTERM are 130; anything else is
    a fault of ours and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = typer.main.get_command(app).main(sys.argv[1:] or ["--help"], prog_name="stiv", standalone_mode=False)
    except KeyboardInterrupt:
        result = INTERRUPTED
    except Exception as error:
        code = getattr(error, "exit_code", None)
        needs = _needs(error) if isinstance(error, ModuleNotFoundError) else None
        if not isinstance(code, int) and needs is None:
            raise
        sys.stderr.write(f"error: {needs or _message(error)}\n")
        return code if isinstance(code, int) else 2
    if result == INTERRUPTED:
        sys.stderr.write("interrupted\n")
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
