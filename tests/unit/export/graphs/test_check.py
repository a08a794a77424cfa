import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stiv_deploy.export.bundle_from_checkpoint import default_bucket
from stiv_deploy.export.errors import CheckError
from stiv_deploy.export.graphs.check import (
    TOKEN_BYTES,
    VAE_PIXELS,
    CheckRow,
    _odd_inside,
    check_graph,
    check_sizes,
    draw_inputs,
    executable,
    graph_sizes,
    relative_error,
)
from stiv_deploy.export.graphs.modules import graph_modules, model_facts
from stiv_deploy.export.graphs.onnx_from_module import Template, parameters_of, write_graph
from stiv_deploy.export.graphs.writer import require_passed
from stiv_deploy.runtime.bundle.contract import MASKED, GraphSpec, graph_specs
from stiv_deploy.runtime.bundle.manifest import Bucket, Range
from stiv_deploy.stiv_ref.checkpoint import Checkpoint

SIDE = Range(min=64, typical=128, max=256)


@given(multiple=st.integers(1, 16), low=st.integers(1, 30), more=st.integers(0, 60), share=st.floats(0, 1))
def test_odd_sizes_are_inside_and_odd_where_possible(multiple: int, low: int, more: int, share: float) -> None:
    allowed = Range(min=low * multiple, typical=low * multiple, max=(low + more) * multiple)
    size = _odd_inside(allowed, multiple, share)
    assert allowed.min <= size <= allowed.max
    assert size % multiple == 0
    assert (size // multiple) % 2 == 1 or more == 0


def test_sizes_cover_the_bucket(micro: Checkpoint) -> None:
    facts = model_facts(micro.config)
    sizes = check_sizes(default_bucket(micro.config.sampling, facts), facts)
    assert list(sizes) == ["min", "typical", "max", "odd"]
    assert sizes["min"]["token_frames"] == sizes["min"]["model_batch"] == sizes["min"]["text_tokens"] == 1
    odd = sizes["odd"]
    assert odd["latent_height"] != odd["latent_width"]
    assert [odd[name] % 2 for name in ("batch", "model_batch", "frames", "text_tokens", "tokens")] == [1] * 5


def test_large_sizes_are_checked_with_fewer_rows(micro: Checkpoint) -> None:
    facts = model_facts(micro.config).model_copy(update={"width": 3072})
    wide = Range(min=1, typical=20, max=40)
    bucket = Bucket(name="b", batch=Range(min=1, typical=1, max=4), frames=wide, height=SIDE, width=SIDE)
    for which, dims in check_sizes(bucket, facts).items():
        row = 4 * facts.width * dims["token_frames"] * dims["tokens"]
        assert dims["model_batch"] >= dims["batch"] >= 1
        assert dims["model_batch"] * row <= TOKEN_BYTES or dims["model_batch"] == 1, which
        if which != "odd":
            whole = bucket.dims(facts, which)  # type: ignore[arg-type]
            assert {name for name in dims if dims[name] != whole[name]} <= {"batch", "model_batch"}


@pytest.mark.parametrize("factors", [{}, {"spatial_factor": 32, "temporal_factor": 8, "causal_vae": True}])
def test_vae_graphs_are_checked_in_pieces_of_bounded_size(micro: Checkpoint, factors: dict[str, Any]) -> None:
    """Large frames go through the VAE in tiles at run time; small sizes are checked as they are."""
    facts = model_facts(micro.config).model_copy(update=factors)
    small = default_bucket(micro.config.sampling, facts)
    frames = Range(min=1, typical=17, max=33)
    large = small.model_copy(update={"frames": frames, "height": Range(min=64, typical=512, max=1024)})
    large = large.model_copy(update={"width": Range(min=64, typical=768, max=2048)})
    for graph in ("image_encoder", "decoder"):
        for which, dims in graph_sizes(graph, large, facts).items():
            together = dims["frames"] if facts.causal_vae else 1
            area = dims["height"] * dims["width"]
            tile = 512**2 * together
            assert area * dims["frames"] * dims["batch"] <= max(VAE_PIXELS, tile), which
            assert facts.latent_frames(dims["video_frames"]) == dims["frames"]
    assert graph_sizes("embed", large, facts) == check_sizes(large, facts)
    if not factors:
        for which, dims in check_sizes(small, facts).items():
            piece = graph_sizes("decoder", small, facts)[which]
            assert all(piece[name] == dims[name] for name in ("batch", "video_frames", "height", "width"))


def test_drawn_inputs_are_of_their_kind(micro: Checkpoint) -> None:
    facts = model_facts(micro.config)
    dims = check_sizes(default_bucket(micro.config.sampling, facts), facts)["odd"]
    for spec in graph_specs(facts, "float16").values():
        inputs = draw_inputs(spec, dims, vocabulary=19)
        for tensor in spec.inputs:
            assert inputs[tensor.name].dtype == getattr(torch, tensor.dtype)
            assert inputs[tensor.name].shape == tensor.sized(dims)
        again = draw_inputs(spec, dims, vocabulary=19)
        assert all(torch.equal(inputs[name], again[name]) for name in inputs)
        if "spatial_cos" in inputs:
            torch.testing.assert_close(
                inputs["spatial_cos"] ** 2 + inputs["spatial_sin"] ** 2, torch.ones_like(inputs["spatial_cos"])
            )
        if "text_mask" in inputs:
            assert set(inputs["text_mask"].unique().tolist()) <= {0.0, MASKED}
            assert bool((inputs["text_mask"] == 0).any(-1).all())
        if "token_ids" in inputs:
            assert 0 <= inputs["token_ids"].min() <= inputs["token_ids"].max() < 19
            assert bool((inputs["token_mask"].diff(dim=1) <= 0).all()), "padded on the right"


def test_relative_error() -> None:
    assert relative_error(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.ones(2), np.zeros(2)) > 0
    assert relative_error(np.array([np.nan, 4.0]), np.array([3.0, 4.0])) == np.inf


@pytest.fixture(scope="module")
def written(
    head: tuple[Template, nn.Module, GraphSpec], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, nn.Module, GraphSpec]:
    """File, module and contract of the ``head`` graph."""
    template, module, spec = head
    folder = tmp_path_factory.mktemp("head")
    write_graph(template, parameters_of(module), folder, "head")
    return folder / "head.onnx", module, spec


def sizes_of(micro: Checkpoint) -> dict[str, dict[str, int]]:
    facts = model_facts(micro.config)
    return check_sizes(default_bucket(micro.config.sampling, facts), facts)


def test_a_right_graph_passes(micro: Checkpoint, written: tuple[Path, nn.Module, GraphSpec]) -> None:
    path, module, spec = written
    rows = list(check_graph("head", path, spec, module, module, sizes_of(micro), 19))
    assert [row.size for row in rows] == ["min", "typical", "max", "odd"]
    assert all(row.passed and row.rel_l2 is not None and 0 < row.rel_l2 < row.gate for row in rows)
    require_passed(iter(rows))


def test_another_models_graph_fails(micro: Checkpoint, written: tuple[Path, nn.Module, GraphSpec]) -> None:
    path, module, spec = written
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.source.head.out.weight *= 1.0001
    rows = list(check_graph("head", path, spec, other, other, sizes_of(micro), 19))
    assert not any(row.passed for row in rows)
    with pytest.raises(CheckError, match="graph head differs from the reference at the min: relative L2 error"):
        require_passed(iter(rows))


class Rough(nn.Module):
    """A head that rounds coarsely in float32 and, for a comparison, nearly not at all in float64."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, condition: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        out = self.inner.source.unpatchify(self.inner.source.head(x, condition), model_input.shape)
        return (out + 1024) - 1024


def test_an_ill_conditioned_float32_graph_is_judged_by_float64(
    micro: Checkpoint, written: tuple[Path, nn.Module, GraphSpec]
) -> None:
    path, module, spec = written
    rough = Rough(module)
    rows = list(check_graph("head", path, spec, rough, rough, sizes_of(micro), 19))
    assert all(row.passed and 1e-5 < row.gate < 1e-3 for row in rows)
    wrong = copy.deepcopy(rough)
    with torch.no_grad():
        wrong.inner.source.head.out.weight *= 1.01
    assert not any(row.passed for row in check_graph("head", path, spec, wrong, wrong, sizes_of(micro), 19))


def test_half_precision_is_gated_by_torchs_own_error(
    micro: Checkpoint, written: tuple[Path, nn.Module, GraphSpec]
) -> None:
    """A float32 graph in place of a half one passes (it is better); the yardstick is half torch, not float32's gate."""
    path, module, spec = written
    half = copy.deepcopy(module).half()
    half_spec = graph_specs(model_facts(micro.config), "float16")["head"]
    assert executable(half_spec)
    rows = list(check_graph("head", path, spec, module, FloatIn(half), sizes_of(micro), 19))
    assert all(2.0**-11 < row.gate < 5e-3 for row in rows)


class FloatIn(nn.Module):
    """A half-precision head that takes float32 inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, condition: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        return self.inner(x.half(), condition.half(), model_input)


def test_bfloat16_is_said_not_to_be_executed(micro: Checkpoint, tmp_path: Path) -> None:
    spec = graph_specs(model_facts(micro.config), "bfloat16")["head"]
    assert not executable(spec)
    module = graph_modules(micro)["head"]
    rows = list(check_graph("head", tmp_path / "absent.onnx", spec, module, module, sizes_of(micro), 19))
    assert [row.rel_l2 for row in rows] == [None] * 4


def test_failed_rows_stop_at_the_first(micro: Checkpoint) -> None:
    rows = [
        CheckRow(graph="head", size="odd of bucket a", rel_l2=1e-7, gate=1e-5, passed=True),
        CheckRow(graph="step", size="max of bucket b", rel_l2=0.5, gate=1e-5, passed=False),
    ]
    with pytest.raises(
        CheckError, match=r"graph step differs .* max of bucket b: relative L2 error 5.0e-01, at most 1.0e-05"
    ):
        require_passed(iter(rows))
