"""The exporter's translations of ATen operators, read from their sources once a process instead of once a graph."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch


@cache
def _registry(opset: int) -> Any:
    """All translations for ``opset``; ``None`` where this version of torch has them elsewhere."""
    try:
        kind = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        return kind.from_torchlib(opset_version=opset)
    except (ImportError, AttributeError, TypeError):
        return None


@contextmanager
def read_once(opset: int) -> Iterator[None]:
    """``torch.onnx.export`` to ``opset`` inside reads some 500 functions the first time only: 1.5 seconds a graph.

    What is kept is never changed: whoever asks has lists of his own. Where it is not found, all is as ever.
    """
    kept = _registry(opset)
    if kept is None:
        yield
        return
    with patch.object(type(kept), "from_torchlib", lambda *_, **__: _copy(kept)):
        yield


def _copy(registry: Any) -> Any:
    """A registry to which translations can be added."""
    new = copy.copy(registry)
    new.functions = {target: list(found) for target, found in registry.functions.items()}
    return new


def translated(target: Any, opset: int) -> bool:
    """Whether ``torch.onnx.export`` to ``opset`` has a translation of ``target``; False where that is not known."""
    kept = _registry(opset)
    return kept is not None and bool(kept.is_registered(target))
