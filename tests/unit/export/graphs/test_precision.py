"""Precisions: 8-bit formats as both sides of the law of imports know them, torch's types."""

from typing import get_args

import torch

from stiv_deploy.calibration import layers, plan
from stiv_deploy.export.graphs.precision import torch_dtype
from stiv_deploy.runtime.bundle import contract


def test_calibration_and_bundles_know_the_same_formats_and_choices() -> None:
    assert get_args(layers.Format) == contract.FORMATS
    assert get_args(plan.Choice) == get_args(contract.Choice)
    assert set(layers.LARGEST) == set(contract.FORMATS)


def test_every_precision_has_a_type_of_torch() -> None:
    found = {name: torch_dtype(name) for name in get_args(contract.Precision)}
    assert found == {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
