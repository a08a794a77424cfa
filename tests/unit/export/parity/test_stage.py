"""The stage of ``stiv parity``: what it asks before it measures, and the files that it finds."""

import errno
from pathlib import Path

import pytest

from stiv_deploy.export.parity import files, stage
from stiv_deploy.export.parity.files import Near
from stiv_deploy.export.parity.stage import ParityRequest, run_parity
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.files import sha256


def test_a_bundle_that_cannot_keep_the_rows_is_told_before_the_first_measurement(
    words_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(stage, "open_subject", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(OutputError, match=r"takes no files \(Read-only file system\); give --no-record"):
        run_parity(ParityRequest(bundle=words_bundle))


def test_files_near_a_bundle_are_hashed_once(words_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is looked for, and how often; a folder of that name is no file."""
    inside, beside = words_bundle / "b.safetensors", words_bundle.parent / "a.safetensors"
    inside.write_text("inside")
    beside.write_text("beside")
    (words_bundle / "c.safetensors").mkdir()
    hashed: list[Path] = []
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path) or sha256(path))
    near = Near(Bundle.open(words_bundle))
    for path in (inside, beside, inside):
        assert near.find(sha256(path)) == path
    assert near.find("0" * 64) is None
    assert hashed == [inside, beside]
