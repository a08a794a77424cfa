"""Errors of the export that a user can cause and mend."""

from stiv_deploy.runtime.errors import StivError


class ExportError(StivError):
    """The export was asked for something impossible: a range, a precision, or a model that does not fit."""


class CheckError(StivError):
    """A written graph does not do what the contract or the reference says; the bundle is not kept."""

    exit_code = 1


class ReportError(StivError):
    """A file is no layer report, or says too little to audit."""
