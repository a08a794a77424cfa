"""Builds what is measured: the kernel library for the GPU at hand only, and the two small programs of this benchmark.

Where there is no GPU (dry run) the same sources become host programs: kernels on the CPU, for tests.
"""

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

from kernels.errors import BenchmarkError
from stiv_deploy.runtime.plugins.library import EMULATED, KERNELS
from stiv_deploy.runtime.plugins.register_report import read_reports

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EMULATION = ROOT / "runtime" / "plugins" / "common" / "emulation.cpp"
FRAGMENTS, LAUNCHES, LOG = "libstiv_fragments.so", "stiv_launches", "build.log"
HOST_FLAGS = ("-std=c++17", "-O2", "-DSTIV_EMULATE", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas")
LIMIT = 400
"""Seconds that one command of the build may take."""


@dataclass(frozen=True)
class Built:
    """Where the kernel library and the programs are, how long building took, and the compiler's version."""

    library: Path
    fragments: Path
    launches: Path
    seconds: float = 0.0
    compiler: str = ""


def build_folder(sm: str | None) -> Path:
    """Where things are built for compute capability ``sm`` ("90"), or for the host."""
    return ROOT / "build" / "bench-kernels" / (f"sm{sm}" if sm else "emulated")


def paths(folder: Path, sm: str | None) -> Built:
    """What is in ``folder`` once it is built."""
    return Built(folder / (KERNELS if sm else EMULATED), folder / FRAGMENTS, folder / LAUNCHES)


def build(sm: str | None) -> Built:
    """Build all for compute capability ``sm``, or for the host if it is None; what is up to date stays.

    Raises :class:`BenchmarkError` that names the log if a tool is missing or a command fails.
    """
    started, folder = time.monotonic(), build_folder(sm)
    compiler, built = build_library(sm, ROOT, folder), paths(folder, sm)
    for command in _programs(built, compiler, sm):
        _run(command, folder / LOG)
    return replace(built, seconds=time.monotonic() - started, compiler=_version(compiler))


def build_library(sm: str | None, source: Path, folder: Path) -> str:
    """Build the kernel library of the checkout (or copy of its kernels) ``source``; returns the compiler."""
    if shutil.which("cmake") is None:
        raise BenchmarkError("cmake was not found; install CMake 3.25 or later")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    log.write_text("")
    # Line numbers change no code; profiler and sanitizer show them.
    gpu = (f"-DSTIV_CUDA_ARCHITECTURES={sm}", "-DCMAKE_CUDA_FLAGS=-lineinfo") if sm else ()
    _run(("cmake", "-S", source, "-B", folder, f"-DSTIV_LIBRARY_FOLDER={folder / '_lib'}", *gpu), log)
    compiler = _cached(folder, "CMAKE_CUDA_COMPILER" if sm else "CMAKE_CXX_COMPILER")
    if compiler is None:
        raise BenchmarkError(f"nvcc was not found; put the CUDA toolkit on PATH (12.8 or later); log: {log}")
    target = "stiv_kernels" if sm else "stiv_kernels_emulated"
    _run(("cmake", "--build", folder, "--target", target, "--parallel", str(os.cpu_count() or 1)), log)
    return compiler


def registers(sm: str | None) -> str:
    """What ptxas says of the kernels built for ``sm``, in words: most registers of each, and spills."""
    if sm is None:
        return "none, on the host"
    reports = read_reports(build_folder(sm))
    most = {each.family: max(r.registers for r in reports if r.family == each.family) for each in reports}
    spilling = sorted({each.family for each in reports if each.local_bytes})
    counts = ", ".join(f"{family} {count}" for family, count in sorted(most.items()))
    return f"{counts}; {'spills in ' + ', '.join(spilling) if spilling else 'no spills'}"


def _programs(built: Built, compiler: str, sm: str | None) -> tuple[tuple[str | Path, ...], ...]:
    fragments, launches = HERE / "fragments.cu", HERE / "launches.cpp"
    if sm is None:
        shared = (compiler, *HOST_FLAGS, "-fPIC", "-shared", "-fvisibility=hidden", "-x", "c++")
        return (
            (*shared, fragments, EMULATION, "-o", built.fragments),
            (
                compiler,
                *HOST_FLAGS,
                launches,
                built.library,
                f"-Wl,-rpath,{built.library.parent}",
                "-o",
                built.launches,
            ),
        )
    base = (compiler, "-std=c++17", "-O2", "-lineinfo", f"-gencode=arch=compute_{sm},code=sm_{sm}")
    rpath = f"-Xlinker=-rpath={built.library.parent}"
    return (
        (*base, "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", fragments, "-o", built.fragments),
        (*base, launches, built.library, rpath, "-o", built.launches),
    )


def _run(command: tuple[str | Path, ...], log: Path) -> None:
    with log.open("a") as output:
        output.write(f"$ {' '.join(map(str, command))}\n")
        output.flush()
        try:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"building took more than {LIMIT} s; log: {log}") from None
    if done.returncode:
        told = [line for line in log.read_text().splitlines() if not line.startswith("$ ")]
        lines = [line for line in told if "error" in line.lower()] or ["no error named"]
        raise BenchmarkError(f"building failed: {lines[0].strip()[:200]}; log: {log}")


def _cached(folder: Path, name: str) -> str | None:
    """A path that CMake found, from its cache."""
    for line in (folder / "CMakeCache.txt").read_text().splitlines():
        key, _, value = line.partition("=")
        if key.partition(":")[0] == name and not value.endswith("NOTFOUND"):
            return value
    return None


def _version(compiler: str) -> str:
    """The last line but copyright of ``compiler --version``: what both nvcc and g++ name their version in."""
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    named = [line for line in text.splitlines() if "release" in line] or text.splitlines()[:1]
    return named[0].strip() if named else compiler
