"""Backends by name, and which of them work here. Each is imported only when asked for."""

import logging
from collections.abc import Callable
from typing import Literal, cast

from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import BackendError, BundleError, EngineError

ONNXRUNTIME, ONNXRUNTIME_CUDA, TENSORRT, TENSORRT_RTX = "onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"
BACKENDS = (ONNXRUNTIME, ONNXRUNTIME_CUDA, TENSORRT, TENSORRT_RTX)
"""Names for ``open_backend``."""
AUTO = "auto"
PREFERENCE = (TENSORRT, TENSORRT_RTX, ONNXRUNTIME_CUDA, ONNXRUNTIME)
"""Order in which ``auto`` tries them: engines, which somebody built on purpose, then the GPU, then the CPU."""

Flavour = Literal["tensorrt", "tensorrt-rtx"]
log = logging.getLogger(__name__)


def _engine_reason(name: str) -> str | None:
    try:
        from stiv_deploy.runtime.backends import tensorrt
    except ImportError as error:
        return f"cannot be imported ({error})"
    return tensorrt.unavailable_reason(cast(Flavour, name))


def unavailable_reason(name: str) -> str | None:
    """Why the backend ``name`` cannot run on this machine, in one line; ``None`` if it can."""
    if name in (TENSORRT, TENSORRT_RTX):
        return _engine_reason(name)
    try:
        from stiv_deploy.runtime.backends import onnxruntime
    except ImportError as error:
        return f"onnxruntime cannot be imported ({error})"
    return onnxruntime.unavailable_reason("cuda" if name == ONNXRUNTIME_CUDA else "cpu")


def available() -> dict[str, str | None]:
    """Every backend with ``None`` if it works here, else the reason why not."""
    return {name: unavailable_reason(name) for name in BACKENDS}


def _open(name: str, bundle: Bundle, threads: int | None) -> Backend:
    if name in (TENSORRT, TENSORRT_RTX):
        from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(bundle, cast(Flavour, name))
    from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, "cuda" if name == ONNXRUNTIME_CUDA else "cpu", threads)


def _has_engines(name: str, bundle: Bundle) -> bool:
    return any(engine.backend == name for engine in bundle.manifest.engines)


def _open_best(bundle: Bundle, threads: int | None, reason_of: Callable[[str], str | None]) -> Backend:
    for name in PREFERENCE[:-1]:
        if name in (TENSORRT, TENSORRT_RTX) and not _has_engines(name, bundle):
            continue
        reason = reason_of(name)
        if reason is None:
            try:
                return _open(name, bundle, threads)
            except (BackendError, EngineError) as error:
                reason = str(error)
        log.info("backend %s is passed over: %s", name, reason)
    return _open(PREFERENCE[-1], bundle, threads)


def open_backend(name: str | None, bundle: Bundle, threads: int | None = None) -> Backend:
    """Open a backend on ``bundle``; ``None`` or ``"auto"`` takes the best that works here (see ``PREFERENCE``).

    ``threads`` is for the CPU; by default all cores, or ``STIV_THREADS``. Raises :class:`BackendError` for a name that
    is unknown or cannot run here, :class:`EngineError` where an engine does not fit, :class:`BundleError` for damage.
    """
    if name is None or name == AUTO:
        return _open_best(bundle, threads, unavailable_reason)
    if name not in BACKENDS:
        works = [backend for backend, reason in available().items() if reason is None]
        raise BackendError(
            f"unknown backend {name!r}; there are {', '.join(BACKENDS)}; here these work: {', '.join(works) or 'none'}"
        )
    reason = unavailable_reason(name)
    if reason is not None:
        raise BackendError(f"backend {name} does not work here: {reason}")
    return _open(name, bundle, threads)


__all__ = ["AUTO", "BACKENDS", "Backend", "BundleError", "available", "open_backend", "unavailable_reason"]
