"""Sensitivity: what quantizing one group of layers does to the guided velocity, by timestep band, and to the latents.

All models are compared at the same points of the reference's own trajectories (teacher forcing): latents of a
text-to-video and an image-to-video batch, one point in every timestep band.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stiv_deploy.calibration.collect import Material, Unit, unit_inputs, unit_settings
from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import Layer
from stiv_deploy.calibration.observers import BANDS, band_of
from stiv_deploy.calibration.quantize import quantized_layers, switch_on
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.files import parse_json, read_text, write_text
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.progress import Progress, unheard
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, guided_velocity, sample

CLIPS = 4
"""Clips of each task that groups are measured on."""
FIRST_SEED = 100_000
"""Far from the seeds that ranges come from: a range must not be judged on the very noise that it was taken from."""
FINAL = 6
"""How many groups, the most sensitive ones, are followed to the final latents."""
BandErrors = tuple[float, ...]
"""Relative L2 errors by timestep band."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One batch of the reference: what it was asked for, the latents at a step of each band, and its final latents.

    ``times`` are where those steps begin and end.
    """

    inputs: SamplingInputs
    settings: SamplingSettings
    times: tuple[tuple[float, float], ...]
    latents: tuple[Tensor, ...]
    velocity: tuple[Tensor, ...]
    final: Tensor


def band_steps(settings: SamplingSettings) -> dict[int, int]:
    """The step in the middle of each timestep band, by band; bands that no step is in are absent."""
    inside: dict[int, list[int]] = {}
    for step, time in enumerate(settings.times()[:-1]):
        inside.setdefault(band_of(time), []).append(step)
    return {band: found[len(found) // 2] for band, found in inside.items()}


def check_steps(settings: SamplingSettings) -> None:
    """:class:`CalibrationError` if some timestep band has no step of such a schedule, so that it cannot be measured."""
    if len(band_steps(settings)) < BANDS:
        steps = settings.steps
        raise CalibrationError(f"--steps {steps}: too few for a sweep, some timestep band has none; use 15 or more")


def reference_run(model: Stiv, inputs: SamplingInputs, settings: SamplingSettings) -> Reference:
    """Sample with ``model`` and keep one point of each band, each of which must have a step."""
    wanted = band_steps(settings)
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(step: int, latents: Tensor, velocity: Tensor) -> None:
        if step in wanted.values():
            kept[step] = (latents, velocity)

    final = sample(model, inputs, settings, keep)
    times = settings.times()
    steps = [wanted[band] for band in range(BANDS)]
    return Reference(
        inputs=inputs,
        settings=settings,
        times=tuple((times[step], times[step + 1]) for step in steps),
        latents=tuple(kept[step][0] for step in steps),
        velocity=tuple(kept[step][1] for step in steps),
        final=final,
    )


def reference_runs(checkpoint: Checkpoint, material: Material, steps: int) -> list[Reference]:
    """The runs that everything is measured on: text-to-video and, where the model can, image-to-video."""
    tasks: list[Unit] = [Unit(task="t2v", guidance=GuidanceMode.JIT, samples=range(CLIPS))]
    if material.images is not None:
        tasks.append(Unit(task="ti2v", guidance=GuidanceMode.JIT, samples=range(CLIPS, 2 * CLIPS)))
    return [
        reference_run(
            checkpoint.model,
            unit_inputs(checkpoint, material, unit, FIRST_SEED),
            unit_settings(checkpoint, unit, steps),
        )
        for unit in tasks
    ]


def relative_error(pairs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Relative L2 distance over ``(value, reference, given frames)``: the frames given to the model do not count."""
    difference = total = 0.0
    for value, reference, given in pairs:
        weight = (~given).double()[:, :, None, None, None]
        difference += float(((value.double() - reference.double()).square() * weight).sum())
        total += float((reference.double().square() * weight).sum())
    return math.sqrt(difference / total)


def velocity_errors(model: Stiv, runs: Sequence[Reference]) -> BandErrors:
    """Error of the guided velocity of ``model`` in each band, at the latents of the reference."""
    functions = [guided_velocity(model, run.inputs, run.settings) for run in runs]
    return tuple(
        relative_error(
            (function(run.latents[band], *run.times[band]), run.velocity[band], run.inputs.frame_mask)
            for function, run in zip(functions, runs, strict=True)
        )
        for band in range(BANDS)
    )


def latents_error(model: Stiv, runs: Sequence[Reference]) -> float:
    """Error of the final latents of ``model``, sampled on its own from the same noise."""
    return relative_error((sample(model, run.inputs, run.settings), run.final, run.inputs.frame_mask) for run in runs)


def groups_of(layers: Iterable[Layer]) -> dict[str, tuple[Layer, ...]]:
    """What of ``layers`` is switched together: every layer of a block on its own, the edges by graph."""
    found: dict[str, tuple[Layer, ...]] = {}
    for layer in layers:
        name = layer.name if layer.group == "block" else layer.graph
        found[name] = (*found.get(name, ()), layer)
    return found


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Result of a sweep: velocity errors by group, latents errors of the groups that matter most."""

    velocity: dict[str, BandErrors]
    latents: dict[str, float]


def sweep(
    quantized: Stiv,
    runs: Sequence[Reference],
    state: Path,
    fingerprint: str,
    progress: Progress = unheard,
) -> Sweep:
    """Switch on one group at a time of a model with all layers quantized that can be.

    Progress is kept in the file ``state``; ``fingerprint`` tells sweeps apart that must not be mixed.
    """
    groups = groups_of(quantized_layers(quantized))
    velocity, latents = load_state(state, fingerprint)
    total = len(groups) + min(FINAL, len(groups))

    def advance() -> None:
        saved = {"fingerprint": fingerprint, "velocity": velocity, "latents": latents}
        write_text(state, json.dumps(saved))
        progress("sweeping", len(velocity) + len(latents), total)

    progress("sweeping", len(velocity) + len(latents), total)
    for name in [each for each in groups if each not in velocity]:
        switch_on(quantized, groups[name])
        velocity[name] = velocity_errors(quantized, runs)
        advance()
    for name in sorted(groups, key=lambda each: -max(velocity[each]))[:FINAL]:
        if name not in latents:
            switch_on(quantized, groups[name])
            latents[name] = latents_error(quantized, runs)
            advance()
    return Sweep(velocity={name: velocity[name] for name in groups}, latents=latents)


def load_state(path: Path, fingerprint: str) -> tuple[dict[str, BandErrors], dict[str, float]]:
    """Errors found so far; :class:`CalibrationError` if the file is of another sweep or damaged."""
    if not path.exists():
        return {}, {}
    remedy = "delete it to start anew, or choose another --out"
    try:
        saved = parse_json(read_text(path))
        found = saved["fingerprint"], saved["velocity"], saved["latents"]
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path}: not a readable sweep state ({error}); {remedy}") from None
    if found[0] != fingerprint:
        raise CalibrationError(f"{path}: a sweep with other settings was stopped here; {remedy}")
    return {name: tuple(errors) for name, errors in found[1].items()}, dict(found[2])
