"""Golden answers of a bundle: read with its hash, refused where they are not of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.golden import GOLDEN, answer, read_golden
from stiv_deploy.runtime.errors import BundleError


def test_an_error_is_relative() -> None:
    truth = np.random.default_rng(0).standard_normal((7, 90))
    right = answer("x", truth, 1e-3)
    assert right.error(truth) == 0
    assert right.error(truth * 1.01) == pytest.approx(0.01, rel=0.3)
    assert right.error(np.where(truth > 3, np.inf, truth * np.nan)) == np.inf
    assert answer("x", truth * 0, 1e-3).error(truth) == np.inf
    assert answer("x", truth * 0, 1e-3).error(truth * 0) == 0


def test_answers_are_those_of_the_file(proven: Path) -> None:
    golden = read_golden(Bundle.open(proven))
    assert {each.graph for each in golden.graphs} == set(Bundle.open(proven).manifest.graphs)


def test_an_older_bundle_has_none(own_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no golden answers, an older export made it; make the bundle again"):
        read_golden(Bundle.open(own_bundle))


WRONG = {
    "graph": ({"graph": "block_77"}, "knows a graph 'block_77'"),
    "output": ({"outputs": [{"name": "y", "norm": 1, "sketch": "", "gate": 1}]}, "a sketch has 64 numbers"),
    "size": (
        {"sizes": {"batch": 1, "model_batch": 1, "video_frames": 1, "height": 7, "width": 8, "text_tokens": 1}},
        "7",
    ),
    "zeros": ({"sizes": {"batch": 0}}, "sizes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_answers_of_something_else_are_refused(proven: Path, case: str) -> None:
    changes, words = WRONG[case]
    values = json.loads((proven / GOLDEN).read_text())
    values["graphs"][0] |= changes
    rewrite(proven, values)
    with pytest.raises(BundleError, match="make the bundle again") as caught:
        read_golden(Bundle.open(proven))
    assert words in str(caught.value) or case == "size"
    assert "\n" not in str(caught.value)


def rewrite(folder: Path, values: Any) -> None:
    """New answers, with a manifest that believes them."""
    (folder / GOLDEN).write_text(json.dumps(values))
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"golden": file_record(folder, GOLDEN)}))


def test_what_is_no_json_is_refused(proven: Path) -> None:
    rewrite(proven, [])
    (proven / GOLDEN).write_text("{")
    record = file_record(proven, GOLDEN)
    write_manifest(proven, read_manifest(proven).model_copy(update={"golden": record}))
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        read_golden(Bundle.open(proven))


def test_damage_is_found_by_the_hash(proven: Path) -> None:
    text = (proven / GOLDEN).read_text()
    (proven / GOLDEN).write_text(text.replace('"gate":1e-6', '"gate":1e+6'))
    with pytest.raises(BundleError, match="damaged"):
        read_golden(Bundle.open(proven))
