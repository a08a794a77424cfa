"""The stage of ``stiv parity``: bundle, checkpoint and scales opened, every backend measured, the rows kept."""

from dataclasses import dataclass
from pathlib import Path

from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.parity.files import Sources, open_subject, record_rows
from stiv_deploy.export.parity.ladder import ParityReport, climb
from stiv_deploy.runtime.backends import runnable
from stiv_deploy.runtime.bundle.bounds import STEP_LIMIT
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.files import make_folder
from stiv_deploy.runtime.progress import Progress, unheard

LEAST_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class ParityRequest(Sources):
    """A measurement of the bundle in the folder ``bundle``, along trajectories of so many ``steps``.

    Without ``backends`` all that can run the bundle here are taken. ``record`` keeps the rows in the bundle's manifest.
    Raises :class:`ExportError` for too few or too many steps.
    """

    bundle: Path
    backends: tuple[str, ...] = ()
    steps: int = 10
    record: bool = True

    def __post_init__(self) -> None:
        if not LEAST_STEPS <= self.steps <= STEP_LIMIT:
            raise ExportError(f"--steps {self.steps}: a trajectory has at least {LEAST_STEPS} and at most {STEP_LIMIT}")


def run_parity(request: ParityRequest, progress: Progress = unheard) -> ParityReport:
    """Climb the ladder on each backend; a gate that fails is in the report.

    Raises :class:`~stiv_deploy.runtime.errors.BundleError`, :class:`~stiv_deploy.runtime.errors.BackendError`,
    :class:`~stiv_deploy.stiv_ref.errors.CheckpointError` or :class:`~stiv_deploy.calibration.errors.CalibrationError`
    or :class:`~stiv_deploy.runtime.errors.OutputError` (rows cannot be kept) before the first measurement.
    """
    bundle = Bundle.open(request.bundle)
    if request.record:
        make_folder(bundle.folder, "give --no-record, or copy the bundle to a folder you own")
    backends = runnable(bundle, request.backends)
    progress("loading the checkpoint", 0, 1)
    subject = open_subject(bundle, request)
    report = climb(subject, backends, request.steps, progress)
    if request.record:
        record_rows(bundle, report)
    return report
