"""What a sweep leaves behind: its figures as JSON and a heat map, layers by timestep bands."""

import json
from pathlib import Path

from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.files import replaced_file, write_text

DECADES = 1e-3
"""Smallest error that has a color of its own, as a share of the largest: the color scale is logarithmic."""


class PlanRow(FrozenConfig):
    """A whole plan: velocity errors by band, estimated from the sweep and measured, and of the final latents."""

    plan: str
    high: tuple[str, ...]
    estimated: tuple[float, ...]
    measured: tuple[float, ...]
    latents: float


class SweepReport(FrozenConfig):
    """Contents of the sweep's JSON file; all errors are relative L2, ``bands`` are timesteps."""

    quantization: str
    checkpoint: str
    bands: tuple[str, ...]
    velocity: dict[str, tuple[float, ...]]
    latents: dict[str, float]
    budget: float | None
    plans: tuple[PlanRow, ...]


def sweep_paths(scales: Path) -> tuple[Path, Path]:
    """Where the sweep of a scale file lies: JSON and heat map."""
    return scales.with_name(f"{scales.stem}.sweep.json"), scales.with_name(f"{scales.stem}.sweep.png")


def save_sweep(scales: Path, report: SweepReport) -> None:
    """Write a sweep's figures and heat map beside its scale file."""
    figures, picture = sweep_paths(scales)
    write_text(figures, json.dumps(report.model_dump(), indent=1) + "\n")
    draw_heat_map(picture, report)


def draw_heat_map(path: Path, report: SweepReport) -> None:
    """Draw the velocity errors of every group in every band, under a temporary name first.

    A star marks the layers that the last plan keeps high for its budget.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names, high = list(report.velocity), report.plans[-1].high
    largest = max(max(errors) for errors in report.velocity.values())
    values = [[max(error, DECADES * largest) for error in report.velocity[name]] for name in names]
    figure = Figure(figsize=(6.5, 1.6 + 0.17 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="magma", norm=LogNorm(DECADES * largest, largest))
    axes.set_xticks(range(len(report.bands)), report.bands)
    axes.set_yticks(range(len(names)), [f"* {name}" if name in high else name for name in names], fontsize=7)
    axes.set_xlabel("timestep band (0 noise, 1 data)")
    starred = f"; * kept high within {report.budget:g}" if report.budget is not None else ""
    axes.set_title(f"{report.quantization}: one group at a time{starred}", fontsize=10)
    figure.colorbar(image, ax=axes, label="relative L2 error of the guided velocity")
    with replaced_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
