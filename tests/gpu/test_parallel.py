"""One clip on two or more real GPUs: the clip of one, by engines of halves and copies between the GPUs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.engines.build import BuildRequest, build_engines
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.backends.cuda import Cuda, count_gpus
from stiv_deploy.runtime.backends.tensorrt import unavailable_reason
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.sampling.parallel.collective import NcclTransport
from stiv_deploy.runtime.sampling.parallel.peers import PeerTransport
from stiv_deploy.runtime.sampling.parallel.sockets import SocketTransport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif((count_gpus() or 0) < 2, reason="fewer than two GPUs"),
]
RUN_GATE = 1e-4
"""Relative L2 error of latents after a few steps in float32, of engines as of anything else; two of them lie twice that
from each other."""
REQUEST = GenerationRequest(prompt="a red digit three moving left", num_inference_steps=4, seed=0)


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 bundle with halves, and engines of all its graphs for this GPU."""
    reason = unavailable_reason("tensorrt")
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("parallel") / "bundle"
    export_bundle(ExportRequest(checkpoint=checkpoint, out=folder, halves=True, check=False))
    build_engines(BuildRequest(bundle=folder, backend="tensorrt", sm=Cuda().device.sm, cache=folder.parent / "cache"))
    return folder


@pytest.fixture(scope="module")
def alone(built: Path) -> np.ndarray:
    with StivPipeline.from_bundle(built, "tensorrt") as pipe:
        return pipe.run(pipe.plan(REQUEST), output_type="latent").latents


@pytest.mark.parametrize("parallel", ["cfg2", "dsp2"])
@pytest.mark.parametrize("way", [PeerTransport, SocketTransport, NcclTransport])
def test_two_gpus_make_the_clip_of_one(
    built: Path, alone: np.ndarray, parallel: str, way: type, rel_l2: Callable[[np.ndarray, np.ndarray], float]
) -> None:
    processes, nccl = way is SocketTransport, way is NcclTransport
    if nccl:
        pytest.importorskip("nccl.bindings.nccl", reason="nccl4py is not installed; the extra 'nccl' has it")
    with StivPipeline.from_bundle(
        built, "tensorrt", devices=["0", "1"], parallel=parallel, processes=processes, nccl=nccl
    ) as pipe:
        assert pipe._team is not None
        assert isinstance(pipe._team.transport, way)
        first, again = (pipe.run(pipe.plan(REQUEST), output_type="latent").latents for _ in range(2))
    assert rel_l2(first, alone) <= 2 * RUN_GATE
    np.testing.assert_array_equal(first, again)


def test_all_gpus_decode_the_frames_of_one(built: Path, alone: np.ndarray) -> None:
    with StivPipeline.from_bundle(built, "tensorrt") as pipe:
        plan = pipe.plan(REQUEST)
        right = pipe.decode(plan, alone)
    names = [str(index) for index in range(count_gpus() or 0)]
    with StivPipeline.from_bundle(built, "tensorrt", devices=names) as pipe:
        found = pipe.decode(plan, alone)
    assert (np.abs(found.astype(int) - right.astype(int)) <= 1).all(), "kernels may differ by the number of frames"
