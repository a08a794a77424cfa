"""A calibration run from a checkpoint to a scale file with its report: validated first, resumable, written whole."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stiv_deploy.calibration.collect import CalibrationSettings, Material, Statistics, collect
from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import Format
from stiv_deploy.calibration.prompts import (
    dataset_images,
    default_requests,
    prompts_hash,
    read_images,
    read_prompts,
)
from stiv_deploy.calibration.quantize import require_modelopt
from stiv_deploy.calibration.ranges import ranges_of
from stiv_deploy.calibration.report import make_report, save_report
from stiv_deploy.calibration.scales import Provenance, Scales, check_ranges, save_scales
from stiv_deploy.calibration.sensitivity import check_steps
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, load_checkpoint

TOOLS = ("stiv-deploy", "torch", "nvidia-modelopt")
Progress = Callable[[str, int, int], None]
"""Told what is done, how many steps of it are, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """What ``stiv calibrate`` is asked for. ``smooth`` is SmoothQuant's alpha, ``budget`` a relative L2 error."""

    checkpoint: Path
    quantization: Format
    out: Path
    settings: CalibrationSettings
    prompts: Path | None = None
    images: Path | None = None
    per_channel: bool = False
    smooth: float | None = None
    sweep: bool = False
    budget: float | None = None
    plan: Path | None = None

    @property
    def state(self) -> Path:
        """Where the running statistics are kept."""
        return self.out.with_name(f"{self.out.name}.partial-state")

    @property
    def plan_path(self) -> Path:
        """Where the plan of a sweep goes."""
        return self.plan or self.out.with_name(f"{self.out.stem}.plan.json")

    @property
    def sweep_state(self) -> Path:
        """Where the progress of a sweep is kept."""
        return self.out.with_name(f"{self.out.name}.partial-sweep")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A finished run."""

    checkpoint: Checkpoint
    material: Material
    statistics: Statistics
    scales: Scales


def check_request(request: CalibrationRequest) -> None:
    """:class:`CalibrationError` for what can be told without loading anything."""
    if request.smooth is not None:
        if not 0 < request.smooth <= 1:
            raise CalibrationError(f"--smoothquant {request.smooth:g}: alpha must be above 0 and at most 1")
        if request.quantization != "int8":
            raise CalibrationError("--smoothquant is for --precision int8; E4M3 has the range for outliers")
        if request.settings.calibrator != "max":
            raise CalibrationError("--smoothquant needs --calibrator max: its factors come from largest magnitudes")
    if request.per_channel and request.quantization == "int8":
        raise CalibrationError("--per-channel is for --precision fp8; int8 weights are per channel anyway")
    if request.budget is not None and not (request.sweep and request.budget > 0):
        wanted = "needs --sweep" if request.budget > 0 else "must be positive, such as 0.05"
        raise CalibrationError(f"--budget {request.budget:g}: {wanted}")
    if request.plan is not None and not request.sweep:
        raise CalibrationError(f"--plan {request.plan}: is written by a sweep; add --sweep")
    for path, wanted in ((request.prompts, "file of prompts"), (request.images, "folder of images")):
        if path is not None and not path.exists():
            raise CalibrationError(f"{path}: no such {wanted}")
    if request.out.suffix != ".safetensors":
        raise CalibrationError(
            f"--out {request.out}: scales are a safetensors file; name it so, as in scales.safetensors"
        )
    check_writable(request.out)
    check_writable(request.plan_path)


def check_writable(path: Path) -> None:
    """:class:`CalibrationError` if a file cannot be made at ``path``."""
    if path.is_dir():
        raise CalibrationError(f"{path}: is a folder; give the name of a file to write")
    if not path.parent.is_dir():
        raise CalibrationError(f"{path}: the folder {path.parent} does not exist; make it first")
    probe = path.with_name(f".{path.name}.writable")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be written ({error.strerror}); choose another name") from None


def material_of(checkpoint: Checkpoint, request: CalibrationRequest) -> Material:
    """Prompts and images of a run: those of the moving digits, or the given ones.

    A model without temporal attention makes images and takes none.
    """
    prompts = read_prompts(request.prompts) if request.prompts else default_requests(checkpoint).prompts
    defaults = checkpoint.config.sampling
    if not checkpoint.config.model.temporal:
        return Material(prompts=prompts, images=None)
    if request.images:
        return Material(prompts=prompts, images=read_images(request.images, defaults.height, defaults.width))
    return Material(prompts=prompts, images=dataset_images(checkpoint, request.settings.seed))


def tool_versions() -> dict[str, str]:
    """Versions of what made the scales."""
    return {"python": platform.python_version()} | {tool: importlib.metadata.version(tool) for tool in TOOLS}


def images_hash(images: Tensor | None) -> str:
    """SHA-256 (hex) of the images' values; empty if there are none."""
    return "" if images is None else hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def provenance_of(request: CalibrationRequest, checkpoint: Checkpoint, material: Material) -> Provenance:
    """Everything that the ranges of this run depend on."""
    recipe: dict[str, str | int | float | bool] = dict(request.settings.model_dump())
    recipe |= {"per_channel_weights": request.per_channel or request.quantization == "int8"}
    recipe |= {"smoothquant": request.smooth or 0.0, "images": images_hash(material.images)}
    return Provenance(
        quantization=request.quantization,
        checkpoint=checkpoint.sha256,
        model=checkpoint.config.model,
        recipe=recipe,
        prompts=prompts_hash(material.prompts),
        tools=tool_versions(),
    )


def fingerprint_of(provenance: Provenance, settings: CalibrationSettings) -> str:
    """What statistics depend on, as one string; not the format, which only reads them."""
    parts = [provenance.checkpoint, settings.model_dump(), provenance.prompts, provenance.recipe["images"]]
    return hashlib.sha256(json.dumps([*parts, provenance.tools]).encode()).hexdigest()


def calibrate(request: CalibrationRequest, progress: Progress) -> Calibration:
    """Collect statistics, write the scale file ``request.out`` and its report.

    Keeps the statistics' file, so that a caller who fails later need not collect again; see :func:`finish`. Raises
    :class:`CalibrationError` or :class:`~stiv_deploy.stiv_ref.errors.CheckpointError`, before anything expensive where
    possible.
    """
    check_request(request)
    checkpoint = load_checkpoint(request.checkpoint)
    if request.sweep:
        check_steps(request.settings.steps, checkpoint.config.sampling.time_shift)
    material = material_of(checkpoint, request)
    require_modelopt()
    provenance = provenance_of(request, checkpoint, material)
    statistics = collect(
        checkpoint,
        material,
        request.settings,
        request.state,
        fingerprint_of(provenance, request.settings),
        lambda done, total: progress("sampling", done, total),
    )
    per_channel = bool(provenance.recipe["per_channel_weights"])
    ranges = ranges_of(checkpoint.model, statistics, request.settings, per_channel=per_channel, smooth=request.smooth)
    scales = Scales(provenance=provenance, amax=ranges)
    check_ranges(scales, str(request.checkpoint))
    save_scales(request.out, scales)
    save_report(request.out, make_report(checkpoint.model, statistics, scales))
    return Calibration(checkpoint=checkpoint, material=material, statistics=statistics, scales=scales)


def finish(request: CalibrationRequest) -> None:
    """Delete what was kept for resuming, once a run is complete."""
    request.state.unlink(missing_ok=True)
    request.sweep_state.unlink(missing_ok=True)
