"""What a calibration is asked for, checked before anything is loaded, and the files that it leaves."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from stiv_deploy.calibration.collect import CalibrationSettings, Calibrator
from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import Format


def usual_calibrator(quantization: Format, smooth: float | None = None) -> Calibrator:
    """``percentile`` for INT8, unless SmoothQuant takes its factors from the largest magnitudes; else ``max``."""
    return "percentile" if quantization == "int8" and smooth is None else "max"


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """Scales of ``checkpoint`` for ``quantization``, to be written to ``out`` with their report beside them.

    ``smooth`` is SmoothQuant's alpha. With ``sweep`` layers are measured one by one, and a precision plan is written,
    within the ``budget`` (a relative L2 error of the velocity) if there is one. Raises :class:`CalibrationError` where
    these do not go together.
    """

    checkpoint: Path
    quantization: Format
    out: Path
    settings: CalibrationSettings = CalibrationSettings()
    prompts: Path | None = None
    images: Path | None = None
    per_channel: bool = False
    smooth: float | None = None
    sweep: bool = False
    budget: float | None = None
    plan: Path | None = None

    def __post_init__(self) -> None:
        if self.quantization not in get_args(Format):
            formats = ", ".join(get_args(Format))
            raise CalibrationError(f"--precision {self.quantization}: cannot be calibrated; use {formats}")
        self._check_weights()
        self._check_sweep()
        if self.out.suffix != ".safetensors":
            raise CalibrationError(
                f"--out {self.out}: scales are a safetensors file; name it so, as in scales.safetensors"
            )

    def _check_weights(self) -> None:
        """SmoothQuant and ranges by channel against the rest."""
        if self.smooth is not None:
            if not 0 < self.smooth <= 1:
                raise CalibrationError(f"--smoothquant {self.smooth:g}: alpha must be above 0 and at most 1")
            if self.quantization != "int8":
                raise CalibrationError(
                    "--smoothquant is for --precision int8; E4M3 has the range for outliers, NVFP4 scales by block"
                )
            if self.settings.calibrator != "max":
                raise CalibrationError("--smoothquant needs --calibrator max: its factors come from largest magnitudes")
        if self.per_channel and self.quantization != "fp8":
            finer = {"int8": "per channel", "nvfp4": "in blocks of 16"}[self.quantization]
            raise CalibrationError(
                f"--per-channel is for --precision fp8; {self.quantization} weights are {finer} anyway"
            )

    def _check_sweep(self) -> None:
        if self.budget is not None and not (self.sweep and 0 < self.budget < math.inf):
            wanted = "needs --sweep" if 0 < self.budget < math.inf else "must be positive and finite, such as 0.05"
            raise CalibrationError(f"--budget {self.budget:g}: {wanted}")
        if self.plan is not None and not self.sweep:
            raise CalibrationError(f"--plan {self.plan}: is written by a sweep; add --sweep")

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


def check_files(request: CalibrationRequest) -> None:
    """:class:`CalibrationError` if a file to read is not there, or one to write cannot be made."""
    for path, wanted in ((request.prompts, "file of prompts"), (request.images, "folder of images")):
        if path is not None and not path.exists():
            raise CalibrationError(f"{path}: no such {wanted}")
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
