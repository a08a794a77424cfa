"""``stiv export-epcontext``: a bundle with engines in, models for other ONNX Runtime applications out."""

from pathlib import Path
from typing import Annotated

import typer

PROVIDER_HELP = (
    "Name by which the application has its provider; 'any' names none. [default: NvTensorRTRTXExecutionProvider]"
)


def export_epcontext(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder with engines of 'stiv build'.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the models; a new one.")],
    sm: Annotated[
        str | None, typer.Option(help="Engines for this GPU, where the bundle has several: 89, 120, 'portable'.")
    ] = None,
    provider: Annotated[str | None, typer.Option(help=PROVIDER_HELP)] = None,
    embed: Annotated[bool, typer.Option("--embed", help="Engines in the models, not beside them.")] = False,
) -> None:
    """Write a bundle's TensorRT-RTX engines as EPContext models, which any ONNX Runtime with that provider loads.

    graphs.json in the folder says in what order they run.

    stiv export-epcontext bundle --out models
    """
    from stiv_deploy.export.engines.cli import sm_name
    from stiv_deploy.export.engines.epcontext import PROVIDER, EpContextRequest
    from stiv_deploy.export.engines.epcontext import export_epcontext as written

    target = None if sm is None else sm_name(sm)
    report = written(EpContextRequest(bundle=bundle, out=out, sm=target, provider=provider or PROVIDER, embed=embed))
    typer.echo(f"wrote {report.out}: {len(report.models)} models for SM {report.sm}; their order is in graphs.json")
    if report.unreached:
        names = ",".join(report.unreached)
        typer.echo(f"note: for sizes of {names} build engines of their own: --bucket NAME, one at a time", err=True)
