"""Planted faults in the toy bundle: what is beyond a gate is caught, and right graphs are not."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer

sys.path.append(str(Path(__file__).parents[1]))
from toys import Toy, make_bundle, with_answers, with_runs

from stiv_deploy.runtime.bundle.bundle import Bundle

ABSENT = {"swapped rows", "scale of a quantizer", "swapped scales", "lost quantizer", "moved quantizer"}
"""The toy has no matrix, and no quantizers."""
COUNT = 18
"""Faults of 24 that find a place."""


@pytest.fixture
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("mutations")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return with_answers(make_bundle(tmp_path / "bundle", Toy()))


def test_none_is_missed_and_none_is_a_false_alarm(script: ModuleType, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    script.main(bundle, faults=24, clean=2, seed=1, checkpoint=None, audit=False, out=out)
    report = json.loads(out.read_text())
    assert sum(each["planted"] for each in report["kinds"].values()) == COUNT
    assert sum(each.get("caught", 0) for each in report["kinds"].values()) >= COUNT - 5
    assert all(each["by hashes"] == each["planted"] for each in report["kinds"].values())
    assert report["clean"]["alarms"] == 0
    assert {each["state"] for each in report["not caught"]} <= {"hidden", "equal"}
    assert report["all"]["planted"] == COUNT
    assert report["all"]["beyond a gate and not caught"] == 0
    assert report["all"]["caught by verify, or by the hash of a file"] == 1


def test_a_gate_that_is_too_tight_is_a_false_alarm(script: ModuleType, tmp_path: Path) -> None:
    bundle = with_answers(make_bundle(tmp_path / "bundle", Toy()), gate=1e-12)
    with pytest.raises(typer.Exit):
        script.main(bundle, faults=8, clean=1, seed=0, checkpoint=None, audit=False, out=None)


def test_faults_change_the_graph(script: ModuleType, bundle: Path) -> None:
    models = script.Subject(Bundle.open(bundle)).models
    for fault in set(script.PLANTS) - ABSENT:
        before = {name: model.SerializeToString() for name, model in models.items()}
        assert any(script.PLANTS[fault](model.graph, random.Random(3)) for model in models.values()), fault
        assert any(model.SerializeToString() != before[name] for name, model in models.items()), fault


def test_faults_of_the_runtime_are_caught_by_runs_alone(script: ModuleType, bundle: Path) -> None:
    assert list(script.planted_in_runtime(Bundle.open(bundle))) == [], "without runs there is nothing to ask"
    opened = Bundle.open(with_runs(bundle))
    assert script.played_share(script.played(opened)) < 1
    outcomes = list(script.planted_in_runtime(opened))
    states = {each.where: each.state for each in outcomes if each.state != "caught"}
    assert set(states) == {"tables: sine for cosine", "blocks: in reverse"}, (
        "the toy adds both tables, and its blocks up"
    )
    assert set(states.values()) <= {"equal", "hidden"}
    assert len(outcomes) > 30
    assert not any(each.hashes for each in outcomes)
    assert script.played_share(script.played(opened)) < 1, "all faults are gone"


QUANTIZED = """<ir_version: 10, opset_import: ["": 20]> g (float[2,4] x, float[2,4] z) => (float[2,4] y)
<float a = {0.1}, float b = {0.2}, int8 zero = {0}, float[4,4] w = {1,2,0,3, 0,1,5,0, 7,0,1,0, 0,1,0,1}>
{
    q = QuantizeLinear (x, a, zero)
    d = DequantizeLinear (q, a, zero)
    m = MatMul (d, w)
    q2 = QuantizeLinear (z, b, zero)
    d2 = DequantizeLinear (q2, b, zero)
    y = Add (m, d2)
}"""


@pytest.mark.parametrize("fault", sorted(ABSENT - {"swapped rows"}))
def test_faults_of_quantizers_leave_a_graph_that_runs(script: ModuleType, fault: str) -> None:
    import onnx
    from onnx import parser
    from onnx.reference import ReferenceEvaluator

    right = parser.parse_model(QUANTIZED)
    model = parser.parse_model(QUANTIZED)
    assert script.PLANTS[fault](model.graph, random.Random(3))
    onnx.checker.check_model(model)
    inputs = {name: np.linspace(-30, 30, 8, dtype=np.float32).reshape(2, 4) for name in ("x", "z")}
    (was,), (found,) = (ReferenceEvaluator(each).run(None, inputs) for each in (right, model))
    assert found.shape == was.shape
    assert not np.array_equal(found, was)
