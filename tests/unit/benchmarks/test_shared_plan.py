"""Engines of a block by where its weights are: what 8-bit bundles are refused ``--shared-plan`` for is still so."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.tensorrt_library import missing_library


@pytest.fixture(scope="module")
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("shared_plan")


def test_the_table(script: ModuleType) -> None:
    row = {"bundle": "fp8", "sm": "89", "weights": "inputs", "kernels": 46, "mib": 5.1, "products": {"Half x Half": 8}}
    assert script.table([row]).splitlines()[2] == "| fp8 | 89 | inputs | 46 | 5.1 | 8 Half x Half |"


@pytest.mark.slow
@pytest.mark.skipif(missing_library("tensorrt-rtx") is not None, reason=str(missing_library("tensorrt-rtx")))
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_scales_as_inputs_cost_products_in_8_bits(script: ModuleType, tmp_path: Path, precision: str) -> None:
    checkpoint = script.hollow_checkpoint(script.MODEL, 1, script.FRAMES, script.SIZE)
    bucket = script.bucket_of(script.FRAMES, script.SIZE)
    bundle = Bundle.open(script.write_bundle(tmp_path / "bundle", checkpoint, precision, bucket))
    products = {row["weights"]: row["products"] for row in script.rows_of(bundle, precision, list(script.WAYS), ["89"])}
    small = {"fp8": "FP8 x FP8", "int8": "Int8 x Int8"}[precision]
    assert products == {"in the plan": {small: 8}, "inputs but scales": {small: 8}, "inputs": {"Half x Half": 8}}
