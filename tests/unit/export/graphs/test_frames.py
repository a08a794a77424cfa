"""The graph of 8-bit frames against the conversion in numpy, over all that a float32 can be."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from stiv_deploy.export.audit.layer_report import read_report
from stiv_deploy.export.engines.job import EngineJob
from stiv_deploy.export.engines.worker import run
from stiv_deploy.export.graphs.writer import GraphWriter
from stiv_deploy.runtime.bundle.contract import FRAMES
from stiv_deploy.runtime.pipeline.images import frames_from_video
from stiv_deploy.runtime.tensorrt_library import missing_library
from stiv_deploy.stiv_ref.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def session(micro: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    folder = tmp_path_factory.mktemp("frames")
    record = GraphWriter(micro, folder, "bfloat16").write(FRAMES)
    assert record.data is None
    return onnxruntime.InferenceSession(folder / f"{FRAMES}.onnx")


def both(session: onnxruntime.InferenceSession, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames of as many of ``values`` as make a whole video, by the graph and by numpy."""
    rows = len(values) // (2 * 3 * width)
    video = values[: 2 * 3 * rows * width].reshape(1, 2, 3, rows, width)
    (found,) = session.run(None, {"video": video})
    return found, frames_from_video(video)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_any_bits(session: onnxruntime.InferenceSession, width: int) -> None:
    """A million patterns of bits: every exponent, denormals, infinities and NaN, in vectors and at their ends."""
    bits = np.random.default_rng(width).integers(0, 2**32, 1_000_003, np.uint32)
    found, wanted = both(session, bits.view(np.float32), width)
    assert found.dtype == np.uint8
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_halves_go_to_even(session: onnxruntime.InferenceSession, steps: int) -> None:
    """Where two levels meet, and one float beside it, beyond both ends too."""
    halves = ((np.arange(-4, 260) + 0.5 - 127.5) / 127.5).astype(np.float32)
    near = np.nextafter(halves, np.float32(2 * steps)) if steps else halves
    found, wanted = both(session, near, 4)
    assert np.array_equal(found, wanted)


def test_nan_is_black(session: onnxruntime.InferenceSession) -> None:
    for count in (6, 96, 1200):
        found, wanted = both(session, np.full(count, np.nan, np.float32), 1)
        assert not found.any()
        assert not wanted.any()


@pytest.mark.skipif(missing_library("tensorrt-rtx") is not None, reason=str(missing_library("tensorrt-rtx")))
def test_engines_can_be_built_of_it(micro: Checkpoint, tmp_path: Path) -> None:
    """A builder takes 8 bits as an output only, and makes one kernel of it all."""
    GraphWriter(micro, tmp_path, "bfloat16").write(FRAMES)
    job = EngineJob(
        graph=FRAMES,
        onnx=str(tmp_path / f"{FRAMES}.onnx"),
        plan=str(tmp_path / "plan"),
        backend="tensorrt-rtx",
        sm="89",
        profiles=({"video": ((1, 1, 3, 16, 16), (1, 8, 3, 32, 32), (4, 16, 3, 64, 64))},),
        report=str(tmp_path / "report.txt"),
    )
    assert run(job.to_json()).error is None
    assert sum(layer.is_kernel for layer in read_report(tmp_path / "report.txt")) == 1
