"""The ``stiv train`` command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stiv_deploy.stiv_ref.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file that says what is trained on what.")],
    out: Annotated[Path | None, typer.Option(help="Folder of this run.", show_default="runs/<recipe name>")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a STIV model by a recipe, for example stiv_ref/configs/tiny.toml.

    Stop it with Ctrl-C and give the same command again to go on from where it was: the result is the same. Writes
    checkpoint/ (for 'stiv export'), loss.png and samples.png, and log.jsonl with every step.
    """
    from stiv_deploy.stiv_ref.recipe import load_recipe

    checked = load_recipe(recipe)
    folder = out or Path("runs") / checked.name
    _prepare(folder)

    from stiv_deploy.stiv_ref.train import train as run_training

    if (folder / "state.safetensors").exists():
        typer.echo(f"going on from {folder / 'state.safetensors'}", err=True)
    try:
        checkpoint = run_training(checked, folder, quiet=quiet)
    except KeyboardInterrupt:
        if (folder / "state.safetensors").exists():
            typer.echo(f"stopped; the same command goes on from {folder / 'state.safetensors'}", err=True)
        raise
    _draw(checked, folder)
    typer.echo(f"checkpoint  {checkpoint}\nloss curve  {folder / 'loss.png'}\nsamples     {folder / 'samples.png'}")


def _prepare(folder: Path) -> None:
    """Make the run's folder and prove that it can be written, before any training; one clear line if not."""
    from stiv_deploy.stiv_ref.errors import StivRefError

    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StivRefError(f"{folder}: cannot write the run there ({error.strerror}); choose another --out") from None


def _draw(recipe: "Recipe", folder: Path) -> None:
    """Draw ``loss.png`` and ``samples.png`` of a finished run."""
    from stiv_deploy.stiv_ref.checkpoint import load_checkpoint
    from stiv_deploy.stiv_ref.plots import contact_sheet, plot_loss
    from stiv_deploy.stiv_ref.samples import sample_rows

    plot_loss(folder / "log.jsonl", folder / "loss.png")
    taught = any(stage.task == "ti2v" for stage in recipe.stages)
    rows = sample_rows(load_checkpoint(folder / "checkpoint"), image_to_video=taught)
    contact_sheet(rows, folder / "samples.png", columns=2, heading=f"{recipe.name}: samples of the trained checkpoint")
