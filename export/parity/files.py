"""Files around a parity run: bundle, checkpoint and scales, the JSON report, the rows in the manifest."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stiv_deploy.calibration.scales import Scales, load_scales
from stiv_deploy.export.graphs.lora import merge_loras
from stiv_deploy.export.parity.ladder import ParityReport, Subject
from stiv_deploy.runtime.bundle.bundle import Bundle, write_manifest
from stiv_deploy.runtime.bundle.lora import Lora, read_lora
from stiv_deploy.runtime.errors import BundleError
from stiv_deploy.runtime.files import sha256
from stiv_deploy.stiv_ref.checkpoint import CheckpointFolder, open_checkpoint
from stiv_deploy.stiv_ref.errors import StivRefError

CHECKPOINTS = Path("checkpoints")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a bundle was exported from: its ``checkpoint``, its ``scales``, the ``loras`` that were merged.

    Without ``checkpoint`` it is the one among the folders in ``checkpoints`` with the bundle's hash, without ``scales``
    and ``loras`` they are the files with their hashes in or beside the bundle.
    """

    checkpoint: Path | None = None
    checkpoints: Path = CHECKPOINTS
    scales: Path | None = None
    loras: tuple[Path, ...] = ()


def open_subject(bundle: Bundle, sources: Sources) -> Subject:
    """``bundle`` with its checkpoint, LoRAs merged, and scales.

    Raises :class:`BundleError` if they are other ones or not found, before the checkpoint is loaded.
    """
    given = sources.checkpoint
    found = _below(sources.checkpoints, bundle) if given is None else _named(given, bundle)
    near = Near(bundle)
    ranges = opened_scales(bundle, sources.scales, near)
    merged = loras_of(bundle, sources.loras, near)
    loaded = found.load()
    merge_loras(loaded, merged)
    return Subject(bundle=bundle, checkpoint=loaded, scales=ranges)


class Near:
    """Files of tensors in a bundle's folder and beside it, found by their hashes; none is hashed twice."""

    def __init__(self, bundle: Bundle) -> None:
        folders = (bundle.folder, bundle.folder.absolute().parent)
        self._paths = [path for folder in folders for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
        self._hash = cache(sha256)

    def find(self, digest: str) -> Path | None:
        """The first file with the SHA-256 ``digest``, if there is one."""
        return next((path for path in self._paths if self._hash(path) == digest), None)


def _below(folder: Path, bundle: Bundle) -> CheckpointFolder:
    """The checkpoint of ``bundle`` among the folders in ``folder``; what is no whole checkpoint there is passed by."""
    for config in sorted(folder.glob("*/config.json")):
        with suppress(StivRefError):
            opened = open_checkpoint(config.parent)
            if opened.sha256 == bundle.manifest.checkpoint:
                return opened
    raise BundleError(
        f"{bundle.folder}: the checkpoint it was exported from is not below {folder}/; name it with --checkpoint"
    )


def _named(checkpoint: Path, bundle: Bundle) -> CheckpointFolder:
    opened, wanted = open_checkpoint(checkpoint), bundle.manifest.checkpoint
    if opened.sha256 != wanted:
        raise BundleError(
            f"{checkpoint} (hash {opened.sha256[:12]}) is not what {bundle.folder} was exported from (hash "
            f"{wanted[:12]}); name the right one, or run 'stiv export {checkpoint} --out {bundle.folder}'"
        )
    return opened


def opened_scales(bundle: Bundle, scales: Path | None, near: Near | None = None) -> Scales | None:
    """The scales that ``bundle`` was exported with, None for one without 8-bit layers.

    By default they are looked for by their hash in the bundle's folder and beside it. Raises :class:`BundleError` if
    they are not there or others, :class:`~stiv_deploy.calibration.errors.CalibrationError` if the file is damaged.
    """
    record = bundle.manifest.quantization
    if record is None:
        if scales is not None:
            raise BundleError(f"{bundle.folder}: this bundle has no 8-bit layers; leave out --scales")
        return None
    if scales is None:
        scales = (near or Near(bundle)).find(record.scales)
        if scales is None:
            raise BundleError(
                f"{bundle.folder}: the scales it was exported with are neither in it nor beside it; "
                "name the file with --scales"
            )
    elif not scales.is_file() or sha256(scales) != record.scales:
        what = "not what this bundle was exported with" if scales.is_file() else "no such file"
        raise BundleError(f"{scales}: {what} (SHA-256 {record.scales[:12]}); name the right scales with --scales")
    return load_scales(scales)


def loras_of(bundle: Bundle, named: Sequence[Path], near: Near) -> tuple[Lora, ...]:
    """What was merged into ``bundle``, from the files ``named``, or those ``near`` it.

    Raises :class:`BundleError` for a file that is not there, or that was not merged.
    """
    records = bundle.manifest.lora
    known = {sha256(path) if path.is_file() else "": path for path in named}
    if strange := [path for digest, path in known.items() if digest not in {each.sha256 for each in records}]:
        raise BundleError(f"{strange[0]}: no LoRA that was merged into {bundle.folder}; name those that were")
    found = [known.get(each.sha256) if named else near.find(each.sha256) for each in records]
    if missing := [each for each, path in zip(records, found, strict=True) if path is None]:
        raise BundleError(
            f"{bundle.folder}: the LoRA {missing[0].name} (SHA-256 {missing[0].sha256[:12]}) that was merged into it "
            "is neither in it nor beside it; name the file with --lora"
        )
    return tuple(read_lora(path, each.scale) for each, path in zip(records, found, strict=True) if path is not None)


def report_json(report: ParityReport) -> str:
    """The report as JSON: ``{"passed", "rows": [...], "video": [...]}``; a number that is not finite becomes null."""

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        finite = {key: isinstance(value, float) and not math.isfinite(value) for key, value in values.items()}
        return {key: None if finite[key] else value for key, value in values.items()}

    rows = [
        plain({**row.model_dump(), "plain_torch": yardstick})
        for row, yardstick in zip(report.rows, report.yardsticks, strict=True)
    ]
    video = [
        plain(
            {"name": gate.name, "backend": gate.backend, "value": gate.value, "gate": gate.gate, "passed": gate.passed}
        )
        for gate in report.video
    ]
    return json.dumps({"passed": report.passed, "rows": rows, "video": video}, indent=2)


def record_rows(bundle: Bundle, report: ParityReport) -> None:
    """Put the rows into the bundle's manifest."""
    write_manifest(bundle.folder, bundle.manifest.model_copy(update={"parity": report.rows}))
