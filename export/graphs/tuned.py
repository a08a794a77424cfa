"""The file of a checkpoint's tuned sampling defaults, and how they become those of a bundle."""

from typing import Literal

from stiv_deploy.runtime.bundle.bounds import Digest
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.bundle.tuned import Tuned
from stiv_deploy.stiv_ref.checkpoint import CheckpointFolder
from stiv_deploy.stiv_ref.config import FrozenConfig, read_config
from stiv_deploy.stiv_ref.errors import CheckpointError

TUNED = "tuned.json"
"""In a checkpoint's folder; no part of the checkpoint's hash."""


class CheckpointTuned(FrozenConfig):
    """What ``stiv tune`` found of the checkpoint with the hash ``checkpoint``; the bundle that it names is gone."""

    format: Literal["stiv-tuned"] = "stiv-tuned"
    format_version: Literal[1] = 1
    checkpoint: Digest
    tuned: Tuned


def read_tuned(checkpoint: CheckpointFolder) -> Tuned | None:
    """Tuned defaults of ``checkpoint``, None if it has none.

    Raises :class:`CheckpointError` for another checkpoint's, :class:`~stiv_deploy.stiv_ref.errors.ConfigError` for a
    file that is something else.
    """
    path = checkpoint.path / TUNED
    if not path.exists():
        return None
    kept = read_config(CheckpointTuned, path)
    if kept.checkpoint != checkpoint.sha256:
        raise CheckpointError(
            f"{path}: is of the checkpoint {kept.checkpoint[:12]}, this is {checkpoint.sha256[:12]}; "
            f"remove it, or run: stiv tune {checkpoint.path}"
        )
    return kept.tuned


def with_tuned(manifest: Manifest, found: Tuned | None) -> Manifest:
    """``manifest`` with what was ``found`` of its checkpoint, as its own defaults."""
    if found is None:
        return manifest
    return manifest.model_copy(update={"tuned": found.model_copy(update={"bundle": manifest.bundle_hash})})
