"""The mixed load in miniature: both ways make the same clips, and what is reported is about them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle


@pytest.mark.slow
def test_both_ways_make_the_same_clips(
    benchmark_module: Callable[[str], ModuleType], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = benchmark_module("mixed_load")
    monkeypatch.setattr(
        script, "LOAD", tuple(replace(each, steps=2 + index % 2) for index, each in enumerate(script.LOAD[:4]))
    )
    opened = Bundle.open(bundle)
    load = script.Load(opened, OnnxRuntimeBackend(opened, threads=1), slots=3, rungs=(2, 6))
    result = script.measure(load, repeats=1)
    assert result["rel_l2_between"] < 1e-5, "other numbers of rows are other sums: the gate of a float32 graph"
    assert 0 < result["rows_filled"] <= 1
    assert result["ratio"] > 0
    json.dumps(result)
