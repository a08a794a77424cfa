"""The group of commands behind ``stiv``: found by entry points, and only the one that runs is imported."""

import errno
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperGroup

from stiv_deploy.runtime.command.description import description
from stiv_deploy.runtime.command.terminal import Command, reflowed
from stiv_deploy.runtime.errors import one_line, raise_interrupt

GROUP = "stiv_deploy.commands"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors of writing that are never a fault of ours, wherever they come from."""
LINE = 480
"""Most characters of an error."""
OURS = "Value error, "
"""What Typer, too, writes in front of some words."""
REFUSED = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EIO}
"""Errors of a file that is named, which nobody nearer has said better."""
LISTING = "stiv_deploy.listing"
"""Key of a context that asks for names and words of commands only."""
WORKFLOW = (
    *("data", "train", "plot", "consolidate", "calibrate", "export", "build", "audit", "parity", "verify"),
    *("tune", "bench", "generate", "extend", "interpolate", "long", "views", "serve", "export-triton"),
    *("export-epcontext", "inspect", "doctor", "demo"),
)

HELP = """STIV video diffusion: train it, export it, compile it, check it, run it.

[bold]The way from a recipe to a video[/bold]

[dim]1. a checkpoint, from a training recipe[/dim]
[cyan]stiv train recipes/tiny.toml --out runs/tiny[/cyan]

[dim]2. a bundle: the ONNX graphs, manifest and tokenizer that the runtime needs, no torch[/dim]
[cyan]stiv export checkpoints/world --out bundle[/cyan]

[dim]3. engines for a GPU, compiled ahead of time (optional; ONNX Runtime needs none)[/dim]
[cyan]stiv build bundle --backend tensorrt-rtx --sm 89[/cyan]

[dim]4. proof that what runs is what was trained[/dim]
[cyan]stiv parity bundle --json parity.json[/cyan]

[dim]5. a video from text, or from text and a first frame[/dim]
[cyan]stiv generate bundle --prompt "a red star moving left" --out star.mp4[/cyan]
[cyan]stiv generate bundle --prompt "a big blue ring moving right" --out frames[/cyan]
[cyan]stiv generate bundle --prompt "a big blue ring moving down" --image frames/frame_007.png --out ring.gif[/cyan]

'stiv COMMAND --help' explains one command, 'stiv doctor' what works on this machine.
"""


@cache
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
    for command in group.commands.values():
        command.help = reflowed(command.help or "")
    return group


class Commands(TyperGroup):
    """A group whose commands are entry points, functions or Typer apps, loaded when asked for.

    The list of all of them, which ``stiv --help`` shows, is read off their sources.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the help, without importing what it lists."""
        ctx.meta[LISTING] = True
        super().format_help(ctx, formatter)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the workflow."""
        return list(_commands())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the command ``cmd_name``; None if there is no such one."""
        point = _commands().get(cmd_name)
        if point is None:
            return None
        if ctx is not None and ctx.meta.get(LISTING):
            words = description(point)
            if words is not None:
                return Command(cmd_name, help=words)
        try:
            loaded = point.load()
        except ImportError as error:
            raise_interrupt(error)
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


def _message(error: Exception) -> str:
    """One line for an error that the user caused."""
    formatted = getattr(error, "format_message", None)  # Typer's usage errors say more there than in str()
    context = getattr(error, "ctx", None)
    more = f" (see '{context.command_path} --help')" if context else ""
    text = (formatted() if formatted else str(error)).replace(OURS, "")
    return one_line(text, LINE - len(more)) + more


def run(arguments: list[str]) -> Any:
    """Run ``stiv`` with ``arguments``; the exit code that a command asked for, or what it returned."""
    return typer.main.get_command(app).main(arguments or ["--help"], prog_name="stiv", standalone_mode=False)


def _remedy(error: Exception) -> str | None:
    """What to say of an error that is the machine's: a library that is missing, a disk that is full."""
    if isinstance(error, ModuleNotFoundError):
        return _needs(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"{error.filename or 'the output'}: cannot be written ({error.strerror}); make room, or choose another"
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename:
        return f"{error.filename}: cannot be used ({error.strerror}); choose another"
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({error or 'allocation refused'}); ask for less at once"
    return None


def told(error: Exception) -> int:
    """Say in one line what the user did wrong, and return the exit code; a fault of ours is raised again."""
    code = getattr(error, "exit_code", None)
    remedy = _remedy(error)
    if not isinstance(code, int) and remedy is None:
        raise error
    sys.stderr.write(f"error: {one_line(remedy, LINE) if remedy else _message(error)}\n")
    return code if isinstance(code, int) else 2
