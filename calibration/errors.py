"""Errors of the calibration that a user can cause and mend."""

from stiv_deploy.stiv_ref.errors import StivRefError


class CalibrationError(StivRefError):
    """A calibration run, scale file or precision plan is not possible or does not fit its checkpoint."""
