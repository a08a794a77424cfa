"""Rewritten programs say what they said: each operator against torch, and against PyTorch's own decomposition."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from stiv_deploy.export.graphs import lowering, onnx_from_module
from stiv_deploy.export.graphs.lowering import REWRITES
from stiv_deploy.export.graphs.translations import read_once, translated
from stiv_deploy.export.graphs.writer import GraphWriter, fused_view
from stiv_deploy.stiv_ref.checkpoint import Checkpoint

aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def exported(function: Callable[[Tensor], Tensor], known: Callable[[Any], bool]) -> tuple[Any, list[Any]]:
    """An ONNX model of ``function`` over [dynamic, 4, dynamic, 6], and the operators of the program it was made of."""
    sizes = {0: torch.export.Dim("a", min=1), 2: torch.export.Dim("b", min=1)}
    program = torch.export.export(Function(function), (torch.ones(3, 4, 5, 6),), dynamic_shapes=(sizes,), strict=False)
    with read_once(onnx_from_module.OPSET), lowering.rewritten_if_possible(program, known):
        model = torch.onnx.export(program, dynamo=True, opset_version=onnx_from_module.OPSET, verbose=False)
    return model.model_proto.SerializeToString(), [node.target for node in program.graph.nodes]


def known(target: Any) -> bool:
    return translated(target, onnx_from_module.OPSET)


def run(model: bytes, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


CASES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "square": (aten.square.default, lambda x: x.square()),
    "number less tensor": (aten.rsub.Scalar, lambda x: 1 - x),
    "number less twice tensor": (aten.rsub.Scalar, lambda x: torch.rsub(x, 1.5, alpha=2)),
    "type": (aten.to.dtype, lambda x: x.to(torch.int64) + 1),
    "flat": (aten.flatten.using_ints, lambda x: x.flatten()),
    "flat to the end": (aten.flatten.using_ints, lambda x: x.flatten(2)),
    "flat inside": (aten.flatten.using_ints, lambda x: x.flatten(1, -2)),
    "flat after a permutation": (aten.flatten.using_ints, lambda x: x.permute(3, 0, 2, 1).flatten(-3, 2)),
    "folded": (aten.unflatten.int, lambda x: x.unflatten(1, (2, 2))),
    "folded last": (aten.unflatten.int, lambda x: x.unflatten(-1, (3, -1))),
    "folded by sizes": (aten.unflatten.int, lambda x: x.flatten(0, 1).unflatten(0, x.shape[:2])),
}


@pytest.mark.parametrize(("target", "function"), CASES.values(), ids=CASES)
def test_a_rewritten_operator_is_torchs(target: Any, function: Callable[[Tensor], Tensor]) -> None:
    """At other sizes than those of the trace, in whole numbers: nothing is rounded."""
    x = torch.arange(-84.0, 84.0).reshape(1, 4, 7, 6)
    model, targets = exported(function, known)
    assert target not in targets, "it was decomposed, or is written in another way"
    np.testing.assert_array_equal(run(model, x), function(x).numpy())


def test_every_rewrite_has_a_case() -> None:
    assert {target for target, _ in CASES.values()} == set(REWRITES)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: torch.movedim(x.square(), 1, 2), "an operator without a translation"),
        (lambda x: torch.relu_(x.square()), "an operator that writes in place"),
    ],
)
def test_anything_else_is_decomposed(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[Tensor], Tensor], what: str
) -> None:
    monkeypatch.setattr(lowering, "rewrite", lambda _: pytest.fail(f"{what} was left as it is"))
    x = torch.linspace(-2, 2, 168).reshape(1, 4, 7, 6)
    model, _ = exported(function, known)
    np.testing.assert_allclose(run(model, x), function(x).numpy(), rtol=1e-5, atol=1e-6)


def test_where_translations_are_not_known_programs_are_decomposed() -> None:
    function: Callable[[Tensor], Tensor] = lambda x: 2 * x.square()  # noqa: E731
    model, targets = exported(function, lambda _: False)
    assert aten.square.default in targets
    x = torch.arange(168.0).reshape(1, 4, 7, 6)
    np.testing.assert_array_equal(run(model, x), function(x).numpy())


@pytest.mark.parametrize("name", ["head", "block_00"])
def test_no_graph_of_a_bundle_is_traced_twice(
    micro: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What is new in a model's code is to be rewritten too: decomposing it, an export takes twice as long."""
    rewritable, found = lowering.rewritable, []

    def noted(*arguments: Any) -> bool:
        found.append(rewritable(*arguments))
        return found[-1]

    monkeypatch.setattr(lowering, "rewritable", noted)
    writer = GraphWriter(micro, tmp_path, "float32")
    module = fused_view(writer.plain(name)) if name == "block_00" else writer.plain(name)
    onnx_from_module.trace(module, name, writer.specs[name], writer.facts)
    assert found == [True]
