"""INT8 against float32 in ONNX Runtime on a CPU: one block of a large model, and a whole small bundle.

    python benchmarks/cpu_int8.py --out benchmarks/results/NAME.json --bundles FLOAT32 INT8

All graphs of the block have the same weights and inputs and run in turns, so that whatever else the machine does hits
them alike; times are medians after a warm-up, with the time by operator from ONNX Runtime's own profiler. Ranges are
those of the very inputs, so that ``rel_l2`` (against the float32 graph) shows what rounding to 8 bits costs.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from one_block import one_block_checkpoint

from stiv_deploy.calibration.collect import CalibrationSettings, observed_model
from stiv_deploy.calibration.layers import OPERANDS, block_layers
from stiv_deploy.calibration.plan import default_plan
from stiv_deploy.calibration.ranges import activation_range, weight_range
from stiv_deploy.calibration.scales import Provenance, Scales
from stiv_deploy.export.graphs.check import draw_inputs, relative_error
from stiv_deploy.export.graphs.modules import graph_modules, model_facts
from stiv_deploy.export.graphs.quantization import Quantization
from stiv_deploy.export.graphs.writer import GraphWriter
from stiv_deploy.runtime.backends.onnxruntime import session_options
from stiv_deploy.runtime.backends.onnxruntime_int8 import EXACT, VNNI, cpu_flags
from stiv_deploy.runtime.bundle.contract import Precision, graph_specs
from stiv_deploy.stiv_ref.checkpoint import Checkpoint

if TYPE_CHECKING:
    import onnxruntime as ort

BLOCK = "block_00"
BASELINE = "float32"
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
UNKNOWN = "0" * 64
PROMPT = "a red star moving left"
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the block: type of the activations, whether in INT8, and session options beside the runtime's."""

    activations: Precision = "float32"
    int8: bool = True
    entries: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> str:
        """Variants that differ in options only share a graph."""
        return f"{'int8' if self.int8 else 'plain'}-{self.activations}"


VARIANTS = {
    BASELINE: Variant(int8=False),
    "int8": Variant(),
    "int8, unsigned weights (exact without VNNI)": Variant(entries=((EXACT, "1"),)),
    "int8, float16 activations": Variant(activations="float16"),
}
WITH_VNNI = {"int8, signed activations as they are": Variant(entries=(("session.qdqisint8allowed", "1"),))}
"""Without VNNI the runtime asks for unsigned weights, and ONNX Runtime refuses both options together."""


def variants(flags: frozenset[str] | None = None) -> dict[str, Variant]:
    """What a CPU with these instruction sets (None: the one here) can run, by name."""
    return VARIANTS | (WITH_VNNI if VNNI & (cpu_flags() if flags is None else flags) else {})


def block_inputs(checkpoint: Checkpoint, batch: int, frames: int, tokens: int) -> Inputs:
    """Seeded inputs of the block in float32; ``tokens`` of a frame."""
    facts = model_facts(checkpoint.config)
    dims = {"model_batch": batch, "token_frames": frames, "tokens": tokens, "text_tokens": facts.max_text_tokens}
    return draw_inputs(graph_specs(facts, "float32")[BLOCK], dims, vocabulary=1)


@torch.no_grad()
def block_ranges(checkpoint: Checkpoint, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Ranges of the block's layers over ``inputs``."""
    model, _, seen = observed_model(checkpoint.model, histogram=False)
    graph_modules(replace(checkpoint, model=model))[BLOCK](*inputs.values())
    ranges: dict[str, torch.Tensor] = {}
    for layer in block_layers(checkpoint.config.model, 0):
        parts = OPERANDS if layer.kind == "attention" else ("input",)
        names = [f"{layer.name}.{part}" for part in parts]
        ranges |= {name: activation_range(seen[name], CalibrationSettings()) for name in names}
        if layer.kind == "linear":
            weight = checkpoint.model.get_parameter(f"{layer.module}.weight")
            ranges[f"{layer.name}.weight"] = weight_range(weight, per_channel=True)
    return ranges


def quantization_of(checkpoint: Checkpoint, ranges: Mapping[str, torch.Tensor]) -> Quantization:
    """The default INT8 plan with ``ranges``."""
    config = checkpoint.config.model
    provenance = Provenance(quantization="int8", checkpoint=UNKNOWN, model=config, recipe={}, prompts=UNKNOWN, tools={})
    scales = Scales(provenance=provenance, amax=ranges)
    return Quantization(scales=scales, plan=default_plan(config, "int8"), sha256=UNKNOWN)


def write_graphs(checkpoint: Checkpoint, inputs: Inputs, folder: Path) -> None:
    """The graphs of all variants, each in a folder of its own below ``folder``."""
    quantization = quantization_of(checkpoint, block_ranges(checkpoint, inputs))
    for variant in {variant.folder: variant for variant in variants().values()}.values():
        target = folder / variant.folder
        target.mkdir(parents=True)
        GraphWriter(checkpoint, target, variant.activations, quantization if variant.int8 else None).write(BLOCK)


def open_session(variant: Variant, folder: Path, threads: int, profile: Path | None = None) -> "ort.InferenceSession":
    """A session as the runtime makes it, with the variant's own options, and a profile if asked for."""
    import onnxruntime as ort

    options = session_options(threads, "int8" if variant.int8 else None, variant.activations)
    for name, value in variant.entries:
        options.add_session_config_entry(name, value)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    path = folder / variant.folder / f"{BLOCK}.onnx"
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def fed(session: "ort.InferenceSession", inputs: Inputs) -> dict[str, np.ndarray]:
    """``inputs`` in the types that the graph takes."""
    types = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
    return {each.name: inputs[each.name].to(types[each.type]).numpy() for each in session.get_inputs()}


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, one after another ``repeats`` times, every second time in reverse; one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name in list(calls)[:: 1 if repeat % 2 else -1]:
            started = time.perf_counter()
            calls[name]()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def speed_rows(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median milliseconds and speed by name. ``speedup`` is the median over repeats of baseline's time by its own."""
    return {
        name: {
            "milliseconds": round(1000 * statistics.median(values), 2),
            "speedup": round(
                statistics.median(base / own for base, own in zip(seconds[baseline], values, strict=True)), 3
            ),
        }
        for name, values in seconds.items()
    }


def operator_times(variant: Variant, folder: Path, inputs: Inputs, threads: int, runs: int = 3) -> dict[str, float]:
    """Milliseconds of one run by operator, the largest first, from ONNX Runtime's profiler."""
    session = open_session(variant, folder, threads, folder / "profile")
    feeds = fed(session, inputs)
    for _ in range(runs + 1):
        session.run(None, feeds)
    file = Path(session.end_profiling())
    events = [event for event in json.loads(file.read_text(encoding="utf-8")) if event.get("cat") == "Node"]
    file.unlink()
    return by_operator(events, runs)


def by_operator(events: list[dict[str, Any]], runs: int) -> dict[str, float]:
    """Milliseconds by operator over the last ``runs`` of the ``runs`` + 1 in a profile's node events."""
    kernels = sorted((event for event in events if event["name"].endswith("_kernel_time")), key=lambda e: e["ts"])
    counted = kernels[len(kernels) // (runs + 1) :]
    times: Counter[str] = Counter()
    for event in counted:
        times[event["args"]["op_name"]] += event["dur"]
    return {operator: round(total / 1000 / runs, 3) for operator, total in times.most_common()}


def measure_block(folder: Path, inputs: Inputs, threads: int, repeats: int) -> dict[str, Any]:
    """Speed, error and time by operator of all variants at the size of ``inputs``."""
    sessions = {name: open_session(variant, folder, threads) for name, variant in variants().items()}
    feeds = {name: fed(session, inputs) for name, session in sessions.items()}
    outputs = {name: session.run(None, feeds[name])[0] for name, session in sessions.items()}
    calls = {
        name: (lambda session=session, feed=feeds[name]: session.run(None, feed)) for name, session in sessions.items()
    }
    rows: dict[str, dict[str, Any]] = dict(speed_rows(in_turns(calls, repeats), BASELINE))
    for name, variant in variants().items():
        rows[name]["rel_l2"] = round(relative_error(outputs[name], outputs[BASELINE]), 5)
        rows[name]["milliseconds_by_operator"] = dict(
            list(operator_times(variant, folder, inputs, threads).items())[:8]
        )
    batch, frames, tokens, width = inputs["x"].shape
    return {"size": {"batch": batch, "frames": frames, "tokens": tokens, "width": width}, "variants": rows}


def measure_bundles(paths: tuple[Path, Path], threads: int, repeats: int, steps: int) -> dict[str, Any]:
    """A generation with the float32 and the INT8 bundle in turns."""
    from stiv_deploy.runtime.pipeline.pipeline import StivPipeline

    with (
        StivPipeline.from_bundle(paths[0], threads=threads) as plain,
        StivPipeline.from_bundle(paths[1], threads=threads) as quantized,
    ):
        pipes = {BASELINE: plain, "int8": quantized}
        activations = quantized.bundle.manifest.precision
        calls = {
            name: (lambda pipe=pipe: pipe(prompt=PROMPT, num_inference_steps=steps, seed=0))
            for name, pipe in pipes.items()
        }
        rows = speed_rows(in_turns(calls, repeats), BASELINE)
    return {"steps": steps, "activations": activations, "variants": rows}


def cpu() -> dict[str, Any]:
    """Name of the CPU and what of INT8 it can do."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    found = [name for name in INSTRUCTIONS if name in cpu_flags()]
    return {"name": name or platform.machine(), "cores": os.cpu_count(), "instructions": found}


def parse_size(text: str) -> tuple[int, int, int]:
    """``BATCHxFRAMESxTOKENS``."""
    try:
        batch, frames, tokens = (int(part) for part in text.split("x"))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: give BATCHxFRAMESxTOKENS, such as 2x8x64") from None
    if min(batch, frames, tokens) < 1:
        raise typer.BadParameter(f"{text!r}: sizes begin at 1")
    return batch, frames, tokens


def command_line(model: str, sizes: list[tuple[int, int, int]], threads: int, repeats: int, steps: int | None) -> str:
    """The command that gives a result again; ``steps`` is None without generations."""
    text = f"python benchmarks/cpu_int8.py --model {model} --threads {threads} --repeats {repeats}"
    text += "".join(f" --size {'x'.join(map(str, size))}" for size in sizes)
    return text if steps is None else f"{text} --bundles FLOAT32 INT8 --steps {steps}"


def main(
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
    model: Annotated[str, typer.Option(help="Config whose block is measured.")] = "XL",
    size: Annotated[list[str] | None, typer.Option(help="BATCHxFRAMESxTOKENS; repeatable.", show_default=False)] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs of each graph.")] = 9,
    bundles: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Also generate with a float32 and an INT8 bundle.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of those generations.")] = 10,
) -> None:
    """Measure INT8 against float32 on this CPU, print it, and write it as JSON."""
    sizes = [parse_size(text) for text in size or ("2x8x64", "2x8x256")]
    checkpoint = one_block_checkpoint(model, frames=8, size=128)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": command_line(model, sizes, threads, repeats, steps if bundles else None),
        "cpu": cpu(),
        "threads": threads,
        "versions": {"python": platform.python_version(), "onnxruntime": version("onnxruntime")},
        "block": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        write_graphs(
            checkpoint,
            block_inputs(checkpoint, *max(sizes, key=lambda each: each[0] * each[1] * each[2])),
            Path(folder),
        )
        for each in sizes:
            result["block"].append(measure_block(Path(folder), block_inputs(checkpoint, *each), threads, repeats))
    if bundles is not None:
        result["generation"] = measure_bundles(bundles, threads, repeats, steps)
    typer.echo(json.dumps(result, indent=2))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from command import run

    run(main)
