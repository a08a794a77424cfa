"""Graphs bound to equal inputs on any backend, and how far two results are apart."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime.backends.base import Backend, Buffer, Call
from stiv_deploy.runtime.bundle.bundle import Bundle

Bound = tuple[Call, dict[str, Buffer], dict[str, Buffer]]


def bind_graph(backend: Backend, bundle: Bundle, graph: str, size: str) -> Bound:
    manifest, generator = bundle.manifest, np.random.default_rng(len(graph))
    spec, dims = manifest.graphs[graph].spec, manifest.buckets[0].dims(manifest.model, size)  # type: ignore[arg-type]
    inputs = {}
    for tensor in spec.inputs:
        shape = tensor.sized(dims)
        values: dict[str, Any] = {
            "int64": lambda shape=shape: np.ones(shape, np.int64),
            "bool": lambda shape=shape: generator.random(shape) < 0.5,
        }
        make = values.get(tensor.dtype, lambda shape=shape: generator.standard_normal(shape, np.float32))
        inputs[tensor.name] = backend.upload(make())
    outputs = {tensor.name: backend.empty(tensor.sized(dims), tensor.dtype) for tensor in spec.outputs}
    return backend.bind(graph, inputs, outputs), inputs, outputs


HALVES = 1e-3
"""Largest share of 8-bit values that may differ by one: where two levels meet, a fused product and sum round apart."""


def relative_l2(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.dtype == np.uint8:
        apart = np.abs(found.astype(int) - wanted)
        found = np.where(apart == 1, wanted, found) if (apart == 1).mean() <= HALVES else found
    wanted = wanted.astype(np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="session")
def bind() -> Callable[..., Bound]:
    """Binds a graph of a float32 bundle, at a corner of its first bucket, to inputs that depend on graph and size only.

    ``bind(backend, bundle, graph, size)`` gives the call, the inputs and the outputs.
    """
    return bind_graph


@pytest.fixture(scope="session")
def rel_l2() -> Callable[[np.ndarray, np.ndarray], float]:
    """Norm of the difference over the norm of what is wanted."""
    return relative_l2
