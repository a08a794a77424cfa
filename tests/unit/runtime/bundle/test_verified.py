"""Results of ``stiv verify``: kept beside the bundle, and good for what they were made of alone."""

from pathlib import Path

import pytest

from stiv_deploy.runtime.bundle.bundle import Bundle, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.verified import Machine, VerifyResult, keep_result, read_result, results_file

MACHINE = Machine(backend="tensorrt", device="Fake GPU", driver="580.1", library="TensorRT 11.0", engines="e" * 64)


def result(bundle: Path, **changes: object) -> VerifyResult:
    opened = Bundle.open(bundle)
    assert opened.manifest.golden is not None
    values = {
        "bundle": opened.hash,
        "answers": opened.manifest.golden.sha256,
        "machine": MACHINE,
        "quick": False,
        "compared": 4,
        "failed": (),
        "finished": "2026-11-28T18:00:00Z",
    }
    return VerifyResult.model_validate(values | changes)


def test_a_result_holds_for_what_it_was_made_of(proven: Path) -> None:
    bundle = Bundle.open(proven)
    assert read_result(bundle, MACHINE).state == "not verified"
    keep_result(proven, result(proven))
    verdict = read_result(bundle, MACHINE)
    assert (verdict.state, verdict.result) == ("verified", result(proven))
    for change in ("device", "driver", "library"):
        assert read_result(bundle, MACHINE.model_copy(update={change: "another"})).state == "not verified"
    assert read_result(bundle, MACHINE.model_copy(update={"engines": "f" * 64})).state == "not verified"
    assert not any("verified" in each.name for each in proven.iterdir())


def test_a_failure_names_what_was_wrong(proven: Path) -> None:
    keep_result(proven, result(proven, failed=("block_01",)))
    verdict = read_result(Bundle.open(proven), MACHINE)
    assert (verdict.state, verdict.reason) == ("failed", "block_01 gave wrong results in 'stiv verify'")
    keep_result(proven, result(proven))
    assert read_result(Bundle.open(proven), MACHINE).state == "verified"


def test_a_quick_result_does_not_stand_for_a_whole_one(proven: Path) -> None:
    keep_result(proven, result(proven))
    keep_result(proven, result(proven, quick=True))
    assert read_result(Bundle.open(proven), MACHINE).result == result(proven)
    keep_result(proven, result(proven, quick=True, failed=("head",)))
    assert read_result(Bundle.open(proven), MACHINE).state == "failed"


def test_results_of_several_stand_side_by_side(proven: Path) -> None:
    other = MACHINE.model_copy(update={"backend": "onnxruntime", "engines": None})
    keep_result(proven, result(proven))
    keep_result(proven, result(proven, machine=other, failed=("head",)))
    states = [read_result(Bundle.open(proven), each).state for each in (MACHINE, other)]
    assert states == ["verified", "failed"]


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"results": [{"bundle": 1}]}'])
def test_what_is_no_such_file_is_nothing(proven: Path, text: str) -> None:
    results_file(proven).write_text(text)
    assert read_result(Bundle.open(proven), MACHINE).state == "not verified"
    keep_result(proven, result(proven))
    assert read_result(Bundle.open(proven), MACHINE).state == "verified"


def test_an_older_bundle_is_not_verified(proven: Path) -> None:
    keep_result(proven, result(proven))
    write_manifest(proven, read_manifest(proven).model_copy(update={"golden": None}))
    assert "an older export" in read_result(Bundle.open(proven), MACHINE).reason
