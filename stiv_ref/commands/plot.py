"""The ``stiv plot`` command."""

from pathlib import Path
from typing import Annotated

import typer


def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run, with its log.jsonl.")],
    out: Annotated[Path | None, typer.Option(help="PNG file to write.", show_default="RUN/training.png")] = None,
) -> None:
    """Draw the curves of a training run, running or finished: loss, loss by timestep, gradient norm, rates.

    Where the run has drawn contact sheets, samples/index.png shows them over time; it is drawn again, too.

    stiv plot runs/tiny
    """
    from stiv_deploy.stiv_ref.errors import StivRefError
    from stiv_deploy.stiv_ref.plots import plot_training
    from stiv_deploy.stiv_ref.training.pictures import draw_index

    picture = out or run / "training.png"
    if not picture.parent.is_dir():
        raise StivRefError(f"{picture}: its folder does not exist; make it or choose another --out")
    plot_training(run, picture)
    typer.echo(f"curves   {picture}")
    if sheets := draw_index(run):
        typer.echo(f"samples  {sheets}")
