"""What each quantized format costs the guided velocity, by timestep band, and a run's final latents.

    python benchmarks/format_errors.py --out benchmarks/results/format-errors-DATE.json

The model of moving digits in FP8, INT8 and NVFP4, by their default plans and calibrators, all with ranges from one run
of the sampler (that of ``stiv calibrate``). Errors are relative L2 against the float32 reference, at points of its own
trajectories and of a run on its own, of clips that calibration did not see: the figures of ``stiv calibrate --sweep``,
without the sweep. Formats are simulated in float32; nothing is timed.
"""

import json
import shlex
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stiv_deploy.calibration.collect import CalibrationSettings, Statistics, collect
from stiv_deploy.calibration.layers import Format, model_layers
from stiv_deploy.calibration.observers import BANDS, band_names
from stiv_deploy.calibration.plan import default_plan
from stiv_deploy.calibration.quantize import quantized_copy
from stiv_deploy.calibration.ranges import ranges_of
from stiv_deploy.calibration.request import CalibrationRequest, usual_calibrator
from stiv_deploy.calibration.run import material_of
from stiv_deploy.calibration.scales import Provenance, Scales
from stiv_deploy.calibration.sensitivity import Reference, latents_error, reference_runs, velocity_errors
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, load_checkpoint

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"
FORMATS: tuple[Format, ...] = ("fp8", "int8", "nvfp4")


def scales_of(checkpoint: Checkpoint, statistics: Statistics, name: Format, settings: CalibrationSettings) -> Scales:
    """The ranges that ``stiv calibrate`` would find for a format, of what one run has seen."""
    usual = settings.model_copy(update={"calibrator": usual_calibrator(name)})
    provenance = Provenance(
        quantization=name, checkpoint=checkpoint.sha256, model=checkpoint.config.model, recipe={}, prompts="", tools={}
    )
    amax = ranges_of(checkpoint.model, statistics, usual, per_channel=name == "int8")
    return Scales(provenance=provenance, amax=amax)


def measured(checkpoint: Checkpoint, scales: Scales, references: list[Reference]) -> dict[str, Any]:
    """Errors of one format, and how many layers have it."""
    config = checkpoint.config.model
    plan = default_plan(config, scales.quantization)
    layers = [layer for layer in model_layers(config) if plan.quantized(layer.name)]
    quantized = quantized_copy(checkpoint.model, scales, layers)
    velocity = velocity_errors(quantized, references)
    return {"layers": len(layers), "velocity": velocity, "latents": latents_error(quantized, references)}


def table(formats: dict[str, dict[str, Any]]) -> str:
    """The errors as a table in Markdown."""
    lines = [f"| | {' | '.join(band_names()[:BANDS])} | final latents |", "|---" * (BANDS + 2) + "|"]
    for name, row in formats.items():
        lines.append(f"| {name} | " + " | ".join(f"{error:.3f}" for error in (*row["velocity"], row["latents"])) + " |")
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")] = CHECKPOINT,
    samples: Annotated[int, typer.Option(min=1, help="Clips that ranges are of.")] = 40,
    steps: Annotated[int, typer.Option(min=15, help="Sampling steps.")] = 15,
) -> None:
    """Measure FP8, INT8 and NVFP4 beside each other."""
    loaded, settings = load_checkpoint(checkpoint), CalibrationSettings(samples=samples, steps=steps)
    request = CalibrationRequest(checkpoint=checkpoint, quantization="fp8", out=Path("unwritten.safetensors"))
    material = material_of(loaded, request)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        wide = settings.model_copy(update={"calibrator": "percentile"})
        statistics = collect(loaded, material, wide, Path(folder) / "state", "one run for all")
        references = reference_runs(loaded, material, steps)
        formats = {
            name: measured(loaded, scales_of(loaded, statistics, name, settings), references) for name in FORMATS
        }
    report = {
        "command": f"python {shlex.join(sys.argv)}",
        "date": datetime.now(UTC).date().isoformat(),
        "checkpoint": loaded.sha256,
        "versions": {name: version(name) for name in ("stiv-deploy", "torch", "nvidia-modelopt")},
        "bands": band_names()[:BANDS],
        "formats": formats,
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    typer.echo(table(formats))


if __name__ == "__main__":
    from command import run

    run(main)
