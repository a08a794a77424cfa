"""``stiv export-triton``: a bundle in, a model repository of Triton out."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export_triton(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, made by 'stiv export'.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Model repository: a folder, new or with other models.")],
    name: Annotated[str, typer.Option(help="Name of the model in it; one of that name is replaced.")] = "stiv",
    kind: Annotated[Literal["auto", "cpu", "gpu"], typer.Option(help="Where it runs; auto: on GPUs if any.")] = "auto",
    instances: Annotated[int, typer.Option(min=1, max=64, help="Instances on the CPU, or on each GPU.")] = 1,
    backend: Annotated[str | None, typer.Option(help="Backend ('stiv doctor' lists them); default: the best.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of an instance; default: all cores.")] = None,
    packages: Annotated[
        Path | None, typer.Option(help="Folder site-packages that has this package, if not that of Triton's Python.")
    ] = None,
) -> None:
    """Write a bundle as a model repository of NVIDIA's Triton Inference Server.

    Triton runs it with its Python backend, whose Python must have this package installed, or find it in --packages.

    stiv export-triton bundle --out models
    """
    from stiv_deploy.runtime.backends import BACKENDS
    from stiv_deploy.serving.errors import ServeError
    from stiv_deploy.serving.triton.model import BACKEND, THREADS
    from stiv_deploy.serving.triton.repository import config_text, model_text, write_repository

    if backend is not None and backend not in BACKENDS:
        raise ServeError(f"--backend {backend}: there are {', '.join(BACKENDS)}")
    given = {BACKEND: backend, THREADS: threads}
    parameters = {key: str(value) for key, value in given.items() if value is not None}
    if packages is not None and not packages.is_dir():
        raise ServeError(f"--packages {packages}: no such folder; want the site-packages of an environment")
    found = None if packages is None else packages.absolute()
    place = write_repository(bundle, out, name, config_text(name, instances, kind, parameters), model_text(found))
    typer.echo(f"wrote {place}; serve it by: tritonserver --model-repository {out}")
