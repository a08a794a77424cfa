"""The TensorRT backend on one of several stand-in GPUs, and from any thread."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime.backends import tensorrt as backend_module
from stiv_deploy.runtime.backends.cuda import Cuda, count_gpus
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend, unavailable_reason
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import BackendError
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline


def in_new_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` returns or raises in a thread that has never seen CUDA."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


def use(backend: TensorRTBackend, scale: float = 1.0) -> np.ndarray:
    """Every entry of the backend once; returns the decoded frames."""
    source = backend.upload(np.full((1, 4, 4, 4, 4), scale, np.float32))
    target = backend.empty((1, 4, 3, 8, 8), "float32")
    twin = backend.empty(target.shape, "float32")
    call = backend.bind("decoder", {"latents": source}, {"video": target})
    call()
    backend.capture([call])()
    backend.copy(twin, target)
    backend.synchronize()
    return backend.read(twin)


def test_every_entry_works_from_any_thread(folder: Path, stand_ins: SimpleNamespace) -> None:
    """On GPU 1: opened by this thread, each entry called first by a thread that has chosen no GPU."""
    cudart = stand_ins.cudart(gpus=2)
    backend, _ = stand_ins.open(folder, cudart, device=1)
    source = in_new_thread(lambda: backend.upload(np.ones((1, 4, 4, 4, 4), np.float32)))
    target, twin = (in_new_thread(lambda: backend.empty((1, 4, 3, 8, 8), "float32")) for _ in range(2))
    bound = [in_new_thread(lambda: backend.bind("decoder", {"latents": source}, {"video": target}))]
    in_new_thread(bound[0])
    replay = in_new_thread(lambda: backend.capture(bound))
    in_new_thread(lambda: backend.write(source, np.full(source.shape, 3, np.float32)))
    in_new_thread(replay)
    in_new_thread(lambda: backend.copy(twin, target))
    in_new_thread(backend.synchronize)
    np.testing.assert_array_equal(in_new_thread(lambda: backend.read(twin))[..., ::2, ::2], 3)
    bound.clear()
    del replay
    in_new_thread(backend.close)
    assert cudart.contexts == {1}, "nothing may be set up on a GPU that was not asked for"


def test_a_generation_on_another_gpu_from_another_thread(folder: Path, stand_ins: SimpleNamespace) -> None:
    cudart = stand_ins.cudart(gpus=3)
    backend, _ = stand_ins.open(folder, cudart, device=2)
    arguments: dict[str, Any] = {"prompt": "digit three moving left", "num_inference_steps": 2, "seed": 4}
    pipe = StivPipeline(Bundle.open(folder), backend)
    here, there = pipe(**arguments), in_new_thread(lambda: pipe(**arguments))
    np.testing.assert_array_equal(here.latents, there.latents)
    assert cudart.contexts == {2}


def test_backends_on_two_gpus_take_turns_in_one_thread(folder: Path, stand_ins: SimpleNamespace) -> None:
    cudart = stand_ins.cudart(gpus=2)
    first, second = (stand_ins.open(folder, cudart, device=device)[0] for device in (0, 1))
    for scale, backend in enumerate((first, second, first, second)):
        np.testing.assert_array_equal(use(backend, scale)[..., ::2, ::2], scale)


def test_what_is_freed_leaves_the_threads_gpu_alone(folder: Path, stand_ins: SimpleNamespace) -> None:
    """A finalizer runs anywhere, between the choice of a GPU and its use too."""
    cudart = stand_ins.cudart(gpus=2)
    first, second = (stand_ins.open(folder, cudart, device=device)[0] for device in (0, 1))
    doomed = [first.empty((3,), "float32")]
    second.synchronize()
    doomed.clear()
    gc.collect()
    assert cudart.chosen.gpu == 1


def test_what_a_new_thread_frees_sets_nothing_up_elsewhere(folder: Path, stand_ins: SimpleNamespace) -> None:
    cudart = stand_ins.cudart(gpus=2)
    backend, _ = stand_ins.open(folder, cudart, device=1)
    doomed = [backend.empty((3,), "float32")]
    before = len(cudart.memory)
    in_new_thread(doomed.clear)
    assert len(cudart.memory) == before - 1
    assert cudart.contexts == {1}


def test_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, stand_ins: SimpleNamespace) -> None:
    monkeypatch.setattr(backend_module, "missing_library", lambda flavour: None)
    monkeypatch.setattr(backend_module, "load_cuda", lambda: stand_ins.cudart(gpus=2))
    assert unavailable_reason("tensorrt", 1) is None
    assert unavailable_reason("tensorrt", 2) == "no usable NVIDIA GPU: there is no GPU 2; CUDA sees 2, counted from 0"
    with pytest.raises(BackendError, match="^there is no GPU 5; CUDA sees 1, counted from 0$"):
        Cuda(stand_ins.cudart(), 5)


def test_gpus_are_counted_where_that_is_possible(monkeypatch: pytest.MonkeyPatch, stand_ins: SimpleNamespace) -> None:
    def count_with(load: Callable[[], Any]) -> int | None:
        monkeypatch.setattr("stiv_deploy.runtime.backends.cuda.load_cuda", load)
        return count_gpus()

    def raises(error: Exception) -> Any:
        raise error

    assert count_with(lambda: stand_ins.cudart(gpus=3)) == 3
    assert count_with(lambda: SimpleNamespace(cudaGetDeviceCount=lambda: (35, None))) is None
    assert count_with(lambda: SimpleNamespace(cudaGetDeviceCount=lambda: raises(RuntimeError("no libcuda")))) is None
    assert count_with(lambda: raises(BackendError("cuda-python is not installed"))) is None
