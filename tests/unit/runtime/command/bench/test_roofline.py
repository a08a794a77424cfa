"""Operations of a block against torch's own count, bytes and shares by hand."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import ModelFacts, dimensions
from stiv_deploy.runtime.bundle.manifest import Manifest, QuantizationRecord
from stiv_deploy.runtime.command.bench.roofline import (
    PEAKS,
    ffn_ratio,
    least_bytes,
    operations,
    peak_of,
    roofline,
)
from stiv_deploy.stiv_ref.block import RopeTables, StivBlock
from stiv_deploy.stiv_ref.config import StivConfig

FRAMES, PLACES, TEXT, ROWS = 3, 6, 5, 2
DIMS = {"model_batch": ROWS, "token_frames": FRAMES, "tokens": PLACES, "text_tokens": TEXT}


@pytest.mark.parametrize("temporal", [True, False])
@pytest.mark.parametrize("ratio", [2, 4])
def test_operations_are_those_that_torch_counts(bundle_path: str, temporal: bool, ratio: int) -> None:
    config = StivConfig(
        name="t", blocks=1, width=16, heads=2, text_width=8, base_frames=2, base_grid=(2, 2), mlp_ratio=ratio,
        temporal=temporal,
    )  # fmt: skip
    torch.manual_seed(0)
    tables = (torch.randn(PLACES, 4), torch.randn(PLACES, 4), torch.randn(FRAMES, 4), torch.randn(FRAMES, 4))
    text = torch.randn(ROWS, 2, TEXT, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        StivBlock(config)(
            torch.randn(ROWS, FRAMES, PLACES, 16), torch.randn(ROWS, 6, 16), text, text,
            torch.zeros(ROWS, 1, 1, TEXT), RopeTables(*tables),
        )  # fmt: skip
    model = facts(bundle_path).model_copy(update={"blocks": 1, "width": 16, "heads": 2, "temporal": temporal})
    linear, attention = operations(model, ratio, DIMS)
    assert linear + attention == counter.get_total_flops()


def facts(bundle: str) -> ModelFacts:
    return Bundle.open(bundle).manifest.model


def sized(manifest: Manifest, nbytes: int, **values: object) -> Manifest:
    """``manifest`` of a wider model whose blocks have weights of so many bytes."""
    record = manifest.graphs["block_00"]
    heavy = record.model_copy(update={"data": record.file.model_copy(update={"bytes": nbytes})})
    graphs = manifest.graphs | {"block_00": heavy, "block_01": heavy}
    model = manifest.model.model_copy(update={"width": 64})
    return manifest.model_copy(update={"model": model, "graphs": graphs, **values})


@pytest.mark.parametrize("ratio", [1, 4, 8])
def test_the_ffn_is_found_by_the_bytes_of_weights(bundle_path: str, ratio: int) -> None:
    manifest = Bundle.open(bundle_path).manifest
    weights = (10 + 2 * ratio) * 64**2 + 20 * 64
    assert ffn_ratio(sized(manifest, 4 * weights)) == ratio
    assert ffn_ratio(sized(manifest, 2 * weights, precision="float16")) == ratio
    layers = {f"block_00.{name}": "int8" for name in ("spatial.qkv", "ffn.up", "ffn.down")}
    record = QuantizationRecord(format="int8", scales="0" * 64, layers=layers)
    assert ffn_ratio(sized(manifest, weights, quantization=record)) == ratio
    twin = QuantizationRecord(format="nvfp4", scales="0" * 64, layers=dict.fromkeys(layers, "nvfp4"))
    assert ffn_ratio(sized(manifest, 4 * weights, quantization=twin)) == ratio, "its weights are float32"


def test_least_bytes_by_hand(bundle_path: str) -> None:
    manifest = sized(Bundle.open(bundle_path).manifest, 1000)
    # two blocks of weights; 18 + 5 tokens of width 64 in float32, in and out, of 2 rows in 2 blocks
    assert least_bytes(manifest, DIMS) == 2 * 1000 + 2 * 2 * 2 * (18 + 5) * 64 * 4


def test_shares_of_what_a_device_allows(bundle_path: str) -> None:
    manifest = sized(Bundle.open(bundle_path).manifest, 2 * 18 * 64**2, precision="float16")
    dims = dimensions(
        manifest.model, batch=1, model_batch=2, video_frames=4, height=8, width=8, text_tokens=5
    )  # fmt: skip
    found = roofline(manifest, dims, 1e-3, "NVIDIA H100 80GB HBM3 (SM 90)")
    peak = PEAKS["H100"]
    assert found.least_seconds == max(found.linear / peak.half + found.attention / peak.half, found.bytes / 3350e9)
    assert found.share == pytest.approx(found.least_seconds / 1e-3)
    assert found.operations_per_second == pytest.approx(1e3 * (found.linear + found.attention))
    assert roofline(manifest, dims, 1e-3, "CPU (2 cores)").share is None
    single = manifest.model_copy(update={"precision": "float32"})
    assert roofline(single, dims, 1e-3, "NVIDIA H100").share is None, "no peak is known of float32"


def test_an_a100_has_no_fp8() -> None:
    peak = peak_of("NVIDIA A100-SXM4-80GB (SM 80)")
    assert peak is not None
    assert (peak.of("fp8"), peak.of("int8"), peak.of(None)) == (None, 624e12, 312e12)
    assert peak_of("NVIDIA GeForce GTX 1080") is None
    assert [PEAKS[name].of("nvfp4") for name in ("H100", "RTX 5090")] == [None, 1676e12]
