"""Calibration runs: the reference sampler drives the observed model through what it will really be fed.

A run is a list of units, one batch of prompts with a task, a guidance mode and seeds. After every unit the statistics
are saved beside the scale file, so that a run can be stopped and goes on to the same ranges, bit by bit.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.observers import REQUEST, Clock, Statistic, band_of
from stiv_deploy.calibration.quantize import observed
from stiv_deploy.stiv_ref.bounds import Seed, Size, Steps
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.files import parse_json, replaced_file
from stiv_deploy.stiv_ref.generation import sampling_inputs, settings_of
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.progress import Progress, unheard
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, sample
from stiv_deploy.stiv_ref.tasks import TASKS, TaskName
from stiv_deploy.stiv_ref.weights import save_tensors

STATE = "stiv-calibration-state"
Calibrator = Literal["max", "percentile"]
Statistics = dict[str, Statistic]
"""Statistics by ``<layer>.<operand>``."""


class CalibrationSettings(FrozenConfig):
    """What a calibration run samples. Guidance scales and time shift are the checkpoint's own."""

    samples: int = Field(default=40, gt=0, le=10**6)
    steps: Steps = 15
    batch: Size = 5
    seed: Seed = 0
    calibrator: Calibrator = "max"
    percentile: float = Field(default=99.99, gt=0, le=100)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What is asked for: prompts, and images fp32 [N, 3, H, W] in [-1, 1] (none for a model without image-to-video)."""

    prompts: list[str]
    images: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One batch of a run: positions of its samples, which are also their seeds above the run's seed."""

    task: TaskName
    guidance: GuidanceMode
    samples: range


def units(settings: CalibrationSettings, *, image_to_video: bool, student: bool = False) -> list[Unit]:
    """The units of a run: tasks in turn, JIT guidance, and SIT in every second image-to-video batch of no student."""
    found = []
    for index, start in enumerate(range(0, settings.samples, settings.batch)):
        given = image_to_video and index % 2 == 1
        found.append(
            Unit(
                task="ti2v" if given else "t2v",
                guidance=GuidanceMode.SIT if given and index % 4 == 3 and not student else GuidanceMode.JIT,
                samples=range(start, min(start + settings.batch, settings.samples)),
            )
        )
    return found


def unit_inputs(checkpoint: Checkpoint, material: Material, unit: Unit, seed: int) -> SamplingInputs:
    """Inputs of ``unit``: prompts and images in turn, every sample with a seed of its own."""
    prompts = [material.prompts[index % len(material.prompts)] for index in unit.samples]
    images = None
    if TASKS[unit.task].conditioned:
        assert material.images is not None
        images = material.images[[index % len(material.images) for index in unit.samples]]
    return sampling_inputs(checkpoint, prompts, [seed + index for index in unit.samples], images)


def unit_settings(checkpoint: Checkpoint, unit: Unit, steps: int) -> SamplingSettings:
    """The checkpoint's sampling settings with the unit's guidance mode and ``steps``."""
    return replace(settings_of(checkpoint.config.sampling), steps=steps, guidance_mode=unit.guidance)


def observed_model(model: Stiv, histogram: bool) -> tuple[Stiv, Clock, Statistics]:
    """A copy of ``model`` that fills statistics of every operand, in the clock's row; calls set the clock's time."""
    clock, statistics = Clock(), {}

    def statistic(name: str) -> Statistic:
        statistics[name] = Statistic(clock, histogram)
        return statistics[name]

    copied = observed(model, statistic)

    def set_time(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        clock.row = band_of(float(given[1][0]))

    copied.register_forward_pre_hook(set_time)
    return copied, clock, statistics


def save_state(path: Path, statistics: Statistics, fingerprint: str, done: int) -> None:
    """Write statistics after ``done`` units, under a temporary name first."""
    tensors = {f"{name}.amax": each.amax for name, each in statistics.items()}
    tensors |= {f"{name}.counts": each.counts for name, each in statistics.items()}
    with replaced_file(path) as temporary:
        save_tensors(tensors, temporary, {STATE: json.dumps({"fingerprint": fingerprint, "done": done})})


def load_state(path: Path, statistics: Statistics, fingerprint: str) -> int:
    """Fill ``statistics`` from a saved state; return how many units it has, 0 if there is none.

    Raises :class:`CalibrationError` if it is of another run or damaged.
    """
    if not path.exists():
        return 0
    remedy = "delete it to start anew, or choose another --out"
    try:
        with safe_open(path, "pt") as file:
            position = parse_json((file.metadata() or {})[STATE])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        found, done = position["fingerprint"], int(position["done"])
        read = {name: (tensors[f"{name}.amax"], tensors[f"{name}.counts"]) for name in statistics}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path}: not a readable calibration state ({error}); {remedy}") from None
    if found != fingerprint:
        raise CalibrationError(f"{path}: a calibration with other settings was stopped here; {remedy}")
    for name, statistic in statistics.items():
        statistic.amax, statistic.counts = read[name]
    return done


def check_finite(statistics: Statistics) -> None:
    """:class:`CalibrationError` naming the first layer that has seen values that are not finite."""
    for name, statistic in statistics.items():
        if not torch.isfinite(statistic.amax).all():
            raise CalibrationError(f"{name}: the model computes values that are not finite; check the checkpoint")


def collect(
    checkpoint: Checkpoint,
    material: Material,
    settings: CalibrationSettings,
    state: Path,
    fingerprint: str,
    progress: Progress = unheard,
) -> Statistics:
    """Run all units that ``state`` has not yet and return the statistics of all.

    ``fingerprint`` tells runs apart that must not be mixed. ``progress`` hears of units.
    """
    model, clock, statistics = observed_model(checkpoint.model, settings.calibrator == "percentile")
    student = checkpoint.config.model.student is not None
    plan = units(settings, image_to_video=material.images is not None, student=student)
    done = load_state(state, statistics, fingerprint)
    progress("sampling", done, len(plan))
    for index, unit in enumerate(plan[done:], start=done):
        clock.row = REQUEST
        inputs = unit_inputs(checkpoint, material, unit, settings.seed)
        sample(model, inputs, unit_settings(checkpoint, unit, settings.steps))
        check_finite(statistics)
        save_state(state, statistics, fingerprint, index + 1)
        progress("sampling", index + 1, len(plan))
    return statistics
