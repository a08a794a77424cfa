"""What lies in a graph's data file, by the package onnx, and numbers as they are stored, by torch."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from stiv_deploy.runtime.bundle.initializers import (
    BFLOAT16,
    FLOAT,
    FLOAT16,
    as_stored,
    is_finite,
    read_initializers,
    read_weight,
)

TYPES = {FLOAT: torch.float32, FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}


def write_graph(path: Path) -> dict[str, np.ndarray]:
    """A graph with weights in a data file, one of them large, and a constant of its own."""
    rng = np.random.default_rng(0)
    values = {"a.weight": rng.standard_normal((300, 7)), "b.weight": rng.standard_normal((4, 5))}
    tensors = [numpy_helper.from_array(each.astype(np.float32), name) for name, each in values.items()]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 5])
    graph = helper.make_graph([helper.make_node("Identity", ["b.weight"], ["y"])], "g", [], [y], tensors)
    onnx.save(helper.make_model(graph), path, save_as_external_data=True, location="g.data", size_threshold=1)
    return {name: each.astype(np.float32) for name, each in values.items()}


def test_places_are_those_that_onnx_reads(tmp_path: Path) -> None:
    values = write_graph(tmp_path / "g.onnx")
    found = read_initializers(tmp_path / "g.onnx")
    assert {name: place.shape for name, place in found.items()} == {"a.weight": (300, 7), "b.weight": (4, 5)}
    for name, place in found.items():
        assert place.data_type == FLOAT
        assert np.array_equal(read_weight(tmp_path / "g.data", place), values[name])
    (tmp_path / "g.data").write_bytes(b"short")
    with pytest.raises(ValueError, match="cannot reshape"):
        read_weight(tmp_path / "g.data", found["a.weight"])


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x3a\x7f\x01", b"{}"])
def test_what_is_no_graph(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(ValueError, match="it is no ONNX file"):
        read_initializers(tmp_path / "g.onnx")


@pytest.mark.parametrize("kind", [FLOAT, FLOAT16, BFLOAT16])
def test_numbers_are_rounded_as_torch_rounds_them(kind: int) -> None:
    """To nearest even, ties and subnormal ones too."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    values = np.concatenate(
        (
            values[np.isfinite(values)],
            (np.arange(0x3F80, 0x3F90) << 16 | 0x8000).view(np.uint32).astype(np.uint32).view(np.float32),
        )
    )
    wanted = torch.from_numpy(values).to(TYPES[kind])
    stored = as_stored(values, kind)
    got = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16) if kind == BFLOAT16 else torch.from_numpy(stored)
    assert torch.equal(got, wanted)
    assert is_finite(stored, kind) == bool(wanted.isfinite().all())
    assert is_finite(as_stored(np.float32([1.0, -65504.0]), kind), kind)
