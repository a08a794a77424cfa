"""What a block's engine loses when weights are its inputs: kernels, bytes, and the types of its products.

    python benchmarks/shared_plan.py out/float32 out/float16 out/bfloat16 --precision fp8 --precision int8 --json FILE

Of each bundle the first block is built by TensorRT-RTX with its weights in the plan and as inputs. Of each
``--precision`` a block of random weights is built in three ways: as it is, with weights but not scales as inputs, and
with both, which is what one plan for several blocks needs. Nothing is kept.
"""

import json
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import onnx
import typer
from big_build import bucket_of, hollow_checkpoint, write_bundle

from stiv_deploy.export.audit.audit import kernel_count
from stiv_deploy.export.audit.layer_report import read_report
from stiv_deploy.export.engines.engine_from_onnx import build_engine
from stiv_deploy.export.engines.job import EngineJob
from stiv_deploy.export.engines.weight_inputs import with_inputs
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.engine_files import graph_profile
from stiv_deploy.runtime.tensorrt_library import import_tensorrt

GRAPH = "block_00"
MIB = 2**20
MODEL, FRAMES, SIZE = "tiny", 4, 64
"""Of the block of random weights: what fuses follows from types, not from values."""
WAYS: dict[str, Callable[[str], bool]] = {
    "in the plan": lambda name: False,
    "inputs but scales": lambda name: not name.endswith("_scale"),
    "inputs": lambda name: True,
}
"""Which weights, by their names, are inputs."""


def rows_of(bundle: Bundle, title: str, ways: list[str], sms: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each way and GPU: kernels, MiB of the plan, and how many products there are of which types."""
    for sm in sms:
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                row = {"bundle": title, "sm": sm, "weights": way, **built(bundle, Path(folder), WAYS[way], sm)}
            typer.echo(
                f"{title}, SM {sm}, {way}: {row['kernels']} kernels, {row['mib']} MiB, {row['products']}", err=True
            )
            yield row


def built(bundle: Bundle, folder: Path, is_input: Callable[[str], bool], sm: str) -> dict[str, Any]:
    """The engine of one block, some of its weights being inputs."""
    path = bundle.graph_file(GRAPH)
    for name in (path.name, f"{path.name}.data"):
        (folder / name).symlink_to(path.with_name(name).absolute())
    model = onnx.load(path, load_external_data=False)
    weights = {each.name: each for each in model.graph.initializer if each.external_data and is_input(each.name)}
    inputs = with_inputs(model, weights)
    (folder / "changed.onnx").write_bytes(inputs.model)
    manifest = bundle.manifest
    result = build_engine(
        EngineJob(
            graph=GRAPH,
            onnx=str(folder / "changed.onnx"),
            plan=str(folder / "plan"),
            backend="tensorrt-rtx",
            sm=sm,
            profiles=tuple(graph_profile(manifest, GRAPH, each) | inputs.profile for each in manifest.buckets),
            report=str(folder / "report.txt"),
        )
    )
    layers = read_report(folder / "report.txt")
    products = Counter(layer.operands for layer in layers if any(node.endswith("MatMul") for node in layer.nodes))
    return {"kernels": kernel_count(layers), "mib": round(result.bytes / MIB, 2), "products": dict(products)}


def table(rows: list[dict[str, Any]]) -> str:
    """The result as a Markdown table."""
    lines = ["| bundle | SM | weights | kernels | MiB | products |", "|---|---|---|---|---|---|"]
    for row in rows:
        products = ", ".join(f"{count} {operands}" for operands, count in row["products"].items())
        cells = (row["bundle"], row["sm"], row["weights"], row["kernels"], row["mib"], products)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(
    bundles: Annotated[list[Path] | None, typer.Argument(help="Float bundles.", show_default=False)] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp8 or int8, of random weights; repeatable.")] = None,
    sm: Annotated[list[str] | None, typer.Option(help="GPUs; repeatable.", show_default="89, 120")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Compare engines of a block with weights in the plan and as inputs."""
    sms, rows = sm or ["89", "120"], []
    for folder in bundles or []:
        bundle = Bundle.open(folder)
        rows += rows_of(bundle, bundle.manifest.precision, ["in the plan", "inputs"], sms)
    checkpoint = hollow_checkpoint(MODEL, 1, FRAMES, SIZE)
    for name in precision or []:
        with tempfile.TemporaryDirectory() as place:
            made = Bundle.open(write_bundle(Path(place) / "bundle", checkpoint, name, bucket_of(FRAMES, SIZE)))
            rows += rows_of(made, f"{name}, {MODEL}", list(WAYS), sms)
    typer.echo(table(rows))
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "versions": {"tensorrt-rtx": import_tensorrt("tensorrt-rtx").__version__},
        "rows": rows,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from command import run

    run(main)
