"""Clips that several threads or processes make at the same time, each one of its own: what a machine gives unshared."""

import multiprocessing
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.request import GenerationRequest

_OWN = threading.local()
"""Of a worker: its pipeline, and the barrier at which all of them begin."""
STALL_SECONDS = 600


def cpu_pipeline(folder: Path, threads: int) -> StivPipeline:
    """The bundle in ONNX Runtime with exactly ``threads`` threads, be they more than there are cores."""
    bundle = Bundle.open(folder)
    return StivPipeline(bundle, OnnxRuntimeBackend(bundle, threads=threads))


def latent_seconds(pipe: StivPipeline, request: GenerationRequest) -> float:
    """Seconds that the latents of ``request`` take."""
    plan = pipe.plan(request)
    started = time.perf_counter()
    pipe.run(plan, output_type="latent")
    return time.perf_counter() - started


class Apart:
    """``count`` workers of ``threads`` threads each, in processes or in threads of this one; closed as a context."""

    def __init__(self, folder: Path, count: int, threads: int, *, processes: bool) -> None:
        self._count = count
        self._pool: Executor
        if processes:
            context = multiprocessing.get_context("spawn")
            given = (folder, threads, context.Barrier(count))
            self._pool = ProcessPoolExecutor(count, context, _open, given)
        else:
            self._pool = ThreadPoolExecutor(
                count, initializer=_open, initargs=(folder, threads, threading.Barrier(count))
            )

    def __call__(self, request: GenerationRequest) -> float:
        """Let each make the clip of ``request``; returns the seconds until the last one has it, a clip of all."""
        made = [self._pool.submit(_make, request) for _ in range(self._count)]
        return max(each.result() for each in made) / self._count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _open(folder: Path, threads: int, begin: Any) -> None:
    _OWN.pipe, _OWN.begin = cpu_pipeline(folder, threads), begin


def _make(request: GenerationRequest) -> float:
    """Seconds of one clip, once every worker has one to make: so each takes one."""
    _OWN.begin.wait(STALL_SECONDS)
    return latent_seconds(_OWN.pipe, request)
