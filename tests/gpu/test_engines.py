"""Real engines on a real GPU: every graph, a whole generation and CUDA graph replay, against ONNX Runtime."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stiv_deploy.export.engines.build import BuildRequest, build_engines
from stiv_deploy.runtime.backends.cuda import Cuda
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend, unavailable_reason
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.manifest import PORTABLE
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.tensorrt_library import FLAVOURS, Flavour, import_tensorrt, targets

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
Bind, RelL2 = Callable[..., Any], Callable[[np.ndarray, np.ndarray], float]
BLOCK_GATE = 1e-5
"""Relative L2 error of a float32 graph: the project's promise for ONNX Runtime against torch, asked of engines too."""
RUN_GATE = 1e-4
"""The same for latents after a few steps, each of which adds its own rounding to the last one's."""


@pytest.fixture(scope="module", params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    reason = unavailable_reason(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["separate", "shared plan"])
def built(
    request: pytest.FixtureRequest, flavour: Flavour, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """A copy of the bundle with engines for this GPU; portable ones where RTX does not list its SM.

    Once each graph has an engine of its own, once all blocks share one and weights are inputs.
    """
    folder = tmp_path_factory.mktemp(flavour) / "bundle"
    shutil.copytree(bundle, folder)
    known, here = targets(import_tensorrt(flavour)), Cuda().device.sm
    sm = PORTABLE if known and here not in known else here
    cache = folder.parent / "cache"
    build_engines(BuildRequest(bundle=folder, backend=flavour, sm=sm, cache=cache, shared_plan=request.param))
    return Bundle.open(folder)


@pytest.fixture
def backend(built: Bundle, flavour: Flavour) -> Iterator[TensorRTBackend]:
    with TensorRTBackend(built, flavour) as opened:
        yield opened


@pytest.mark.parametrize("size", ["min", "typical", "max"])
def test_every_graph(backend: TensorRTBackend, built: Bundle, size: str, bind: Bind, rel_l2: RelL2) -> None:
    errors = {}
    with OnnxRuntimeBackend(built) as reference:
        for graph in built.manifest.graphs:
            call, _, found = bind(backend, built, graph, size)
            call()
            wanted_call, _, wanted = bind(reference, built, graph, size)
            wanted_call()
            errors[graph] = max(rel_l2(backend.read(found[name]), reference.read(wanted[name])) for name in wanted)
    assert {graph: error for graph, error in errors.items() if not error <= BLOCK_GATE} == {}


def test_generation(backend: TensorRTBackend, built: Bundle, rel_l2: RelL2) -> None:
    arguments: dict[str, Any] = {"prompt": "digit three moving left", "num_inference_steps": 3, "seed": 1}
    found = StivPipeline(built, backend)(**arguments)
    with OnnxRuntimeBackend(built) as reference:
        wanted = StivPipeline(built, reference)(**arguments)
    assert rel_l2(found.latents, wanted.latents) <= RUN_GATE


def test_generation_twice_is_bit_equal(backend: TensorRTBackend, built: Bundle) -> None:
    pipe = StivPipeline(built, backend)
    first, second = (pipe(prompt="digit three moving left", num_inference_steps=2, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first.latents, second.latents)


def test_cuda_graph_replay_equals_the_call(backend: TensorRTBackend, built: Bundle, bind: Bind) -> None:
    call, inputs, outputs = bind(backend, built, "head", "typical")
    call()
    replay = backend.capture([call])
    x = inputs["x"]
    backend.write(x, np.random.default_rng(9).standard_normal(x.shape, np.float32))
    call()
    expected = backend.read(outputs["velocity"])
    backend.write(outputs["velocity"], np.zeros_like(expected))
    replay()
    np.testing.assert_array_equal(backend.read(outputs["velocity"]), expected)


def test_one_cuda_graph_of_all_engines(backend: TensorRTBackend, built: Bundle, bind: Bind) -> None:
    """And of a device copy, while memory dies that may only be freed when the graph is done."""
    bound = [bind(backend, built, graph, "typical") for graph in built.manifest.graphs]
    calls = [call for call, _, _ in bound]
    for call in calls:
        call()
    outputs = [buffer for _, _, buffers in bound for buffer in buffers.values()]
    expected = [backend.read(buffer) for buffer in outputs]
    twin = backend.empty(outputs[0].shape, outputs[0].dtype)
    doomed = [backend.empty((1 << 20,), "float32")]
    replay = backend.capture([*calls, partial(backend.copy, twin, outputs[0]), doomed.clear])
    for buffer, values in zip(outputs, expected, strict=True):
        backend.write(buffer, np.zeros_like(values))
    replay()
    for buffer, values in zip((*outputs, twin), (*expected, expected[0]), strict=True):
        np.testing.assert_array_equal(backend.read(buffer), values)


def test_arena_is_shared(backend: TensorRTBackend, built: Bundle, bind: Bind) -> None:
    """All graphs at their largest: the arena is what the greediest needs, not the sum."""
    needs = []
    for graph in built.manifest.graphs:
        bind(backend, built, graph, "max")
        needs.append(backend._arena.memory.size if backend._arena.memory else 0)
    assert needs == sorted(needs)
    assert needs[-1] < sum(dict.fromkeys(needs))
