"""On what a demo ran: the machine, and the versions of what did the work."""

import os
import platform
import shutil
from collections.abc import Iterator

from stiv_deploy.runtime.command.doctor import cpu_name, installed_version, list_gpus, memory_gib, reason_of

WORKERS = ("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt_rtx_cu13_bindings", "nvidia-modelopt")
"""Distributions whose versions a result depends on."""


def machine() -> Iterator[tuple[str, str]]:
    """What it is, and which: processor, memory, GPUs, system, Python, this project, libraries that are there."""
    yield "CPU", f"{cpu_name()}, {os.cpu_count() or 1} cores"
    memory = memory_gib()
    if memory is not None:
        yield "memory", f"{memory} GiB"
    gpus, _ = reason_of(list_gpus) if shutil.which("nvidia-smi") else (None, None)
    yield "GPU", "; ".join(gpus or ()) or "none"
    yield "system", f"{platform.system()} {platform.machine()}"
    yield "Python", platform.python_version()
    for name in ("stiv-deploy", *WORKERS):
        version = installed_version(name)
        if version is not None:
            yield name, version
