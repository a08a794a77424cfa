"""The comparison with Latte: equal work or none, peers that compute what they claim, and a small run of all of it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from toys import FACTS, Toy, make_bundle

from stiv_deploy.export.errors import ExportError
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import ModelFacts
from stiv_deploy.stiv_ref.config import model_config

SMALL = FACTS.model_copy(update={"width": 32, "heads": 2, "text_width": 16, "patch": (1, 2)})


@pytest.fixture
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("peers")


@pytest.fixture
def arithmetic(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("arithmetic")


def tiny_facts() -> ModelFacts:
    config = model_config("tiny").model_dump()
    shared = {name: config[name] for name in ModelFacts.model_fields.keys() & config.keys()}
    return ModelFacts(**shared, max_text_tokens=16, spatial_factor=4, temporal_factor=1)


def test_operations_are_those_of_the_formula(arithmetic: ModuleType) -> None:
    """36 D^2 in linear layers, and 4 D for every key, of each token and block: QK^T and the weighted sum."""
    config, frames, tokens, text = model_config("tiny"), 8, 16, 12
    found = arithmetic.stiv_operations(config, (frames, 4, 8, 8), text)
    width = config.width
    assert found.blocks == config.blocks * frames * tokens * (36 * width**2 + 4 * width * (tokens + frames + text))
    assert 0 < found.ends < 0.01 * found.blocks


def test_layers_of_latte_for_the_shipped_model_are_equal_work(script: ModuleType, arithmetic: ModuleType) -> None:
    facts, work = tiny_facts(), script.Work(rows=1, frames=8, side=8, text=16)
    ours = arithmetic.stiv_operations(script.config_of(facts), (8, 4, 8, 8), 16).total
    layers = script.equal_layers(facts, work, ours)
    theirs = script.latte_operations(facts, work, layers)
    script.check_equal(ours, theirs)
    with pytest.raises(ExportError, match="not equal work"):
        script.check_equal(ours, 2 * theirs)


@pytest.mark.slow
def test_a_plain_export_computes_what_eager_does(script: ModuleType, tmp_path: Path) -> None:
    work = script.Work(rows=2, frames=3, side=4, text=5)
    peer, inputs = script.Peer(script.latte(SMALL, work, 1)).eval(), script.latte_inputs(SMALL, work)
    assert set(script.peer_calls(peer, inputs, ("eager", "onnx"), tmp_path, 1)) == {"latte eager", "latte onnx"}


def test_a_peer_that_computes_something_else_is_refused(script: ModuleType, tmp_path: Path) -> None:
    inputs = script.latte_inputs(SMALL, script.Work(rows=2, frames=3, side=4, text=5))
    with pytest.raises(ExportError, match="latte eager is wrong"):
        script.peer_calls(lambda *_: torch.randn(2, 4, 3, 4, 4), inputs, ("eager",), tmp_path, 1)


def test_smoke(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "EQUAL", 10)  # a model of width 4 is all text projections
    bundle, out = make_bundle(tmp_path / "bundle", Toy()), tmp_path / "out.json"
    script.main(bundle, ways="eager", threads=1, repeats=2, out=out)
    report = json.loads(out.read_text())
    assert report["bundle"] == Bundle.open(bundle).hash
    assert set(report["rows"]) == {"bundle", "latte eager"}
    assert report["rows"]["bundle"]["ratio"] == 1
    work = report["gflop"]["latte"] / report["gflop"]["bundle"]
    assert report["rows"]["latte eager"]["per_operation"] == pytest.approx(
        report["rows"]["latte eager"]["ratio"] / work, rel=0.01
    )


@pytest.mark.parametrize("text", ["", "eager,fast"])
def test_ways_that_there_are_none_of(script: ModuleType, text: str) -> None:
    with pytest.raises(typer.BadParameter, match="eager,compiled,onnx"):
        script.chosen_ways(text)
