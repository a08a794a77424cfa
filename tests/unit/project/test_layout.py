"""Packaging: what is listed, and what imports where a library is missing."""

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("calibration", "export", "runtime", "serving", "stiv_ref")
DOOR = "stiv_deploy"
"""The folder of the package that the others are in, by name; all it has is a version."""


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_listed_packages_are_the_folders_with_init() -> None:
    found = {
        f"stiv_deploy.{file.parent.relative_to(ROOT)}"
        for name in PACKAGES
        for file in (ROOT / name).rglob("__init__.py")
    }
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert set(listed) == {DOOR, *(name.replace("/", ".") for name in found)}
    assert [file.name for file in (ROOT / DOOR).iterdir() if file.name != "__pycache__"] == ["__init__.py"]


def test_the_version_is_written_once() -> None:
    import stiv_deploy

    assert "version" in pyproject()["project"]["dynamic"]
    assert stiv_deploy.__version__ == version("stiv-deploy")


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
    ["base", "serve", pytest.param("ref", marks=pytest.mark.slow), pytest.param("export", marks=pytest.mark.slow)],
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
