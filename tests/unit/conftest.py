"""The kernels' host build: made once from the sources at hand, by the C++ compiler alone."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stiv_deploy.runtime.plugins.library import EMULATED, KernelLibrary

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "runtime" / "plugins"
SOURCES = ("attention/kernels_emulated.cpp", "common/emulation.cpp", "common/device_error.cpp")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-DSTIV_BUILD", "-DSTIV_EMULATE"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]


def _fingerprint() -> str:
    files = sorted(path for folder in ("attention", "common") for path in (PLUGINS / folder).glob("*.*"))
    digest = hashlib.sha256(" ".join((*FLAGS, *WARNINGS)).encode())
    for path in files:
        if path.suffix in {".h", ".cuh", ".cu", ".cpp"} and "plugin" not in path.name:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def emulated(once: Callable[..., Path]) -> KernelLibrary:
    """The emulated kernel library; compiled when a source has changed since the last time.

    ``STIV_EMULATED_LIBRARY`` names another one, such as one with a planted fault (``benchmarks/kernel_faults.py``).
    """
    if named := os.environ.get("STIV_EMULATED_LIBRARY"):
        return KernelLibrary(Path(named))
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulated kernels need a C++ compiler: g++ was not found")
    command = [compiler, *FLAGS, *WARNINGS, *(str(PLUGINS / name) for name in SOURCES), "-o"]
    target = ROOT / "build" / "emulated" / _fingerprint() / EMULATED
    return KernelLibrary(once(target, lambda path: subprocess.run([*command, str(path)], check=True, timeout=600)))
