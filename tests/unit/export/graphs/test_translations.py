"""Translations of operators are read once, and the exporter is as it was afterwards."""

from collections.abc import Iterator

import pytest
import torch

from stiv_deploy.export.graphs import translations
from stiv_deploy.export.graphs.onnx_from_module import OPSET
from stiv_deploy.export.graphs.translations import read_once, translated

registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
Registry = registration.ONNXRegistry


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    translations._registry.cache_clear()
    yield
    translations._registry.cache_clear()


def exported(**options: object) -> torch.onnx.ONNXProgram:
    with read_once(OPSET):
        return torch.onnx.export(torch.nn.ReLU(), (torch.zeros(2),), dynamo=True, verbose=False, **options)


def test_they_are_read_once_by_the_exporter_of_this_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Registry.from_torchlib, []
    monkeypatch.setattr(Registry, "from_torchlib", lambda **options: calls.append(options) or original(**options))
    models = [exported(opset_version=OPSET) for _ in range(2)]
    assert calls == [{"opset_version": OPSET}], "the exporter of this version of torch does not ask there"
    assert str(models[0].model) == str(models[1].model)
    assert models[0].model.opset_imports[""] == OPSET


def test_what_an_export_adds_is_its_own() -> None:
    """A translation of one export is not found by the next."""
    from onnxscript import opset23

    table = {torch.ops.aten.relu.default: lambda x: opset23.Sigmoid(x)}
    found = [exported(opset_version=OPSET, **more) for more in ({}, {"custom_translation_table": table}, {})]
    assert [[node.op_type for node in each.model.graph] for each in found] == [["Relu"], ["Sigmoid"], ["Relu"]]


def test_outside_nothing_is_changed() -> None:
    before = Registry.from_torchlib
    with read_once(OPSET):
        assert Registry.from_torchlib is not before
    assert Registry.from_torchlib == before


def test_it_is_known_what_has_a_translation() -> None:
    assert translated(torch.ops.aten.relu.default, OPSET)
    assert not translated(torch.ops.aten.relu_.default, OPSET)


def test_a_torch_that_has_them_elsewhere_exports_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(registration, "ONNXRegistry")
    with read_once(OPSET):
        pass
    assert not translated(torch.ops.aten.relu.default, OPSET)
