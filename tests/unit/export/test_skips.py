"""Graphs for steps that skip the blocks: what they compute, and bundles with them."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stiv_deploy.export.bundle_from_checkpoint import default_bucket, export_bundle, sampling_defaults
from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.graphs.check import draw_inputs
from stiv_deploy.export.graphs.modules import ExtrapolateGraph, ResidualGraph, graph_modules, model_facts
from stiv_deploy.export.graphs.writer import GraphWriter
from stiv_deploy.export.parity.oracle import Oracle
from stiv_deploy.export.parity.requests import parity_requests
from stiv_deploy.export.parity.runs import probe
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.bundle import Bundle, read_manifest
from stiv_deploy.runtime.bundle.contract import SKIP_GRAPHS, dimensions, graph_specs
from stiv_deploy.runtime.sampling.golden_inputs import golden_inputs
from stiv_deploy.runtime.sampling.solvers import evaluations
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, save_checkpoint
from stiv_deploy.stiv_ref.config import Student
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.sampler import Solver

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Of rounding: half the distance to the next number, relative."""
TYPES = pytest.mark.parametrize("dtype", list(UNIT), ids=str)
SHAPE = (4, 3, 5, 8)
WEIGHTS = torch.tensor([[-0.6, 1.6], [1.5, -0.5], [0.0, 1.0], [2.25, -1.25]])


def tokens(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, wanted: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """To one rounding of the result, and of a sum of ``size`` in float32: of two products, and of three terms."""
    assert found.dtype == dtype
    allowed = UNIT[dtype] * wanted.abs() + 5 * UNIT[torch.float32] * size
    assert ((found.double() - wanted).abs() <= allowed + UNIT[dtype] * allowed).all()


@TYPES
def test_a_residual_is_what_blocks_added_rounded_once(dtype: torch.dtype) -> None:
    x, last = tokens(0, dtype), tokens(1, dtype)
    wanted = last.double() - x.double()
    close(ResidualGraph()(x, last), wanted, torch.zeros_like(wanted), dtype)


@TYPES
def test_a_row_that_skips_has_its_weighted_residuals_and_another_what_it_had(dtype: torch.dtype) -> None:
    x, last, one, two = (tokens(seed, dtype) for seed in range(4))
    skipped = torch.tensor([True, False, False, True])
    found = ExtrapolateGraph()(x, last, one, two, WEIGHTS, skipped)
    parts = [
        x.double(),
        *(w[:, None, None, None] * each.double() for w, each in zip(WEIGHTS.double().T, (one, two), strict=True)),
    ]
    size = torch.stack([each.abs() for each in parts]).sum(0)
    close(found[skipped], sum(parts)[skipped], size[skipped], dtype)
    assert torch.equal(found[~skipped], last[~skipped]), "bit by bit"


@TYPES
def test_what_is_not_looked_at_may_be_anything(dtype: torch.dtype) -> None:
    """Buffers are as they were: the blocks' result where a row skips, and residuals where it does not, or counts 0."""
    x, last, one, two = (tokens(seed, dtype) for seed in range(4))
    skipped = torch.tensor([True, False, True, False])
    clean = ExtrapolateGraph()(x, last, one, two, WEIGHTS, skipped)
    last[skipped], one[2] = float("nan"), float("nan")  # of weight 0
    one[~skipped], two[~skipped] = float("inf"), float("nan")
    assert torch.equal(ExtrapolateGraph()(x, last, one, two, WEIGHTS, skipped), clean)


def test_they_follow_the_blocks_and_take_the_contracts_inputs_in_order(micro: Checkpoint) -> None:
    specs, modules = graph_specs(model_facts(micro.config), "float16", skips=True), graph_modules(micro, skips=True)
    assert list(modules) == list(specs)
    assert list(specs)[5:8] == ["block_01", *SKIP_GRAPHS][:3]
    for name in SKIP_GRAPHS:
        assert [*inspect.signature(modules[name].forward).parameters] == [each.name for each in specs[name].inputs]
    kinds = {each.name: each.dtype for each in specs["extrapolate"].inputs}
    assert (kinds["residual_0"], kinds["residual_weights"], kinds["skipped"]) == ("float16", "float32", "bool")
    assert not {*SKIP_GRAPHS} & {*graph_modules(micro)}


def test_both_draws_of_inputs_have_rows_that_skip_and_rows_that_do_not(micro: Checkpoint) -> None:
    """Drawn as numbers are, all of them would skip."""
    facts = model_facts(micro.config)
    sizes = {"video_frames": 4, "height": 16, "width": 16, "text_tokens": 4}
    dims = dimensions(facts, batch=1, model_batch=3, **sizes)
    spec = graph_specs(facts, "float32", skips=True)["extrapolate"]
    assert draw_inputs(spec, dims, 9)["skipped"].tolist() == [True, False, True]
    assert golden_inputs("extrapolate", spec, dims, 9)["skipped"].tolist() == [True, False, True]


def manifest_of(checkpoint: Checkpoint, *, skips: bool, **facts: Any) -> Any:
    model, sampling = model_facts(checkpoint.config), checkpoint.config.sampling
    defaults = sampling_defaults(sampling, [default_bucket(sampling, model)])
    return SimpleNamespace(model=model.model_copy(update=facts), sampling=defaults, skips=skips, halves=False)


def test_the_ladder_goes_through_skipped_steps_where_there_are_any(micro: Checkpoint) -> None:
    named = {each.name: each for each in parity_requests(manifest_of(micro, skips=True), micro, 6)}
    plain = [each.name for each in parity_requests(manifest_of(micro, skips=False), micro, 6)]
    (name,) = named.keys() - {*plain}
    settings = named[name].settings
    assert (settings.solver, settings.guidance_mode) == (Solver.AB2, GuidanceMode.JIT)
    assert (settings.skipped_steps, settings.solver_weights) == ((2, 4), ())
    assert name.startswith("ti2v")
    assert name.endswith("skips")
    planned = evaluations(named[name].runtime_settings())
    assert [each.residuals is not None for each in planned] == [False, False, True, False, True, False]
    few = parity_requests(manifest_of(micro, skips=True), micro, 2)
    assert [each.name for each in few] == plain, "two steps have none behind two others"


def test_a_student_skips_too(micro: Checkpoint) -> None:
    student = Student(guidance=(2.0, 6.0))
    found = [each.settings for each in parity_requests(manifest_of(micro, skips=True, student=student), micro, 4)]
    assert [each.skipped_steps for each in found if each.skipped_steps] == [(2,)]
    assert {each.guidance_mode for each in found} == {GuidanceMode.NONE}


@pytest.mark.parametrize("rows", [2, 3])
def test_the_oracles_graphs_are_the_modules(micro: Checkpoint, rows: int) -> None:
    """On its own inputs, of a request with so many branches, in fp64."""
    oracle, manifest = Oracle(micro, torch.float64), manifest_of(micro, skips=True)
    request = next(each for each in parity_requests(manifest, micro, 4) if each.branches == rows)
    inputs = dict(probe(oracle, request, manifest))
    modules = graph_modules(micro, skips=True)
    for graph, output in zip(SKIP_GRAPHS, ("residual", "x_out"), strict=True):
        given = inputs[graph]
        found = modules[graph](**given)
        truth = oracle.run(graph, given)[output]
        torch.testing.assert_close(found, truth, rtol=0, atol=8 * 2.0**-53 * float(truth.abs().max()) + 1e-15)
    assert inputs["extrapolate"]["skipped"].tolist() == [row % 2 == 0 for row in range(rows)]
    names = [*inputs]
    assert names[names.index("residual") - 1 : names.index("head") + 1] == ["block_01", *SKIP_GRAPHS, "head"]


def test_a_flow_map_skips_nothing(
    make_checkpoint: Callable[..., Checkpoint], micro: Checkpoint, tmp_path: Path
) -> None:
    student = Student(guidance=(2.0, 6.0), flow_map=True)
    save_checkpoint(tmp_path / "map", make_checkpoint(micro.config.model.model_copy(update={"student": student})))
    with pytest.raises(ExportError, match="^--skips: a flow map has few steps, and each is of its own length; leave"):
        export_bundle(ExportRequest(checkpoint=tmp_path / "map", out=tmp_path / "bundle", skips=True))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_they_are_checked_graphs_without_weights(micro: Checkpoint, tmp_path: Path, precision: Any) -> None:
    writer = GraphWriter(micro, tmp_path, precision, skips=True)
    bucket = default_bucket(micro.config.sampling, writer.facts)
    for name in SKIP_GRAPHS:
        record = writer.write(name)
        assert record.data is None
        assert record.spec == graph_specs(writer.facts, precision, skips=True)[name]
        writer.check(name, record.topology, [bucket])


@pytest.mark.slow
def test_a_bundle_with_them_is_the_same_bundle(
    micro_path: Path, micro_bundle: Path, tmp_path: Path, stiv: Callable[..., tuple[int, str]]
) -> None:
    out = tmp_path / "bundle"
    code, err = stiv("export", micro_path, "--out", out, "--skips")
    assert code == 0, err
    skipping, plain = Bundle.open(out), Bundle.open(micro_bundle)
    assert (skipping.manifest.skips, plain.manifest.skips) == (True, False)
    assert skipping.manifest.graphs.keys() - plain.manifest.graphs.keys() == {*SKIP_GRAPHS}
    assert skipping.hash == plain.hash
    assert [each for each in json.loads((out / "manifest.json").read_text())["graphs"] if each in SKIP_GRAPHS]
    assert list(skipping.manifest.specs) == list(graph_specs(skipping.manifest.model, "float32", skips=True))
    assert read_manifest(out).checkpoint == plain.manifest.checkpoint
