"""Translations of operators are read once, and the exporter is as it was afterwards."""

from collections.abc import Iterator

import pytest
import torch

from stiv_deploy.export.graphs import translations
from stiv_deploy.export.graphs.translations import read_once

apis = pytest.importorskip("torch.onnx._internal._lazy_import").onnxscript_apis


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    translations._translations.cache_clear()
    yield
    translations._translations.cache_clear()


def test_they_are_read_once_by_the_exporter_of_this_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = apis.get_torchlib_ops, []
    monkeypatch.setattr(apis, "get_torchlib_ops", lambda: calls.append(1) or original())
    models = []
    for _ in range(2):
        with read_once():
            models.append(torch.onnx.export(torch.nn.ReLU(), (torch.zeros(2),), dynamo=True, verbose=False))
    assert calls == [1], "the exporter of this version of torch does not ask there"
    assert str(models[0].model) == str(models[1].model)


def test_outside_nothing_is_changed() -> None:
    before = apis.get_torchlib_ops
    with read_once():
        assert apis.get_torchlib_ops is not before
    assert apis.get_torchlib_ops == before


def test_a_torch_that_has_them_elsewhere_exports_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx._internal._lazy_import.onnxscript_apis", object())
    with read_once():
        pass
