"""Import all modules that an installation must be able to: ``python -I import_everything.py base|ref|export|serve``.

Libraries that the installation lacks are blocked, so that the answer is the same where they happen to be installed.
"""

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.metadata import entry_points
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType

REF = {"torch", "safetensors", "sklearn", "scipy", "matplotlib"}
EXPORT = {"onnx", "onnxscript", "onnx_ir", "polygraphy"}
GPU = {"tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings", "cuda"}
DATA = {"cv2", "scenedetect", "webdataset", "skvideo"}
ENCODERS = {"diffusers", "transformers"}
SERVE = {"fastapi", "starlette", "uvicorn", "python_multipart", "prometheus_client"}
TOOLS = (
    {"pytest", "hypothesis", "psutil", "mlperf_loadgen", "pynvml", "modelopt", "tensorboard", "openai"}
    | DATA
    | ENCODERS
)
BLOCKED = {
    "base": REF | EXPORT | GPU | SERVE | TOOLS,
    "ref": EXPORT | GPU | SERVE | TOOLS,
    "export": GPU | SERVE | TOOLS,
    "serve": REF | EXPORT | GPU | TOOLS,
}
PACKAGES = {
    "base": ["runtime"],
    "ref": ["runtime", "stiv_ref"],
    "export": ["runtime", "stiv_ref", "calibration", "export"],
    "serve": ["runtime", "serving"],
}

ELSEWHERE = {"stiv_deploy.serving.cluster.running", "stiv_deploy.serving.dynamo.worker"}
"""Modules that want a library which `make setup` does not install: Ray, and Dynamo."""


class Blocker(MetaPathFinder):
    """Makes the modules of ``names`` look as if they were not installed."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Refuse a blocked module, leave every other to the finders after this one."""
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)", name=fullname)


def modules(package: str) -> Iterator[str]:
    """Names of ``package``, its modules and sub-packages, without importing them."""
    yield package
    spec = find_spec(package)
    for module in iter_modules(spec.submodule_search_locations if spec else None):
        name = f"{package}.{module.name}"
        yield from modules(name) if module.ispkg else [name]


def main(profile: str) -> None:
    """Import everything of ``profile`` and the module of every subcommand; an ImportError ends it."""
    sys.meta_path.insert(0, Blocker(BLOCKED[profile]))
    names = {name for package in PACKAGES[profile] for name in modules(f"stiv_deploy.{package}")}
    names |= {point.module for point in entry_points(group="stiv_deploy.commands")}
    for name in sorted(names - ELSEWHERE):
        import_module(name)
    sys.stdout.write(f"{len(names - ELSEWHERE)} modules imported as in an installation with '{profile}'\n")


if __name__ == "__main__":
    main(sys.argv[1])
