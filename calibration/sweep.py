"""A sweep from calibrated scales to a precision plan: every group measured, whole plans compared, all of it written."""

import hashlib

from stiv_deploy.calibration.budget import Fitted, estimated_errors, fit
from stiv_deploy.calibration.layers import quantizable_layers
from stiv_deploy.calibration.observers import BANDS, band_names
from stiv_deploy.calibration.plan import PrecisionPlan, default_plan, everything, save_plan
from stiv_deploy.calibration.quantize import quantized_copy, quantized_layers, switch_on
from stiv_deploy.calibration.request import CalibrationRequest
from stiv_deploy.calibration.run import Calibration
from stiv_deploy.calibration.sensitivity import (
    BandErrors,
    groups_of,
    latents_error,
    reference_runs,
    sweep,
    velocity_errors,
)
from stiv_deploy.calibration.sweep_files import PlanRow, SweepReport, save_sweep
from stiv_deploy.stiv_ref.progress import Progress


class PlanMeter:
    """Measures whole plans against the reference, on one model whose quantizers are switched."""

    def __init__(self, calibration: Calibration, steps: int) -> None:
        self.model = calibration.checkpoint.model
        self.references = reference_runs(calibration.checkpoint, calibration.material, steps)
        layers = quantizable_layers(self.model.config, calibration.scales.quantization)
        self.quantized = quantized_copy(self.model, calibration.scales, layers)

    def _switch(self, plan: PrecisionPlan) -> None:
        switch_on(self.quantized, [layer for layer in quantized_layers(self.quantized) if plan.quantized(layer.name)])

    def velocity(self, plan: PrecisionPlan) -> BandErrors:
        """Relative L2 errors of the guided velocity by band."""
        self._switch(plan)
        return velocity_errors(self.quantized, self.references)

    def latents(self, plan: PrecisionPlan) -> float:
        """Relative L2 error of the final latents."""
        self._switch(plan)
        return latents_error(self.quantized, self.references)


def run_sweep(calibration: Calibration, request: CalibrationRequest, progress: Progress) -> SweepReport:
    """Sweep, choose a plan within ``request.budget`` (without one: the default plan), write plan, figures and picture.

    Goes on from where an interrupted sweep of the same scales was.
    """
    scales, config = calibration.scales, calibration.checkpoint.config.model
    meter = PlanMeter(calibration, request.settings.steps)
    fingerprint = hashlib.sha256(scales.provenance.model_dump_json().encode()).hexdigest()
    found = sweep(
        meter.quantized,
        meter.references,
        request.sweep_state,
        fingerprint,
        progress,
    )
    default = default_plan(config, scales.quantization)
    rows = [_row("everything", everything(config, scales.quantization), meter, found.velocity)]
    rows.append(_row("default", default, meter, found.velocity))
    plan = default
    if request.budget is not None:
        fitted = fit(config, found.velocity, default, request.budget, meter.velocity)
        plan = fitted.plan
        rows.append(_fitted_row(f"within {request.budget:g}", fitted, meter))
    report = SweepReport(
        quantization=scales.quantization,
        checkpoint=scales.provenance.checkpoint,
        bands=band_names()[:BANDS],
        velocity=dict(found.velocity),
        latents=dict(found.latents),
        budget=request.budget,
        plans=tuple(rows),
    )
    save_sweep(request.out, report)
    save_plan(request.plan_path, plan)
    return report


def _row(name: str, plan: PrecisionPlan, meter: PlanMeter, velocity: dict[str, BandErrors]) -> PlanRow:
    groups = groups_of(quantized_layers(meter.quantized))
    quantized = [group for group, layers in groups.items() if plan.quantized(layers[0].name)]
    return PlanRow(
        plan=name,
        high=(),
        estimated=estimated_errors(velocity, quantized),
        measured=meter.velocity(plan),
        latents=meter.latents(plan),
    )


def _fitted_row(name: str, fitted: Fitted, meter: PlanMeter) -> PlanRow:
    return PlanRow(
        plan=name,
        high=fitted.high,
        estimated=fitted.estimated,
        measured=fitted.measured,
        latents=meter.latents(fitted.plan),
    )
