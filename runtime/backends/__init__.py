"""Backends by name, and which of them work here. Each is imported only when asked for."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.merging import FOR_GOOD
from stiv_deploy.runtime.bundle.verified import read_result
from stiv_deploy.runtime.errors import (
    BackendError,
    BundleError,
    EngineError,
    LoraError,
    Quarantined,
    briefly,
    raise_interrupt,
)
from stiv_deploy.runtime.tensorrt_library import FLAVOURS, Flavour

if TYPE_CHECKING:
    from stiv_deploy.runtime.backends.onnxruntime_memory import Where

AUTO = "auto"
DEVICE_LIMIT = 1_023
log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A backend: ``open(bundle, threads, device)``, and reasons for a device, ``None`` if there are none.

    ``reason(device)``: why it cannot run there; ``graph_reason(device)``: why it captures no CUDA graphs there.
    """

    reason: Callable[[int], str | None]
    graph_reason: Callable[[int], str | None]
    open: Callable[[Bundle, int | None, int], Backend]


def _onnxruntime_reason(where: "Where", device: int) -> str | None:
    try:
        from stiv_deploy.runtime.backends import onnxruntime
    except ImportError as error:
        raise_interrupt(error)
        return f"onnxruntime cannot be imported ({error})"
    return onnxruntime.unavailable_reason(where, device)


def _open_onnxruntime(where: "Where", bundle: Bundle, threads: int | None, device: int) -> Backend:
    from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend, thread_count

    return OnnxRuntimeBackend(bundle, where, thread_count(threads), device)


def _engine_reason(flavour: Flavour, device: int) -> str | None:
    try:
        from stiv_deploy.runtime.backends import tensorrt
    except ImportError as error:
        raise_interrupt(error)
        return f"cannot be imported ({error})"
    return tensorrt.unavailable_reason(flavour, device)


def _engine_graph_reason(flavour: Flavour, device: int) -> str | None:
    from stiv_deploy.runtime.backends import tensorrt

    return tensorrt.graph_reason(flavour, device)


def _open_engines(flavour: Flavour, bundle: Bundle, _threads: int | None, device: int) -> Backend:
    if bundle.loras and not any(each.weights for each in bundle.manifest.engines if each.backend == flavour):
        raise LoraError(
            f"engines have their weights in them, --lora cannot change these of {flavour}; build some with 'stiv build "
            f"--shared-plan', or {FOR_GOOD}, and build engines of that, or give --backend onnxruntime"
        )
    from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(bundle, flavour, device)


def _onnxruntime(where: "Where") -> Entry:
    return Entry(
        partial(_onnxruntime_reason, where),
        lambda _: "it runs one call after another; only engines are captured",
        partial(_open_onnxruntime, where),
    )


def _engines(flavour: Flavour) -> Entry:
    return Entry(
        partial(_engine_reason, flavour), partial(_engine_graph_reason, flavour), partial(_open_engines, flavour)
    )


TABLE: dict[str, Entry] = {
    "onnxruntime": _onnxruntime("cpu"),
    "onnxruntime-cuda": _onnxruntime("cuda"),
    **{flavour: _engines(flavour) for flavour in FLAVOURS},
}
"""Every backend by its name for ``open_backend``."""
BACKENDS = tuple(TABLE)
PREFERENCE = (*FLAVOURS, "onnxruntime-cuda", "onnxruntime")
"""Order in which ``auto`` tries them: engines, which somebody built on purpose, then the GPU, then the CPU."""


def unavailable_reason(name: str, device: int = 0) -> str | None:
    """Why the backend ``name`` cannot run on ``device`` of this machine, in one line; ``None`` if it can."""
    return TABLE[name].reason(device)


def graph_reason(name: str, device: int = 0) -> str | None:
    """Why the backend ``name`` will not capture CUDA graphs on ``device``, in one line; ``None`` if it will."""
    if unavailable_reason(name, device) is not None:
        return "the backend does not work here"
    return TABLE[name].graph_reason(device)


def available(device: int = 0) -> dict[str, str | None]:
    """Every backend with ``None`` if it works on ``device``, else the reason why not."""
    return {name: unavailable_reason(name, device) for name in BACKENDS}


def _reason_against(name: str, bundle: Bundle, device: int) -> str | None:
    """Why ``auto`` does not try the backend ``name``; ``None`` if it does."""
    if name in FLAVOURS and all(engine.backend != name for engine in bundle.manifest.engines):
        return "the bundle has no engines for it"
    return unavailable_reason(name, device)


def quarantine(bundle: Bundle, backend: Backend) -> str | None:
    """Why ``backend`` is not to be used with ``bundle``: it gave wrong results, as it is now; ``None`` if it may be."""
    if bundle.manifest.golden is None:
        return None
    verdict = read_result(bundle, backend.machine)
    return verdict.reason if verdict.state == "failed" else None


def other_engines(bundle: Bundle, backend: Backend) -> Bundle | None:
    """``bundle`` without the engines that ``backend`` has in use; ``None`` where none of its kind are left."""
    used = {record.file.path for record in backend.records}
    left = [record for record in bundle.manifest.engines if record.file.path not in used]
    return bundle.with_engines(left) if used and any(record.backend == backend.name for record in left) else None


def _open_proven(name: str, bundle: Bundle, threads: int | None, device: int) -> Backend:
    """The backend ``name``, with others of its engines where the first gave wrong results, which is said.

    Raises :class:`~stiv_deploy.runtime.errors.Quarantined` where there are none that are right.
    """
    backend = TABLE[name].open(bundle, threads, device)
    reason = quarantine(bundle, backend)
    if reason is None:
        return backend
    backend.close()
    said = f"backend {name} is quarantined: {reason}"
    found = _open_others(name, bundle, backend, threads, device)
    if found is None:
        raise Quarantined(f"{said}; run that again after an update, or make bundle and engines again")
    log.warning("%s; its engines for %s are taken", said, found.records[0].sm)
    return found


def _open_others(name: str, bundle: Bundle, backend: Backend, threads: int | None, device: int) -> Backend | None:
    rest = other_engines(bundle, backend)
    try:
        return None if rest is None else _open_proven(name, rest, threads, device)
    except (EngineError, Quarantined):
        return None


def _open_best(bundle: Bundle, threads: int | None, device: int, *, quarantined: bool) -> Backend:
    reasons = []
    for name in PREFERENCE:
        reason = _reason_against(name, bundle, device)
        if reason is None:
            try:
                return (TABLE[name].open if quarantined else partial(_open_proven, name))(bundle, threads, device)
            except (BackendError, EngineError) as error:
                if name == PREFERENCE[-1]:
                    raise
                reason = str(error)
                if isinstance(error, Quarantined):
                    log.warning("%s; the next one is taken", reason)
        log.info("backend %s is passed over: %s", name, reason)
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"no backend works on device {device}: {'; '.join(reasons)}")


def open_backend(
    name: str | None, bundle: Bundle, threads: int | None = None, device: int = 0, *, quarantined: bool = False
) -> Backend:
    """Open a backend on ``bundle``; ``None`` or ``"auto"`` takes the best that works here (see ``PREFERENCE``).

    ``threads`` is for the CPU; by default all cores, or ``STIV_THREADS``. ``device`` is the GPU's index as CUDA counts;
    the CPU has none but 0. A backend that gave wrong results in 'stiv verify' is passed over with a line, and refused
    where it is named; with ``quarantined`` it is opened nevertheless, to be measured. Raises :class:`BackendError` for
    a name or device that is unknown or cannot run here, :class:`EngineError` where an engine does not fit,
    :class:`BundleError` for damage.
    """
    if not 0 <= device <= DEVICE_LIMIT:
        raise BackendError(f"the device is a GPU's index, 0 or more; got {briefly(device)}")
    if name is None or name == AUTO:
        return _open_best(bundle, threads, device, quarantined=quarantined)
    if name not in BACKENDS:
        works = [backend for backend, reason in available().items() if reason is None]
        raise BackendError(
            f"unknown backend {briefly(name)}; there are {', '.join(BACKENDS)}; here these work: "
            f"{', '.join(works) or 'none'}"
        )
    reason = unavailable_reason(name, device)
    if reason is not None:
        raise BackendError(f"backend {name} does not work here: {reason}")
    return TABLE[name].open(bundle, threads, device) if quarantined else _open_proven(name, bundle, threads, device)


def runnable(bundle: Bundle, asked: Sequence[str], device: int = 0) -> list[str]:
    """The backends to measure: those asked for, which then must work, or all that can run this bundle here.

    Raises :class:`BackendError`.
    """
    reasons = available(device)
    for name in asked:
        if name not in BACKENDS:
            raise BackendError(f"unknown backend {name!r}; there are: {', '.join(BACKENDS)}")
        if reasons[name] is not None:
            raise BackendError(f"backend {name} does not work here: {reasons[name]}")
    if asked:
        return list(dict.fromkeys(asked))
    engines = {engine.backend for engine in bundle.manifest.engines}
    return [name for name in BACKENDS if reasons[name] is None and (name.startswith("onnxruntime") or name in engines)]


__all__ = [
    "AUTO",
    "BACKENDS",
    "Backend",
    "BundleError",
    "available",
    "graph_reason",
    "open_backend",
    "runnable",
    "unavailable_reason",
]
