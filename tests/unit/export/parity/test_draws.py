"""The gates of 8-bit rows, from right implementations: what passes them, and what does not."""

import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from stiv_deploy.calibration.layers import LARGEST, Format, model_layers
from stiv_deploy.calibration.plan import default_plan
from stiv_deploy.calibration.scales import Provenance, Scales, save_scales, scale_of, tensor_names
from stiv_deploy.export.bundle_from_checkpoint import default_bucket, sampling_defaults
from stiv_deploy.export.graphs.draws import DRAWS, SPREADS, on_grid, quantized_gate, rel_l2
from stiv_deploy.export.graphs.modules import model_facts
from stiv_deploy.export.parity.draws import Draws
from stiv_deploy.export.parity.files import opened_scales
from stiv_deploy.export.parity.oracle import Oracle
from stiv_deploy.export.parity.requests import Request, parity_requests
from stiv_deploy.export.parity.runs import probe
from stiv_deploy.runtime.bundle.manifest import FileRecord, Manifest, QuantizationRecord
from stiv_deploy.runtime.errors import BundleError
from stiv_deploy.runtime.files import sha256
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.sampler import sample

UNIT = 2.0**-11
AMAX = 16.3
"""Above almost all activations of the small checkpoint, so that its errors come from rounding."""


def made_scales(checkpoint: Checkpoint, quantization: Format, amax: float = AMAX) -> Scales:
    """The range ``amax`` for every activation, the true one for weights."""
    config, found = checkpoint.config.model, {}
    for layer in model_layers(config):
        for name in tensor_names(layer):
            weight = name.endswith(".weight")
            found[name] = (
                checkpoint.model.get_parameter(f"{layer.module}.weight").abs().max() if weight else torch.tensor(amax)
            )
    provenance = Provenance(
        quantization=quantization, checkpoint="0" * 64, model=config, recipe={}, prompts="0" * 64, tools={}
    )
    return Scales(provenance=provenance, amax=found)


def test_gate_is_a_tenth_above_the_mean_plus_what_chance_gives_one_draw_in_a_thousand() -> None:
    errors = [0.04, 0.05, 0.045, 0.055, 0.05, 0.04, 0.06, 0.05]
    spread = math.sqrt(sum((error - 0.04875) ** 2 for error in errors) / 7)
    assert quantized_gate("float16", errors) == pytest.approx(1.1 * 0.04875 + 5.0754 * spread + UNIT, rel=1e-4)
    assert quantized_gate("float32", [0.05] * DRAWS) == pytest.approx(0.055 + 2.0**-24)


def test_one_more_draw_exceeds_the_gates_spread_once_in_a_thousand() -> None:
    random = np.random.default_rng(0)
    draws = random.standard_normal((400_000, DRAWS + 1))
    limit = draws[:, :-1].mean(1) + SPREADS * draws[:, :-1].std(1, ddof=1)
    assert (draws[:, -1] > limit).mean() == pytest.approx(1e-3, abs=2e-4)  # 4 sigma of 400 events


def test_nan_passes_no_gate() -> None:
    assert not rel_l2(torch.tensor([math.nan]), torch.ones(1)) <= quantized_gate("float16", [1.0] * DRAWS)


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_a_wide_model_on_the_grid_has_the_very_scales_of_the_half_precision_one(
    micro: Checkpoint, quantization: Format
) -> None:
    scales = made_scales(micro, quantization)
    moved = on_grid(scales, torch.float16)
    for name, amax in scales.amax.items():
        half = scale_of(amax, quantization, torch.float16)
        assert scale_of(moved.amax[name], quantization, torch.float32).item() == pytest.approx(half.item(), rel=2e-7)
    assert moved.amax["block_00.ffn.up.input"] != scales.amax["block_00.ffn.up.input"]
    assert LARGEST[quantization] * 2.0**-12 > abs(moved.amax["block_00.ffn.up.input"].item() - AMAX)


def made_manifest(checkpoint: Checkpoint, scales: str = "0" * 64, quantized: bool = True) -> Manifest:
    """What an int8 export of ``checkpoint`` would write, without its graphs."""
    facts, defaults = model_facts(checkpoint.config), checkpoint.config.sampling
    bucket = default_bucket(defaults, facts)
    plan = default_plan(checkpoint.config.model, "int8")
    return Manifest(
        precision="float16",
        opset=23,
        model=facts,
        sampling=sampling_defaults(defaults, [bucket]),
        buckets=(bucket,),
        graphs={},
        tokenizer=FileRecord(path="tokenizer.json", sha256="", bytes=0),
        checkpoint="",
        quantization=QuantizationRecord(format="int8", scales=scales, layers=dict(plan.layers)) if quantized else None,
        tools={},
    )


@pytest.fixture(scope="module")
def draws(micro: Checkpoint) -> Draws:
    return Draws(micro, made_manifest(micro), made_scales(micro, "int8"))


class Walk(NamedTuple):
    """The first request of the ladder, latents of the truth's steps, and its velocities there."""

    request: Request
    points: list[torch.Tensor]
    true: torch.Tensor


@pytest.fixture(scope="module")
def walk(micro: Checkpoint) -> Walk:
    request, truth = parity_requests(made_manifest(micro), micro, 3)[0], Oracle(micro, torch.float64)
    points: list[torch.Tensor] = []
    velocities: list[torch.Tensor] = []

    def keep(_step: int, before: torch.Tensor, velocity: torch.Tensor) -> None:
        points.append(before)
        velocities.append(velocity)

    sample(truth.boundary, truth.sampling_inputs(request), request.settings, keep)
    return Walk(request, points, torch.cat(velocities))


def test_only_graphs_with_8_bit_layers_are_judged_by_draws(draws: Draws) -> None:
    assert draws.graphs == {"block_00", "block_01"}


def test_draws_differ_from_each_other_but_hardly_in_the_size_of_their_error(draws: Draws, walk: Walk) -> None:
    found = draws.velocities(walk.request, walk.points)
    assert len(found) == DRAWS
    assert found[0].shape == (3, *walk.request.inputs.noise.shape[1:])
    errors = [rel_l2(each, walk.true) for each in found]
    apart = [rel_l2(each, found[0]) for each in found[1:]]
    assert 0 < max(apart) < statistics.fmean(errors)
    assert len(set(errors)) == DRAWS
    assert max(errors) < 1.1 * min(errors)


def test_ranges_that_cost_a_bit_fail_and_the_right_ones_pass(draws: Draws, micro: Checkpoint, walk: Walk) -> None:
    gate = quantized_gate("float16", [rel_l2(each, walk.true) for each in draws.velocities(walk.request, walk.points)])
    wide = Draws(micro, made_manifest(micro), made_scales(micro, "int8", amax=2 * AMAX))
    for other, passes in ((draws, True), (wide, False)):
        for each in other.velocities(walk.request, walk.points):
            assert (rel_l2(each, walk.true) <= gate) is passes


def test_draws_of_a_graph_start_from_the_same_inputs(draws: Draws, micro: Checkpoint) -> None:
    manifest, truth = made_manifest(micro), Oracle(micro, torch.float64)
    request = parity_requests(manifest, micro, 2)[0]
    given = next(inputs for name, inputs in probe(truth, request, manifest) if name == "block_00")
    given = {name: value.half() if value.is_floating_point() else value for name, value in given.items()}
    true = truth.run("block_00", given)["x_out"]
    errors = [rel_l2(each["x_out"], true) for each in draws.graph("block_00", given)]
    assert len(errors) == DRAWS
    assert max(errors) < 1.1 * min(errors)


def test_free_runs_keep_given_frames_bit_equal(draws: Draws, micro: Checkpoint) -> None:
    request = parity_requests(made_manifest(micro), micro, 2)[1]
    for latents in draws.free_runs(request):
        assert torch.equal(latents[:, 0].float(), request.inputs.clean[:, 0])


class TestScalesOfABundle:
    @pytest.fixture
    def bundle(self, micro: Checkpoint, tmp_path: Path) -> Any:
        """A folder and a manifest: all of a bundle that is looked at."""
        scales, folder = tmp_path / "some.safetensors", tmp_path / "bundle"
        save_scales(scales, made_scales(micro, "int8"))
        folder.mkdir()
        return SimpleNamespace(folder=folder, manifest=made_manifest(micro, sha256(scales)))

    def test_found_by_hash_beside_or_in_the_bundle(self, bundle: Any) -> None:
        beside = opened_scales(bundle, None)
        assert beside is not None
        (bundle.folder.parent / "some.safetensors").rename(bundle.folder / "scales.safetensors")
        inside = opened_scales(bundle, None)
        assert inside is not None
        assert inside.amax.keys() == beside.amax.keys()

    def test_named(self, bundle: Any, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        path = (tmp_path / "some.safetensors").rename(elsewhere / "some.safetensors")
        assert opened_scales(bundle, path) is not None
        with pytest.raises(BundleError, match="neither in it nor beside it; name the file with --scales"):
            opened_scales(bundle, None)

    def test_others_or_none_are_refused(self, bundle: Any, micro: Checkpoint, tmp_path: Path) -> None:
        save_scales(tmp_path / "other.safetensors", made_scales(micro, "int8", amax=5.0))
        with pytest.raises(BundleError, match="other.safetensors: not what this bundle was exported with"):
            opened_scales(bundle, tmp_path / "other.safetensors")
        with pytest.raises(BundleError, match="missing.safetensors: no such file"):
            opened_scales(bundle, tmp_path / "missing.safetensors")

    def test_a_bundle_without_8_bit_layers_takes_none(self, micro: Checkpoint, tmp_path: Path) -> None:
        opened: Any = SimpleNamespace(folder=tmp_path, manifest=made_manifest(micro, quantized=False))
        assert opened_scales(opened, None) is None
        with pytest.raises(BundleError, match="no 8-bit layers; leave out --scales"):
            opened_scales(opened, tmp_path / "some.safetensors")
