"""Packaging and layering: what is listed, what imports what, and what imports where a library is missing."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("calibration", "export", "runtime", "stiv_ref")
OURS = {
    "stiv_ref": {"stiv_ref"},
    "calibration": {"calibration", "stiv_ref"},
    "runtime": {"runtime"},
    "export": {"calibration", "export", "runtime", "stiv_ref"},
}
FOREIGN_TO_RUNTIME = {"torch", "torchvision", "safetensors", "sklearn", "scipy", "matplotlib", "onnx", "onnxscript"}
ALLOWED = (
    # Looks at the package inside a function and works without it.
    ("runtime/command/inspection.py", "onnx"),
    # The loader of the kernel library and its limits are plain ctypes; PyTorch operators and plugins launch the same.
    ("stiv_ref/fused/launch.py", "stiv_deploy.runtime.plugins.library"),
    ("stiv_ref/fused/launch.py", "stiv_deploy.runtime.plugins.spec"),
)
"""Files, and the modules that just they may import besides."""


def imported(source: str) -> Iterator[str]:
    """Full names of everything that ``source`` imports, anywhere in it; relative imports keep their dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def faults(package: str, source: str) -> list[str]:
    """Imports of ``source`` that a module of ``package`` must not have."""
    wrong = []
    for name in imported(source):
        top, _, rest = name.partition(".")
        ours = rest.partition(".")[0] if top == "stiv_deploy" else None
        bare = top in {*PACKAGES, "tests", "benchmarks", ""}
        foreign = package == "runtime" and top in FOREIGN_TO_RUNTIME
        if bare or foreign or (ours is not None and ours not in OURS[package]):
            wrong.append(name)
    return wrong


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_import_direction() -> None:
    wrong = {
        (file.relative_to(ROOT).as_posix(), name)
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for name in faults(package, file.read_text())
    }
    assert {(file, name) for file, name in wrong if not allowed(file, name)} == set()


def allowed(file: str, name: str) -> bool:
    return any(file == where and f"{name}.".startswith(f"{module}.") for where, module in ALLOWED)


def test_exceptions_are_needed_and_are_for_one_file_and_module() -> None:
    for where, module in ALLOWED:
        imports = list(imported((ROOT / where).read_text()))
        assert any(allowed(where, name) for name in imports), (where, module)
        assert not allowed(where.replace(".py", "_other.py"), module)
        assert not allowed(where, f"{module}_other")


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("runtime", "import torch"),
        ("runtime", "def f():\n    from torch import nn"),
        ("runtime", "from stiv_deploy.export import cli"),
        ("runtime", "from stiv_deploy import stiv_ref"),
        ("runtime", "from runtime import errors"),
        ("runtime", "from . import errors"),
        ("stiv_ref", "import stiv_deploy.runtime.errors"),
        ("export", "from tests import conftest"),
    ],
)
def test_import_direction_sees(package: str, source: str) -> None:
    assert len(faults(package, source)) == 1


def test_listed_packages_are_the_folders_with_init() -> None:
    found = {
        f"stiv_deploy.{file.parent.relative_to(ROOT)}"
        for name in PACKAGES
        for file in (ROOT / name).rglob("__init__.py")
    }
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == {name.replace("/", ".") for name in found}


UNPACKAGED = {".h", ".cuh", ".cu", ".cpp", ".cmake", ".sh", ".md"}
"""Sources of the plugin libraries, and their page: they are built in a checkout, the wheel is pure Python."""


def test_every_data_file_is_packaged() -> None:
    patterns = pyproject()["tool"]["setuptools"]["package-data"]["*"]
    files = [
        file
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix not in {".py", *UNPACKAGED} and not {"__pycache__", "_lib"} & {*file.parts}
    ]
    assert [file for file in files if not any(file.match(pattern) for pattern in patterns)] == []


def test_entry_points_resolve_to_documented_functions() -> None:
    listed = pyproject()["project"]["entry-points"]["stiv_deploy.commands"]
    points = {point.name: point for point in entry_points(group="stiv_deploy.commands")}
    assert {name: point.value for name, point in points.items()} == listed
    assert all(point.load().__doc__ for point in points.values())


@pytest.mark.parametrize(
    "profile",
    ["base", pytest.param("ref", marks=pytest.mark.slow), pytest.param("export", marks=pytest.mark.slow)],
)
def test_everything_imports_with_only(profile: str) -> None:
    command = [sys.executable, "-I", str(Path(__file__).with_name("import_everything.py")), profile]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "modules imported" in done.stdout


def test_missing_library_is_noticed() -> None:
    """The bare environment of the test above is one: torch cannot be imported there."""
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import import_everything as e; e.main('base'); import torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "No module named 'torch' (blocked)" in done.stderr
