"""What lies in the repository: no machine's traces, nothing huge, pins for everything."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
MIB = 2**20
MACHINE_PATHS = re.compile(r"(?<![\w.\]*])/(?:root|home|work|Users|mnt|opt)/\w")
REGISTRIES = re.compile(r"pypi\.\w|pythonhosted\.|download\.pytorch\.|\.ngc\.nvidia|[/]simple\b")


@cache
def tracked() -> tuple[Path, ...]:
    """Files of the repository: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return tuple(ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    """Matching lines of all text files."""
    found = []
    for file in tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file.name}: {line.strip()[:120]}" for line in text.splitlines() if pattern.search(line)]
    return found


def test_no_file_is_larger_than_10_mib() -> None:
    assert [file for file in tracked() if file.stat().st_size > 10 * MIB] == []


def test_no_machine_paths() -> None:
    assert lines_with(MACHINE_PATHS) == []


def test_no_registry_hosts() -> None:
    assert lines_with(REGISTRIES) == []


@pytest.mark.parametrize("folder", ["home", "root", "work"])
def test_machine_paths_are_seen(folder: str) -> None:
    assert MACHINE_PATHS.search(f"see '/{folder}/me'")
    assert not MACHINE_PATHS.search(f"tests/{folder}/me")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != project["name"]]


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    pinned = pins()
    assert [str(each) for each in declared() if pinned.get(canonicalize_name(each.name)) not in each.specifier] == []


def needed(names: set[str]) -> Iterator[str]:
    """``names`` and everything installed that they need."""
    seen: set[str] = set()
    while names - seen:
        name = (names - seen).pop()
        seen.add(name)
        yield name
        try:
            wanted = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue
        names |= {canonicalize_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}


def test_dependencies_of_dependencies_are_pinned() -> None:
    # torch pins the CUDA libraries that it needs itself, to the exact version
    own = re.compile(r"nvidia-|cuda-toolkit$|triton$")
    names = needed({canonicalize_name(requirement.name) for requirement in declared()})
    assert [name for name in names if name not in pins() and not own.match(name)] == []


def test_pins_carry_no_local_versions() -> None:
    assert [version for version in pins().values() if "+" in version or "/" in version] == []
