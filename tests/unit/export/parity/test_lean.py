"""Oracles of one graph at a time: what they compute is what the whole one computes, and they hold no more."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stiv_deploy.export.graphs.modules import graph_modules, model_facts
from stiv_deploy.export.parity.draws import Draws
from stiv_deploy.export.parity.lean import OneAtATime, only
from stiv_deploy.export.parity.oracle import Oracle, Tensors
from stiv_deploy.export.parity.requests import parity_requests
from stiv_deploy.export.parity.runs import probe
from stiv_deploy.stiv_ref.checkpoint import Checkpoint


def parameters(oracle: Oracle) -> int:
    """Parameters that an oracle has in memory."""
    modules = (oracle.model, oracle.text_encoder, oracle.vae)
    return sum(each.numel() for module in modules for each in module.parameters())


@pytest.fixture(scope="module")
def manifest(micro: Checkpoint) -> Any:
    sampling = SimpleNamespace(frames=4, height=16, width=16, stride=1, guidance_scale=2.0, image_scale=1.5)
    sampling.time_shift = 1.0
    sampling.late_stretch = 1.0
    return SimpleNamespace(sampling=sampling, model=model_facts(micro.config), halves=False, skips=True)


@pytest.fixture(scope="module")
def probed(micro: Checkpoint, manifest: Any) -> dict[str, Tensors]:
    request = parity_requests(manifest, micro, 2)[-1]
    return dict(probe(Oracle(micro, torch.float64), request, manifest))


def test_probing_with_one_graph_at_a_time_gives_the_very_inputs(
    micro: Checkpoint, manifest: Any, probed: dict[str, Tensors]
) -> None:
    lean = OneAtATime(lambda graph: Oracle(only(micro, graph), torch.float64))
    request = parity_requests(manifest, micro, 2)[-1]
    whole = Oracle(micro, torch.float64)
    for graph, inputs in probe(lean, request, manifest):
        assert set(inputs) == set(probed[graph])
        assert all(torch.equal(value, probed[graph][name]) for name, value in inputs.items()), graph
        for name, value in lean.run(graph, inputs).items():
            assert torch.equal(value, whole.run(graph, inputs)[name]), (graph, name)


def test_an_oracle_of_one_graph_holds_that_graph(micro: Checkpoint) -> None:
    for graph, module in graph_modules(micro).items():
        held = sum(each.numel() for each in module.parameters())
        assert parameters(Oracle(only(micro, graph), torch.float32)) == held, graph
    assert parameters(Oracle(micro, torch.float32)) > 3 * held


def test_another_graph_lets_go_of_the_one_before(micro: Checkpoint) -> None:
    made: list[str] = []

    def make(graph: str) -> Oracle:
        made.append(graph)
        return Oracle(only(micro, graph), torch.float32)

    lean = OneAtATime(make)
    assert lean.of("block_00") is lean.of("block_00")
    lean.of("block_01")
    lean.of("block_00")
    assert made == ["block_00", "block_01", "block_00"]


@pytest.mark.slow
def test_draws_of_one_graph_are_those_of_the_whole_model(
    micro: Checkpoint, quantize: Callable[..., Any], manifest: Any, probed: dict[str, Tensors]
) -> None:
    chosen = quantize("int8")
    manifest.quantization, manifest.precision = chosen.record(), "float32"
    whole, lean = (Draws(micro, manifest, chosen.scales, lean=each) for each in (False, True))
    given = {name: value.float() for name, value in probed["block_01"].items()}
    for one, other in zip(whole.graph("block_01", given), lean.graph("block_01", given), strict=True):
        assert torch.equal(one["x_out"], other["x_out"])
