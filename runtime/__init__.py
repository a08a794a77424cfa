"""What ships: run a bundle without torch.

from stiv_deploy.runtime import StivPipeline

pipe = StivPipeline.from_bundle("bundle")
video = pipe("a red star moving left", seed=0).frames  # uint8 [1, F, H, W, 3]
"""

import os
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
    from stiv_deploy.runtime.pipeline.media import write_video
    from stiv_deploy.runtime.pipeline.output import StivOutput, export_to_video
    from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
    from stiv_deploy.runtime.pipeline.plan import GenerationPlan
    from stiv_deploy.runtime.pipeline.request import GenerationRequest
    from stiv_deploy.runtime.sampling.guidance import GuidanceMode
    from stiv_deploy.runtime.sampling.settings import Solver

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported; see README

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
    "GenerationPlan": "pipeline.plan",
    "GenerationRequest": "pipeline.request",
    "StivOutput": "pipeline.output",
    "StivPipeline": "pipeline.pipeline",
    "Solver": "sampling.settings",
    "export_to_video": "pipeline.output",
    "write_video": "pipeline.media",
}
"""Where each public name lives; loaded on first use, so that ``stiv --help`` does not import ONNX Runtime."""

__all__ = [
    "BACKENDS",
    "BackendError",
    "Bundle",
    "BundleError",
    "Cancelled",
    "EngineError",
    "GenerationPlan",
    "GenerationRequest",
    "GuidanceMode",
    "OutputError",
    "RequestError",
    "Solver",
    "StivError",
    "StivOutput",
    "StivPipeline",
    "available",
    "export_to_video",
    "open_backend",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
