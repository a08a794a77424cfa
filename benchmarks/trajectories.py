"""Errors of a precision along sampling runs: of the velocity at the truth's latents, and of the latents of its own run.

The truth is the reference in float64. *Teacher-forced*: every step starts from the truth's latents, so that the error
is the model's alone. *Free run*: the latents that the precision itself reaches, errors of all steps so far in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stiv_deploy.calibration.observers import BAND_EDGES, band_of
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.generation import sampling_inputs
from stiv_deploy.stiv_ref.plots import legend_below
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, guided_velocity, sample

BANDS = tuple(f"{low:g}-{high:g}" for low, high in zip(BAND_EDGES, BAND_EDGES[1:], strict=False))
COLORS = {
    "fp32": "#7f7f7f",
    "bf16": "#9467bd",
    "fp16": "#2ca02c",
    "fp8": "#1f77b4",
    "int8": "#ff7f0e",
    "nvfp4": "#d62728",
    "fp8 everything": "#1f77b4",
    "int8 everything": "#ff7f0e",
}
Errors = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Clips:
    """What trajectories are made from; ``images`` fp32 [B, 3, H, W] in [-1, 1] makes it image-to-video."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    images: Tensor | None

    def inputs(self, checkpoint: Checkpoint) -> SamplingInputs:
        """Sampling inputs with the text encoded by ``checkpoint``, noise and clean latents in float32 or wider."""
        return sampling_inputs(checkpoint, self.prompts, self.seeds, self.images)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Latents before every step and velocities there, [B, T, C, h, w] each, and the final latents."""

    clips: Clips
    settings: SamplingSettings
    points: list[Tensor]
    velocities: list[Tensor]
    final: Tensor


def true_run(exact: Checkpoint, clips: Clips, settings: SamplingSettings) -> Truth:
    """Sample ``clips`` with the float64 checkpoint ``exact``."""
    points: list[Tensor] = []
    velocities: list[Tensor] = []

    def keep(_step: int, before: Tensor, velocity: Tensor) -> None:
        points.append(before)
        velocities.append(velocity)

    noise, clean, mask, text, null, micro = clips.inputs(exact)
    inputs = SamplingInputs(noise.double(), clean.double(), mask, text, null, micro.double())
    final = sample(exact.model, inputs, settings, keep)
    return Truth(clips=clips, settings=settings, points=points, velocities=velocities, final=final)


def measure(checkpoint: Checkpoint, truth: Truth) -> Errors:
    """Relative L2 errors: ``velocity`` and ``latents`` by step (latents after it), ``bands`` of the velocity."""
    inputs, settings = truth.clips.inputs(checkpoint), truth.settings
    *times, end = settings.times()
    velocity = guided_velocity(checkpoint.model, inputs, settings)
    steps = zip(truth.points, pairwise([*times, end]), strict=True)
    found = [velocity(point.float(), *each) for point, each in steps]
    reached: list[Tensor] = []
    final = sample(checkpoint.model, inputs, settings, lambda _step, before, _v: reached.append(before))
    return {
        "times": times,
        "velocity": [error([got], [want]) for got, want in zip(found, truth.velocities, strict=True)],
        "latents": [
            error([got], [want])
            for got, want in zip([*reached[1:], final], [*truth.points[1:], truth.final], strict=True)
        ],
        "bands": by_band(found, truth.velocities, times),
    }


def error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Relative L2 error in float64 of all tensors together."""
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, want, strict=True))
    return float(np.sqrt(off / sum(float(b.double().square().sum()) for b in want)))


def by_band(got: Sequence[Tensor], want: Sequence[Tensor], times: Sequence[float]) -> dict[str, float]:
    """Relative L2 error over the steps of each timestep band; bands without a step are left out."""
    result = {}
    for index, name in enumerate(BANDS):
        inside = [step for step, time in enumerate(times) if band_of(time) == index]
        if inside:
            result[name] = error([got[step] for step in inside], [want[step] for step in inside])
    return result


def plot(errors: Mapping[str, Mapping[str, Errors]], out: Path) -> None:
    """Draw the errors by precision and task over the steps to the PNG file ``out``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(next(iter(errors.values())))
    figure = Figure(figsize=(5.5 * len(tasks), 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False)
    titles = (("velocity", "velocity, from the truth's latents"), ("latents", "latents of its own run"))
    for row, (what, title) in zip(grid, titles, strict=True):
        for axes, task in zip(row, tasks, strict=True):
            for name, found in errors.items():
                style = ":" if "everything" in name else "-"
                values = found[task][what]
                axes.semilogy(range(1, len(values) + 1), values, style, color=COLORS[name], label=name)
            axes.set_title(f"{task.upper()}: {title}", fontsize=10)
            axes.grid(True, which="both", linewidth=0.3)
        row[0].set_ylabel("relative L2 error")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    legend_below(figure)
    temporary = out.with_name(f".{out.name}.partial")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.rename(out)
