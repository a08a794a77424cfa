"""Tuned sampling defaults of a checkpoint: found in a bundle of it, kept beside it, part of each bundle made later."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.graphs.tuned import TUNED, CheckpointTuned
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.files import make_folder, write_text
from stiv_deploy.runtime.pipeline.tuning import TuneReport, TuneRequest, tune, tuned
from stiv_deploy.runtime.progress import Progress, unheard
from stiv_deploy.stiv_ref.checkpoint import open_checkpoint


def tune_checkpoint(request: TuneRequest, progress: Progress = unheard) -> TuneReport:
    """:func:`~stiv_deploy.runtime.pipeline.tuning.tune` of the checkpoint ``request.bundle``, in a bundle made for it.

    With ``record`` the best are kept in the checkpoint's folder, and ``stiv export`` makes them defaults of bundles.
    Raises what :func:`export_bundle` and the tuning do, and
    :class:`~stiv_deploy.runtime.errors.OutputError` where nothing can be written, before anything is computed.
    """
    checkpoint = open_checkpoint(request.bundle)
    if request.record:
        make_folder(checkpoint.path, "give --no-record, or copy the checkpoint to a folder you own")
    with TemporaryDirectory(prefix="stiv-tune-") as folder:
        bundle = Path(folder) / "bundle"
        student = checkpoint.config.model.student
        skips = student is None or not student.flow_map
        export_bundle(ExportRequest(checkpoint=checkpoint.path, out=bundle, tuned=False, skips=skips), progress)
        report = tune(replace(request, bundle=bundle, record=False), progress)
    if request.record:
        kept = CheckpointTuned(checkpoint=checkpoint.sha256, tuned=tuned(report))
        write_text(checkpoint.path / TUNED, kept.model_dump_json(indent=2) + "\n")
    return report
