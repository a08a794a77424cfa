"""The stage of ``stiv calibrate``: ranges of 8-bit layers, and with a sweep the plan that they are used by."""

import time
from pathlib import Path

from stiv_deploy.calibration.layers import Format
from stiv_deploy.calibration.request import CalibrationRequest
from stiv_deploy.calibration.run import make_scales
from stiv_deploy.calibration.sweep import run_sweep
from stiv_deploy.calibration.sweep_files import SweepReport
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.files import told
from stiv_deploy.stiv_ref.progress import Progress, unheard


class CalibrationReport(FrozenConfig):
    """What a calibration wrote: scales of a checkpoint (its hash), and with a sweep its figures and the plan."""

    scales: Path
    quantization: Format
    checkpoint: str
    sweep: SweepReport | None
    plan: Path | None
    seconds: float


def calibrate(request: CalibrationRequest, progress: Progress = unheard) -> CalibrationReport:
    """Write the scales that ``request`` asks for, and the plan if it asks for a sweep.

    A stopped run goes on where it was; what is kept for that is deleted at the end. Raises
    :class:`~stiv_deploy.calibration.errors.CalibrationError` or
    :class:`~stiv_deploy.stiv_ref.errors.CheckpointError`, before anything expensive where possible, and
    :class:`~stiv_deploy.stiv_ref.errors.OutputError` if something cannot be written, as on a full disk.
    """
    started = time.monotonic()
    with told(request.out, "what was sampled is kept: mend that, and the same command goes on from it"):
        found = make_scales(request, progress)
        sweep = run_sweep(found, request, progress) if request.sweep else None
        request.state.unlink(missing_ok=True)
        request.sweep_state.unlink(missing_ok=True)
    return CalibrationReport(
        scales=request.out,
        quantization=request.quantization,
        checkpoint=found.scales.provenance.checkpoint,
        sweep=sweep,
        plan=request.plan_path if request.sweep else None,
        seconds=time.monotonic() - started,
    )
