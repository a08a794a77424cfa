"""Modules alone: a right block has none beyond its bound, and of a wrong one the very module is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from stiv_deploy.export.parity.modules import Judge, ModuleRow

pytestmark = pytest.mark.slow
LEAVES = [
    *(f"{name}.{part}" for name in ("spatial", "temporal") for part in ("qkv", "q_norm", "k_norm", "out")),
    *("cross.q", "cross.q_norm", "cross.out", "ffn.up", "ffn.down"),
]
Edit = Callable[[onnx.ModelProto, np.ndarray], None]


def stored(model: onnx.ModelProto, data: np.ndarray, name: str) -> np.ndarray:
    """The float32 values of a parameter, to be changed in place."""
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    start = int(place["offset"])
    return data[start : start + int(place["length"])].view(np.float32).reshape(tuple(tensor.dims))


def swapped_rows(name: str) -> Edit:
    def edit(model: onnx.ModelProto, data: np.ndarray) -> None:
        values = stored(model, data, name)
        values[[0, 1]] = values[[1, 0]]

    return edit


def doubled(name: str) -> Edit:
    def edit(model: onnx.ModelProto, data: np.ndarray) -> None:
        stored(model, data, name)[...] *= 2

    return edit


def attribute(node: str, name: str, value: Any) -> Edit:
    def edit(model: onnx.ModelProto, _: np.ndarray) -> None:
        (found,) = (each for each in model.graph.node if each.name == node)
        kept = [each for each in found.attribute if each.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return edit


def names(rows: list[ModuleRow]) -> list[str]:
    return [row.module for row in rows if not row.before]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_of_a_right_block_every_module_passes_far_from_its_bound(block: Any, quantization: str | None) -> None:
    found = block(quantization).measured()
    rows = [each.row for each in found]
    assert sorted(names(rows)) == sorted(LEAVES)
    assert [row.before for row in rows if row.before][-1] == "x_out"
    assert sum(each.piece.quantized for each in found) == (8 if quantization else 0), "linears"
    assert all(row.passed for row in rows)
    assert max((row.rel_l2 or 0.0) / row.bound for row in rows) < 0.8
    assert max(row.bound for row in rows) < (0.02 if quantization else 2e-6)


@pytest.mark.parametrize(
    ("quantization", "edit", "module", "before"),
    [
        (None, swapped_rows("temporal.out.weight"), "temporal.out", ""),
        (None, doubled("spatial.q_norm.weight"), "spatial.q_norm", ""),
        (None, attribute("temporal.k_norm.RMSNormalization", "epsilon", 1e-4), "temporal.k_norm", ""),
        (None, attribute("LayerNormalization_5", "epsilon", 1e-4), "", "cross.q"),
        (None, attribute("cross.Attention", "scale", 0.3), "cross", "cross.out"),
        (None, attribute("ffn.Gelu", "approximate", "none"), "ffn", "ffn.down"),
        ("int8", doubled("ffn.up.input_scale"), "ffn.up", ""),
        ("int8", doubled("cross.q.weight_scale"), "cross.q", ""),
        ("int8", doubled("cross.out.bias"), "cross.out", ""),
    ],
)
def test_the_module_named_first_is_the_planted_one(
    block: Any, tmp_path: Path, quantization: str | None, edit: Edit, module: str, before: str
) -> None:
    wrong = [each.row for each in block(quantization).edited(tmp_path, edit).measured()]
    failed = [row for row in wrong if not row.passed]
    assert (failed[0].module, failed[0].before) == (module, before)
    assert all(row.module == "" for row in failed[1:]), "an error reaches no other module"


def test_a_value_that_is_not_finite_fails(block: Any, tmp_path: Path) -> None:
    def spoil(model: onnx.ModelProto, data: np.ndarray) -> None:
        stored(model, data, "ffn.down.bias")[0] = np.nan

    failed = [each.row for each in block().edited(tmp_path, spoil).measured() if not each.row.passed]
    assert [(row.module, row.rel_l2) for row in failed] == [("ffn.down", None)]


def test_bounds_are_twice_plain_torch_and_four_roundings(block: Any) -> None:
    for measured in block().measured():
        row = measured.row
        assert row.bound == pytest.approx(2 * row.plain_torch + 4 * 2.0**-24)
        assert isinstance(measured.judge, Judge)
        assert measured.judge.truth.dtype == torch.float64
