"""What came out of a stage, in a few words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stiv_deploy.calibration.stage import CalibrationReport
    from stiv_deploy.export.audit.audit import AuditReport
    from stiv_deploy.export.bundle_from_checkpoint import ExportReport
    from stiv_deploy.export.engines.build import BuildReport
    from stiv_deploy.export.parity.ladder import ParityReport
    from stiv_deploy.runtime.pipeline.long_stage import LongReport
    from stiv_deploy.runtime.pipeline.stage import ClipsReport
    from stiv_deploy.runtime.pipeline.views_stage import ViewsReport

MIB = 2**20


def calibrated(report: "CalibrationReport") -> str:
    """The scales."""
    return f"{report.quantization} scales in {report.scales.name}"


def exported(report: "ExportReport") -> str:
    """The bundle, without where it is."""
    return str(report).partition(": ")[2].rpartition(", ")[0]


def built(report: "BuildReport") -> str:
    """Engines: how many, how large, how many of them from the cache."""
    size = sum(engine.plan.bytes for engine in report.engines) / MIB
    cached = sum(engine.cached for engine in report.engines)
    made = f"{len(report.engines)} engines, {size:.1f} MiB, by {report.backend} {report.version}"
    return f"{made}; {cached} from the cache" if cached else made


def audited(report: "AuditReport") -> str:
    """Checks, and how many failed."""
    failed = sum(not row.passed for row in report.rows)
    return f"{len(report.rows)} checks on {len(report.engines)} engines, {failed or 'none'} failed"


def compared(report: "ParityReport") -> str:
    """Gates, and how many were missed."""
    missed = sum(not row.passed for row in report.rows) + sum(not gate.passed for gate in report.video)
    return f"{len(report.rows)} errors and {len(report.video)} properties of videos, {missed or 'none'} missed its gate"


def generated(report: "ClipsReport") -> str:
    """Files, and the time of generation alone."""
    names = ", ".join(path.name for path in report.written)
    return f"{names} in {report.output.timings['total']:.1f} s on {report.output.backend}"


def prolonged(report: "LongReport") -> str:
    """The file, its frames, and of how many clips they are."""
    chain = report.output.chain
    return f"{report.written.name}: {chain.frames} frames of {chain.chunks} clips, {report.output.made} made now"


def turned(report: "ViewsReport") -> str:
    """The file, and how many views are in it."""
    return f"{report.written.name}: {len(report.views.cameras)} views in {report.views.output.timings['total']:.1f} s"
