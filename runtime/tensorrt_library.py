"""The one switch between TensorRT and TensorRT for RTX: which module to import, and which package brings it.

Both have the same Python API but for names noted where they are used, so that builder and backend are written once.
Only the standard library is imported here: builder processes start through this file.
"""

from importlib import import_module
from types import ModuleType
from typing import Any, Literal

from stiv_deploy.runtime.errors import BackendError, raise_interrupt

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")
TITLES: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_MODULES: dict[Flavour, tuple[str, ...]] = {
    # the second of each is the name in NVIDIA's bindings wheel, which can be installed without the thin front package
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_INSTALL: dict[Flavour, str] = {
    "tensorrt": "pip install 'stiv-deploy[tensorrt]' (NVIDIA's package tensorrt-cu13)",
    "tensorrt-rtx": "pip install 'stiv-deploy[rtx]' (NVIDIA's packages tensorrt_rtx_cu13_bindings and ..._libs)",
}


def parse_flavour(name: str) -> Flavour:
    """``name`` as a flavour; :class:`BackendError` if no engines are built for it."""
    for flavour in FLAVOURS:
        if name == flavour:
            return flavour
    raise BackendError(f"backend {name!r} has no engines to build; give --backend {' or '.join(FLAVOURS)}")


def import_tensorrt(flavour: Flavour) -> ModuleType:
    """The Python module of ``flavour``; :class:`BackendError` names what is missing and how to install it."""
    faults = []
    for name in _MODULES[flavour]:
        try:
            return import_module(name)
        except ImportError as error:
            raise_interrupt(error)
            faults.append(str(error))
    raise BackendError(f"{TITLES[flavour]} is not installed ({faults[0]}); {_INSTALL[flavour]}")


def missing_library(flavour: Flavour) -> str | None:
    """Why the module of ``flavour`` cannot be imported, in one line; ``None`` if it can."""
    try:
        import_tensorrt(flavour)
    except BackendError as error:
        return str(error)
    return None


def targets(trt: Any) -> list[str]:
    """SM versions that this library can compile for ahead of time; empty where it builds for the GPU at hand only."""
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return sorted((name[2:] for name in names if name.startswith("SM")), key=int)
