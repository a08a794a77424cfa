"""The commands ``stiv train`` and ``stiv consolidate``."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stiv_deploy.stiv_ref.commands.terminal import progress_bar

if TYPE_CHECKING:
    from stiv_deploy.stiv_ref.progress import Progress
    from stiv_deploy.stiv_ref.recipe import Recipe

HEAD_START = 20.0
"""Seconds that the first process has to tell of a fault before another one does; torchrun ends the others then."""


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file that says what is trained on what.")],
    out: Annotated[Path | None, typer.Option(help="Folder of this run.", show_default="runs/<recipe name>")] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Rehearse: at most so many steps in every stage.", show_default="the recipe's"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a STIV model by a recipe, for example recipes/tiny.toml.

    Stop it with Ctrl-C and give the same command again to go on from where it was: the result is the same. Writes
    checkpoint/ (for 'stiv export'), stages/ with the checkpoint of every stage, log.jsonl with every step, its curves
    in training.png, and contact sheets in samples/: one of the result, and as many before as the recipe asks for. A
    recipe with [lora] trains lora.safetensors besides, for 'stiv export --lora'; its checkpoint/ has that merged.

    On several GPUs, or processes: torchrun --nproc-per-node 8 --no-python stiv train RECIPE shards the model over them
    (FSDP2). A run may go on with another number of processes than it began with.

    stiv train recipes/tiny.toml --out runs/tiny
    """
    with _first_speaks():
        from stiv_deploy.stiv_ref.recipe import load_recipe

        checked = load_recipe(recipe)
        if max_steps is not None:
            checked = checked.rehearsal(max_steps)
        folder = out or Path("runs") / checked.name
        _train(checked, folder, quiet)


def consolidate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, also of one that is still training.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    half: Annotated[bool, typer.Option("--half", help="Store fp16 instead of fp32 weights.")] = False,
) -> None:
    """Turn the last saved state of a training run into a checkpoint: its averaged weights, in single files.

    One process reads what any number of processes wrote; needs no GPU.

    stiv consolidate runs/tiny --out checkpoint
    """
    import torch

    from stiv_deploy.stiv_ref.training.consolidate import consolidate_run

    position = consolidate_run(run, out, torch.float16 if half else torch.float32)
    typer.echo(f"checkpoint  {out} (stage {position.stage}, step {position.step})")


def _train(recipe: "Recipe", folder: Path, quiet: bool) -> None:
    from stiv_deploy.stiv_ref.training import trainer
    from stiv_deploy.stiv_ref.training.state import find_state

    first = _rank() == 0
    state = find_state(folder) if first else None
    try:
        with progress_bar("train", quiet or not first) as progress:
            heard = _announced(f"going on from {state}", progress) if state else progress
            report = trainer.train(trainer.TrainRequest(recipe=recipe, out=folder), heard)
    except KeyboardInterrupt:
        if first and (state := find_state(folder)):
            typer.echo(f"stopped; the same command goes on from {state}", err=True)
        raise
    if first:
        _show(report.checkpoint, folder, report.lora)


def _announced(line: str, progress: "Progress") -> "Progress":
    """``progress``, with ``line`` before its first news: all checks have passed by then."""
    left = [line]

    def heard(what: str, done: int, total: int) -> None:
        if left:
            typer.echo(left.pop(), err=True)
        progress(what, done, total)

    return heard


def _show(checkpoint: Path, folder: Path, lora: Path | None) -> None:
    from stiv_deploy.stiv_ref.files import told
    from stiv_deploy.stiv_ref.plots import plot_training

    curves = folder / "training.png"
    with told(curves, "'stiv plot' draws it again"):
        plot_training(folder, curves)
    if lora is not None:
        typer.echo(f"LoRA        {lora}")
    typer.echo(f"checkpoint  {checkpoint}\ncurves      {curves}\nsamples     {folder / 'samples'}")


def _rank() -> int:
    """The number of this process among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def _first_speaks() -> Iterator[None]:
    """Let the first process tell of a fault that all have; another one speaks if the first stays silent."""
    try:
        yield
    except Exception as error:
        if _rank() and isinstance(getattr(error, "exit_code", None), int):
            signal.signal(signal.SIGTERM, lambda *_: os._exit(2))  # the first one has spoken
            time.sleep(HEAD_START)
        raise
    except KeyboardInterrupt:
        if _rank():
            raise typer.Exit(130) from None
        raise
