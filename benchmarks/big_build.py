"""All engines of a whole large model on a small machine: time, peak memory, bytes with and without hard links.

    python benchmarks/big_build.py --model M --precision fp8 --json benchmarks/results/big-build-m-DATE.json
    python benchmarks/big_build.py --model XL --precision bfloat16 --shared-plan      # one plan for all blocks, too

The model exists one graph at a time: random weights are made, written and forgotten, so that memory never holds more
than one block, and text and VAE are small stand-ins. Then ``stiv build`` itself runs, on a plan cache of its own beside
the bundle, and once more, when all plans are there. Peak memory is the largest sum of resident sets over the command
and all its builders, sampled. Everything is deleted in the end. M in FP8 takes 17 GB of disk meanwhile. With
``--shared-plan`` the same bundle is built once more that way, on a plan cache of its own: a row of its own.
"""

import json
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

import psutil
import torch
import typer
from big_blocks import GIB, STIV, run_stage
from one_block import TOKENIZER, one_block_checkpoint
from torch import nn

from stiv_deploy.calibration.layers import model_layers
from stiv_deploy.calibration.plan import default_plan
from stiv_deploy.calibration.scales import Provenance, Scales, tensor_names
from stiv_deploy.export.bundle_from_checkpoint import sampling_defaults, tool_versions
from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.graphs.onnx_from_module import OPSET
from stiv_deploy.export.graphs.quantization import Quantization
from stiv_deploy.export.graphs.writer import GRAPH_FOLDER, GraphWriter
from stiv_deploy.runtime.bundle.bundle import file_record, write_manifest
from stiv_deploy.runtime.bundle.contract import Format, Precision
from stiv_deploy.runtime.bundle.manifest import Bucket, Manifest, Range
from stiv_deploy.runtime.tensorrt_library import import_tensorrt
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.config import StivConfig, model_config
from stiv_deploy.stiv_ref.model import Stiv

RANGE = 4.0
"""Of every quantized tensor: what fuses and how long it takes follows from types, not from values."""
SHARED_PLAN = "--shared-plan"
NOBODY = "0" * 64
"""In the place of a checkpoint's hash."""


def hollow_checkpoint(name: str, blocks: int | None, frames: int, size: int) -> Checkpoint:
    """The model called ``name``, of all its ``blocks`` or fewer, without values; text and VAE are small stand-ins."""
    small, config = one_block_checkpoint(name, frames, size), model_config(name)
    config = config.model_copy(update={"blocks": blocks or config.blocks})
    with torch.device("meta"):
        model = Stiv(config)
    return replace(
        small,
        config=small.config.model_copy(update={"model": config}),
        model=model.eval().requires_grad_(False),
    )


@contextmanager
def filled(module: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """``module`` with random values where it has none, until the end of the block."""
    hollow = [each for each in module.modules() if any(tensor.is_meta for tensor in own_tensors(each))]
    for each in hollow:
        each.to_empty(device="cpu", recurse=False)
        for tensor in own_tensors(each):
            tensor.uniform_(-0.05, 0.05, generator=generator)
    yield
    for each in hollow:
        each.to_empty(device="meta", recurse=False)


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of ``module`` itself."""
    found: Iterable[torch.Tensor] = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return [tensor for tensor in found if tensor.is_floating_point()]


def quantization_of(config: StivConfig, precision: Format) -> Quantization:
    """The usual plan of a model, all ranges equal."""
    names = [name for layer in model_layers(config) for name in tensor_names(layer)]
    provenance = Provenance(quantization=precision, checkpoint=NOBODY, model=config, recipe={}, prompts="", tools={})
    scales = Scales(provenance=provenance, amax={name: torch.tensor(RANGE) for name in names})
    return Quantization(scales=scales, plan=default_plan(config, precision), sha256=NOBODY)


def write_bundle(folder: Path, checkpoint: Checkpoint, precision: str, bucket: Bucket) -> Path:
    """The bundle of a checkpoint without values, every graph with values of its own; returns ``folder``."""
    (folder / GRAPH_FOLDER).mkdir(parents=True)
    eight_bit = precision in ("fp8", "int8")
    quantization = quantization_of(checkpoint.config.model, cast(Format, precision)) if eight_bit else None
    high = cast(Precision, "float16" if eight_bit else precision)
    writer = GraphWriter(checkpoint, folder / GRAPH_FOLDER, high, quantization, vae_precision="bfloat16")
    generator, graphs = torch.Generator().manual_seed(0), {}
    for name, module in writer.modules.items():
        with filled(module, generator):
            graphs[name] = writer.write(name)
    shutil.copyfile(TOKENIZER, folder / "tokenizer.json")
    manifest = Manifest(
        precision=high,
        opset=OPSET,
        model=writer.facts,
        sampling=sampling_defaults(checkpoint.config.sampling, (bucket,)),
        buckets=(bucket,),
        graphs=graphs,
        tokenizer=file_record(folder, "tokenizer.json"),
        checkpoint=NOBODY,
        quantization=None if quantization is None else quantization.record(),
        tools=tool_versions(),
    )
    write_manifest(folder, manifest)
    return folder


def bucket_of(frames: int, size: int) -> Bucket:
    """From a single frame and half of ``size`` to the whole, one clip at a time."""
    one, side = Range(min=1, typical=1, max=1), Range(min=size // 2, typical=size, max=size)
    return Bucket(name="default", batch=one, frames=Range(min=1, typical=frames, max=frames), height=side, width=side)


def disk_bytes(folders: Iterable[Path]) -> tuple[int, int]:
    """Bytes of the files in ``folders``, those of several names counted once, and as if each name were a file."""
    found = [path.stat() for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum({each.st_ino: each.st_size for each in found}.values()), sum(each.st_size for each in found)


def measure(
    folder: Path, precision: str, checkpoint: Checkpoint, bucket: Bucket, options: Sequence[str], *, shared: bool
) -> dict[str, dict[str, Any]]:
    """Rows of one precision: the usual build, and with ``shared`` that with one plan for all blocks."""
    bundle = write_bundle(folder / "bundle", checkpoint, precision, bucket)
    weights = disk_bytes([bundle])[0]
    typer.echo(f"{precision}: {weights / GIB:.2f} GiB of graphs are written", err=True)
    rows = {precision: build_row(bundle, folder / "cache", weights, options)}
    if shared:
        shutil.rmtree(bundle / "engines")
        shutil.rmtree(folder / "cache")
        rows[f"{precision}, {SHARED_PLAN}"] = build_row(bundle, folder / "cache", weights, [*options, SHARED_PLAN])
    return rows


def build_row(bundle: Path, cache: Path, weights: int, options: Sequence[str]) -> dict[str, Any]:
    """Two builds of ``bundle``, whose graphs are ``weights`` bytes, and what they left on the disk."""
    command = [str(STIV), "build", str(bundle), "--cache", str(cache), *options]
    stages = [run_stage(name, command) for name in ("build", "build from the cache")]
    plans = bundle / "engines"
    once, again = disk_bytes([plans, cache])
    files = [path for path in plans.rglob("*") if path.is_file()]
    return {
        "graphs_gib": round(weights / GIB, 3),
        "engines": len(files),
        "plans_gib": round(disk_bytes([plans])[0] / GIB, 3),
        "stages": [asdict(stage) for stage in stages],
        "plans_and_cache_gib": round(once / GIB, 3),
        "plans_and_cache_without_links_gib": round(again / GIB, 3),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| precision | engines | graphs, GiB | build | from the cache | peak, GiB | plans and cache | without links |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        first, again = row["stages"]
        sizes = f"{row['plans_and_cache_gib']} | {row['plans_and_cache_without_links_gib']}"
        times = f"{first['seconds']:.0f} s | {again['seconds']:.0f} s | {first['peak_gib']}"
        lines.append(f"| {name} | {row['engines']} | {row['graphs_gib']} | {times} | {sizes} |")
    return "\n".join(lines)


def check_precisions(names: list[str], *, shared: bool = False) -> list[str]:
    """``names``; :class:`ExportError` for one that is none, or with ``shared`` has no shared plan."""
    known = ("fp8", "int8", "bfloat16", "float16")  # NVFP4's engines have graphs of their own, which nobody writes here
    for name in names:
        if name not in known:
            raise ExportError(f"--precision {name}: there is none; use {', '.join(known)}")
        if shared and name in ("fp8", "int8"):
            raise ExportError(f"--precision {name} has no {SHARED_PLAN}; use bfloat16 or float16, or leave that out")
    return names


def main(
    model: Annotated[str, typer.Option(help="Name of the config.")] = "M",
    precision: Annotated[list[str] | None, typer.Option(help="Repeatable.", show_default="fp8")] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="Fewer blocks than the model has.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a clip.")] = 20,
    size: Annotated[int, typer.Option(min=32, help="Height and width in pixels, a multiple of 32.")] = 256,
    sm: Annotated[str, typer.Option(help="GPU to build engines for.")] = "89",
    shared_plan: Annotated[bool, typer.Option(SHARED_PLAN, help="Build that way too: float precisions only.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Builders at a time. Default: as 'stiv build' does.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where bundle and cache lie meanwhile.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Build all engines of a large model from random weights, and say what that takes."""
    precisions = check_precisions(precision or ["fp8"], shared=shared_plan)
    builder = import_tensorrt("tensorrt-rtx").__version__
    options = ["--sm", sm, *([] if jobs is None else ["--jobs", str(jobs)])]
    checkpoint, rows = hollow_checkpoint(model, blocks, frames, size), {}
    for name in precisions:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            rows |= measure(Path(place), name, checkpoint, bucket_of(frames, size), options, shared=shared_plan)
    typer.echo(table(rows))
    chosen = " ".join(f"--precision {name}" for name in precisions)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/big_build.py --model {model} {chosen} --frames {frames} --size {size} "
        + " ".join(options)
        + (f" --blocks {blocks}" if blocks else "")
        + (f" {SHARED_PLAN}" if shared_plan else ""),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, load {psutil.getloadavg()[0]:.1f} at the end",
        "versions": {"python": platform.python_version(), "tensorrt-rtx": builder},
        "blocks": checkpoint.config.model.blocks,
        "rows": rows,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from command import run

    run(main)
