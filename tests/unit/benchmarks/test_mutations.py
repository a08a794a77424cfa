"""Planted faults in the toy bundle: what is beyond a gate is caught, and right graphs are not."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import typer

sys.path.append(str(Path(__file__).parents[1]))
from toys import Toy, make_bundle, with_answers

from stiv_deploy.runtime.bundle.bundle import Bundle


@pytest.fixture
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("mutations")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return with_answers(make_bundle(tmp_path / "bundle", Toy()))


def test_none_is_missed_and_none_is_a_false_alarm(script: ModuleType, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    script.main(bundle, faults=24, clean=2, seed=1, out=out)
    report = json.loads(out.read_text())
    assert sum(each["planted"] for each in report["kinds"].values()) == 21
    assert sum(each.get("caught", 0) for each in report["kinds"].values()) >= 16
    assert report["clean"]["alarms"] == 0
    assert {each["state"] for each in report["not caught"]} <= {"hidden"}


def test_a_gate_that_is_too_tight_is_a_false_alarm(script: ModuleType, tmp_path: Path) -> None:
    bundle = with_answers(make_bundle(tmp_path / "bundle", Toy()), gate=1e-12)
    with pytest.raises(typer.Exit):
        script.main(bundle, faults=8, clean=1, seed=0, out=None)


def test_faults_change_the_graph(script: ModuleType, bundle: Path) -> None:
    models = script.Subject(Bundle.open(bundle)).models
    for fault in set(script.PLANTS) - {"swapped rows"}:  # the toy has no matrix
        before = {name: model.SerializeToString() for name, model in models.items()}
        assert any(script.PLANTS[fault](model.graph, random.Random(3)) for model in models.values()), fault
        assert any(model.SerializeToString() != before[name] for name, model in models.items()), fault
