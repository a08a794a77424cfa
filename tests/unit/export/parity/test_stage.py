"""The stage of ``stiv parity``: what it asks before it measures."""

import errno
from pathlib import Path

import pytest

from stiv_deploy.export.parity import stage
from stiv_deploy.export.parity.stage import ParityRequest, run_parity
from stiv_deploy.runtime.errors import OutputError


def test_a_bundle_that_cannot_keep_the_rows_is_told_before_the_first_measurement(
    words_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(stage, "open_subject", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(OutputError, match=r"takes no files \(Read-only file system\); give --no-record"):
        run_parity(ParityRequest(bundle=words_bundle))
