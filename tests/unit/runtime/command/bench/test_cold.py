"""A fresh process, and what it tells."""

import io
import json
from pathlib import Path

import pytest

from stiv_deploy.runtime.command.bench.cold import cold_start, main
from stiv_deploy.runtime.errors import MeasurementError


def order(bundle: Path) -> dict[str, object]:
    where = {"backend": "onnxruntime", "device": 0, "threads": 1}
    return {"bundle": str(bundle), "requests": [{"prompt": "digit", "seed": 1}], **where}


def test_the_child_makes_a_clip(bundle_path: Path) -> None:
    target = io.StringIO()
    main(io.StringIO(json.dumps(order(bundle_path))), target)
    told = json.loads(target.getvalue())
    assert told["peak_bytes"] > 2**20
    assert all(told[name] >= 0 for name in ("imported", "opened", "first"))


def test_a_process_of_its_own(bundle_path: Path) -> None:
    found = cold_start(order(bundle_path))
    assert found.seconds >= found.imported + found.opened + found.first > 0
    with pytest.raises(MeasurementError, match="the cold start failed: .*no such folder"):
        cold_start(order(bundle_path / "absent"))
