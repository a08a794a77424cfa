"""The exporter's translations of ATen operators, read from their sources once a process instead of once a graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch


@cache
def _translations(read: Any) -> Any:
    return read()


@contextmanager
def read_once() -> Iterator[None]:
    """``torch.onnx.export`` inside parses some 500 functions the first time only: a second less for every graph.

    What it keeps is never changed. Where another version of torch has them elsewhere, nothing is kept.
    """
    try:
        apis = import_module("torch.onnx._internal._lazy_import").onnxscript_apis
        read = apis.get_torchlib_ops
    except (ImportError, AttributeError):
        yield
        return
    with patch.object(apis, "get_torchlib_ops", lambda: _translations(read)):
        yield
