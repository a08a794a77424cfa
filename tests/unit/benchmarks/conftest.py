import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from toys import bundle_path, toy

__all__ = ["bundle_path", "toy"]
BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="session")
def benchmark_module() -> Callable[[str], ModuleType]:
    """A script of benchmarks/ as a module, by name; they import each other as scripts do."""

    def load(name: str) -> ModuleType:
        sys.path.insert(0, str(BENCHMARKS))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(BENCHMARKS))

    return load


@pytest.fixture(scope="module")
def study() -> Iterator[Callable[[str], ModuleType]]:
    """A file of benchmarks/studies as a module, by name; the path stays for imports inside functions."""
    sys.path.insert(0, str(BENCHMARKS / "studies"))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS / "studies"))


@pytest.fixture(scope="session")
def kernels(benchmark_module: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """A module of benchmarks/kernels by name, as ``bench_kernel.py`` has imported it."""
    benchmark_module("bench_kernel")
    return lambda name: sys.modules[f"kernels.{name}"]


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str, str], Path]:
    """A program of the given name that the shell runs, in a folder of the test's own."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture(scope="session")
def times(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    """benchmarks/timing.py, as the modules of benchmarks/kernels and benchmarks/blocks import it."""
    return benchmark_module("timing")
