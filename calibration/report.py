"""The report beside a scale file: what was seen and what becomes of it, layer by layer, as JSON and as a table."""

import json
from pathlib import Path

import torch
from torch import Tensor

from stiv_deploy.calibration.collect import Statistics
from stiv_deploy.calibration.layers import Layer, model_layers
from stiv_deploy.calibration.observers import Statistic, band_names, share_beyond
from stiv_deploy.calibration.scales import Scales, tensor_names
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.files import write_text
from stiv_deploy.stiv_ref.model import Stiv


class OperandRow(FrozenConfig):
    """One quantized activation. ``amax`` by timestep band, None where the layer does not run.

    ``range`` is what the scale file says; ``clipped`` the share of values beyond it; ``outlier`` the largest channel's
    amax over the median one's, of the channels that are not always zero. All after SmoothQuant's division, if any.
    """

    layer: str
    operand: str
    amax: dict[str, float | None]
    range: float
    clipped: float
    outlier: float


class WeightRow(FrozenConfig):
    """One weight: amax of its output channels, and how many ranges the scale file has for it."""

    layer: str
    smallest: float
    median: float
    largest: float
    ranges: int


class RangeReport(FrozenConfig):
    """Contents of the JSON file beside a scale file."""

    quantization: str
    checkpoint: str
    recipe: dict[str, str | int | float | bool]
    activations: tuple[OperandRow, ...]
    weights: tuple[WeightRow, ...]


def _clipped(statistic: Statistic, limit: float) -> float:
    return share_beyond(statistic, limit) if statistic.counts.numel() else 0.0


def operand_row(layer: str, operand: str, statistic: Statistic, scales: Scales) -> OperandRow:
    """The row of one operand of ``layer``."""
    smooth = scales.amax.get(f"{layer}.smooth", torch.ones(()))
    by_band, limit = statistic.amax / smooth, float(scales.amax[f"{layer}.{operand}"])
    bands = [float(row.max()) for row in by_band]
    channels = by_band.amax(0)
    alive = channels[channels > 0]
    return OperandRow(
        layer=layer,
        operand=operand,
        amax={name: value or None for name, value in zip(band_names(), bands, strict=True)},
        range=limit,
        clipped=_clipped(statistic, limit),
        outlier=float(alive.max() / alive.median()),
    )


def weight_row(layer: Layer, model: Stiv, scales: Scales) -> WeightRow:
    """The row of a linear's weight, SmoothQuant's factors included."""
    weight = model.get_submodule(layer.module).weight
    assert isinstance(weight, Tensor)
    rows = (weight.detach() * scales.amax.get(f"{layer.name}.smooth", torch.ones(()))).abs().amax(1)
    ranges = scales.amax[f"{layer.name}.weight"].numel()
    return WeightRow(
        layer=layer.name,
        smallest=float(rows.min()),
        median=float(rows.median()),
        largest=float(rows.max()),
        ranges=ranges,
    )


def make_report(model: Stiv, statistics: Statistics, scales: Scales) -> RangeReport:
    """The report of a finished calibration."""
    layers = model_layers(model.config)
    operands = [name for layer in layers for name in tensor_names(layer) if not name.endswith(".weight")]
    pairs = [(name, *name.rsplit(".", 1)) for name in operands]
    return RangeReport(
        quantization=scales.quantization,
        checkpoint=scales.provenance.checkpoint,
        recipe=scales.provenance.recipe,
        activations=tuple(operand_row(layer, operand, statistics[name], scales) for name, layer, operand in pairs),
        weights=tuple(weight_row(layer, model, scales) for layer in layers if layer.kind == "linear"),
    )


def as_markdown(report: RangeReport) -> str:
    """The report as two tables."""
    bands = band_names()
    head = ["layer", "operand", *bands, "range", "clipped", "largest/median channel"]
    lines = [
        f"# {report.quantization} calibration of checkpoint {report.checkpoint[:12]}",
        "",
        ", ".join(f"{name} {value}" for name, value in report.recipe.items()),
        "",
        "Largest magnitude of every activation by timestep band (t = 0 is noise), its range, the share of values",
        "beyond it.",
        "",
        _line(head),
        _line(["---"] * 2 + ["---:"] * (len(head) - 2)),
    ]
    for row in report.activations:
        seen = ["" if row.amax[name] is None else f"{row.amax[name]:.3g}" for name in bands]
        lines.append(
            _line([row.layer, row.operand, *seen, f"{row.range:.4g}", f"{row.clipped:.2e}", f"{row.outlier:.1f}"])
        )
    lines += ["", "Largest magnitude of the weights' output channels.", ""]
    lines += [
        _line(["layer", "smallest", "median", "largest", "ranges"]),
        _line(["---", "---:", "---:", "---:", "---:"]),
    ]
    for each in report.weights:
        figures = [f"{value:.3g}" for value in (each.smallest, each.median, each.largest)]
        lines.append(_line([each.layer, *figures, str(each.ranges)]))
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def report_paths(scales: Path) -> tuple[Path, Path]:
    """Where the report of a scale file lies: JSON and markdown."""
    return scales.with_name(f"{scales.stem}.report.json"), scales.with_name(f"{scales.stem}.report.md")


def save_report(scales: Path, report: RangeReport) -> None:
    """Write the report beside its scale file."""
    as_json, as_table = report_paths(scales)
    write_text(as_json, json.dumps(report.model_dump(), indent=1) + "\n")
    write_text(as_table, as_markdown(report))
