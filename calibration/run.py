"""A calibration run from a checkpoint to a scale file with its report: validated first, resumable, written whole."""

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import dataclass, replace

from torch import Tensor

from stiv_deploy.calibration.collect import CalibrationSettings, Material, Statistics, collect
from stiv_deploy.calibration.known_data import default_images, default_prompts
from stiv_deploy.calibration.prompts import prompts_hash, read_images, read_prompts
from stiv_deploy.calibration.quantize import require_modelopt
from stiv_deploy.calibration.ranges import ranges_of
from stiv_deploy.calibration.report import make_report, save_report
from stiv_deploy.calibration.request import CalibrationRequest, check_files
from stiv_deploy.calibration.scales import Provenance, Scales, check_ranges, save_scales
from stiv_deploy.calibration.sensitivity import check_steps
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, open_checkpoint
from stiv_deploy.stiv_ref.generation import settings_of
from stiv_deploy.stiv_ref.progress import Progress

TOOLS = ("stiv-deploy", "torch", "nvidia-modelopt")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A finished run."""

    checkpoint: Checkpoint
    material: Material
    statistics: Statistics
    scales: Scales


def material_of(checkpoint: Checkpoint, request: CalibrationRequest) -> Material:
    """Prompts and images of a run: the given ones, or those of the data that the checkpoint was trained on.

    A model without temporal attention makes images and takes none.
    """
    prompts = read_prompts(request.prompts) if request.prompts else default_prompts(checkpoint, request.settings.seed)
    defaults = checkpoint.config.sampling
    if not checkpoint.config.model.temporal:
        return Material(prompts=prompts, images=None)
    if request.images:
        return Material(prompts=prompts, images=read_images(request.images, defaults.height, defaults.width))
    return Material(prompts=prompts, images=default_images(checkpoint, request.settings.seed))


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


def make_scales(request: CalibrationRequest, progress: Progress) -> Calibration:
    """Collect statistics, write the scale file ``request.out`` and its report.

    Keeps the statistics' file, so that a caller who fails later need not collect again. Raises
    :class:`~stiv_deploy.calibration.errors.CalibrationError` or :class:`~stiv_deploy.stiv_ref.errors.CheckpointError`,
    before anything expensive where possible.
    """
    check_files(request)
    opened = open_checkpoint(request.checkpoint)
    if request.sweep:
        check_steps(replace(settings_of(opened.config.sampling), steps=request.settings.steps))
    require_modelopt()
    checkpoint = opened.load()
    material = material_of(checkpoint, request)
    provenance = provenance_of(request, checkpoint, material)
    statistics = collect(
        checkpoint,
        material,
        request.settings,
        request.state,
        fingerprint_of(provenance, request.settings),
        progress,
    )
    per_channel = bool(provenance.recipe["per_channel_weights"])
    ranges = ranges_of(checkpoint.model, statistics, request.settings, per_channel=per_channel, smooth=request.smooth)
    scales = Scales(provenance=provenance, amax=ranges)
    check_ranges(scales, str(request.checkpoint))
    save_scales(request.out, scales)
    save_report(request.out, make_report(checkpoint.model, statistics, scales))
    return Calibration(checkpoint=checkpoint, material=material, statistics=statistics, scales=scales)
