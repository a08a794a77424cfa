"""Engines with our plugins in them on a real GPU: blocks, a generation and CUDA graph replay, against ONNX Runtime."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.engines.build import BuildRequest, build_engines
from stiv_deploy.export.engines.plugin_graphs import BuildAttention
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend, unavailable_reason
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Precision
from stiv_deploy.runtime.errors import BackendError, KernelError
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.plugins.library import library_path
from stiv_deploy.runtime.plugins.tensorrt_plugins import plugin_library

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
Bind, RelL2 = Callable[..., Any], Callable[[np.ndarray, np.ndarray], float]
BLOCK_GATE = 1e-5
"""Relative L2 error of a float32 graph, as for engines without plugins (``test_engines.py``)."""
RUN_GATE = 1e-4
"""The same for latents after a few steps, each of which adds its own rounding to the last one's."""
TWICE = 2
"""Most error in 16 bits, in units of that of engines with TensorRT's own attention: the kernels' own promise."""


@pytest.fixture(scope="module", autouse=True)
def _tensorrt() -> None:
    """All that these tests need, or the reason to skip them."""
    reason = unavailable_reason("tensorrt")
    if reason is not None:
        pytest.skip(reason)
    try:
        plugin_library()
        library_path()
    except (BackendError, KernelError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def make_bundle(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Precision, BuildAttention], Bundle]:
    """Exports the tiny checkpoint with both forms of its blocks and builds engines for this GPU."""

    def make(precision: Precision, attention: BuildAttention) -> Bundle:
        folder = tmp_path_factory.mktemp(f"{precision}-{attention}")
        export_bundle(
            ExportRequest(
                checkpoint=checkpoint, out=folder / "bundle", precision=precision, check=False, attention="plugin"
            )
        )
        request = BuildRequest(
            bundle=folder / "bundle", backend="tensorrt", sm="auto", attention=attention, cache=folder / "cache"
        )
        build_engines(request)
        return Bundle.open(folder / "bundle")

    return make


@pytest.fixture(scope="module")
def built(make_bundle: Callable[[Precision, BuildAttention], Bundle]) -> Bundle:
    return make_bundle("float32", "plugin")


@pytest.fixture
def backend(built: Bundle) -> Iterator[TensorRTBackend]:
    with TensorRTBackend(built, "tensorrt") as opened:
        yield opened


def latents(bundle: Bundle, backend: Backend) -> np.ndarray:
    with backend:
        return StivPipeline(bundle, backend)(prompt="digit three moving left", num_inference_steps=3, seed=1).latents


def test_engines_are_of_the_library_here(built: Bundle) -> None:
    found = {record.graph: record.plugins for record in built.manifest.engines}
    plugin = plugin_library().sha256
    assert found == {name: plugin if graph.plugin else None for name, graph in built.manifest.graphs.items()}
    assert plugin in found.values()


@pytest.mark.parametrize("size", ["min", "typical", "max"])
def test_every_block(backend: TensorRTBackend, built: Bundle, size: str, bind: Bind, rel_l2: RelL2) -> None:
    errors = {}
    with OnnxRuntimeBackend(built) as reference:
        for graph in [name for name, record in built.manifest.graphs.items() if record.plugin is not None]:
            call, _, found = bind(backend, built, graph, size)
            call()
            wanted_call, _, wanted = bind(reference, built, graph, size)
            wanted_call()
            errors[graph] = max(rel_l2(backend.read(found[name]), reference.read(wanted[name])) for name in wanted)
    assert errors
    assert {graph: error for graph, error in errors.items() if not error <= BLOCK_GATE} == {}


def test_generation(built: Bundle, rel_l2: RelL2) -> None:
    found = latents(built, TensorRTBackend(built, "tensorrt"))
    assert rel_l2(found, latents(built, OnnxRuntimeBackend(built))) <= RUN_GATE
    np.testing.assert_array_equal(latents(built, TensorRTBackend(built, "tensorrt")), found)


def test_cuda_graph_replay_equals_the_call(backend: TensorRTBackend, built: Bundle, bind: Bind) -> None:
    call, inputs, outputs = bind(backend, built, "block_00", "typical")
    call()
    replay = backend.capture([call])
    x, y = inputs["x"], outputs["x_out"]
    backend.write(x, np.random.default_rng(9).standard_normal(x.shape, np.float32))
    call()
    expected = backend.read(y)
    backend.write(y, np.zeros_like(expected))
    replay()
    np.testing.assert_array_equal(backend.read(y), expected)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_16_bits_in_both_packagings(
    make_bundle: Callable[[Precision, BuildAttention], Bundle], built: Bundle, precision: Precision, rel_l2: RelL2
) -> None:
    """Against the float32 bundle in ONNX Runtime, each packaging errs as TensorRT's own attention does."""
    wanted = latents(built, OnnxRuntimeBackend(built))
    errors = {}
    forms: tuple[BuildAttention, ...] = ("native", "plugin", "quick")
    for attention in forms:
        bundle = make_bundle(precision, attention)
        errors[attention] = rel_l2(latents(bundle, TensorRTBackend(bundle, "tensorrt")), wanted)
    assert max(errors.values()) <= TWICE * errors["native"], errors
