"""What ships: run a bundle without torch.

from stiv_deploy.runtime import StivPipeline

pipe = StivPipeline.from_bundle("bundle")
video = pipe("digit three moving left", seed=0).frames  # uint8 [1, F, H, W, 3]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stiv_deploy.runtime.backends import BACKENDS, available, open_backend
    from stiv_deploy.runtime.bundle.bundle import Bundle
    from stiv_deploy.runtime.errors import (
        BackendError,
        BundleError,
        Cancelled,
        EngineError,
        OutputError,
        RequestError,
        StivError,
    )
    from stiv_deploy.runtime.pipeline.pipeline import StivOutput, StivPipeline
    from stiv_deploy.runtime.sampling.guidance import GuidanceMode
    from stiv_deploy.runtime.sampling.sampler import Solver

_MODULES = {
    "BACKENDS": "backends",
    "available": "backends",
    "open_backend": "backends",
    "Bundle": "bundle.bundle",
    "BackendError": "errors",
    "BundleError": "errors",
    "Cancelled": "errors",
    "EngineError": "errors",
    "OutputError": "errors",
    "RequestError": "errors",
    "StivError": "errors",
    "GuidanceMode": "sampling.guidance",
    "StivOutput": "pipeline.pipeline",
    "StivPipeline": "pipeline.pipeline",
    "Solver": "sampling.sampler",
}
"""Where each public name lives; loaded on first use, so that ``stiv --help`` does not import ONNX Runtime."""

__all__ = [
    "BACKENDS",
    "BackendError",
    "Bundle",
    "BundleError",
    "Cancelled",
    "EngineError",
    "GuidanceMode",
    "OutputError",
    "RequestError",
    "Solver",
    "StivError",
    "StivOutput",
    "StivPipeline",
    "available",
    "open_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
