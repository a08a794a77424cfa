"""What lies in the repository: no machine's traces, nothing huge, pins for everything, commands that exist."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stiv_deploy.runtime.command.main import app

ROOT = Path(__file__).parents[3]
MIB = 2**20
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
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


def blocks(language: str) -> list[str]:
    """Fenced blocks of README in ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Arguments of every ``program`` line in README's shell blocks."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.split(" ")[0] == program]


def parse(arguments: list[str]) -> None:
    """Let Typer parse a command line without running it; raises its usage errors."""
    group: Any = typer.main.get_command(app)
    if arguments[0].startswith("-"):
        context = group.make_context("stiv", arguments)
    else:
        command = group.get_command(group.context_class(group), arguments[0])
        assert command is not None, f"no command {arguments[0]!r}"
        context = command.make_context(arguments[0], arguments[1:])
    context.close()


def test_readme_shows_every_stiv_command() -> None:
    assert {"train", "export", "build", "parity", "generate", "inspect", "doctor"} <= {
        each[0] for each in commands("stiv")
    }


@pytest.mark.parametrize("arguments", commands("stiv"), ids=shlex.join)
def test_readme_stiv_command_parses(arguments: list[str]) -> None:
    with suppress(typer.Exit):  # --help and --version
        parse(arguments)


def test_wrong_option_does_not_parse() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["inspect", "bundle", "--colour"])


@pytest.mark.parametrize("arguments", commands("make"), ids=shlex.join)
def test_readme_make_target_exists(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {each for each in arguments if "=" not in each} <= set(targets)


def test_readme_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"\.\[([a-z,]+)\]", (ROOT / "README.md").read_text())
    assert named
    assert {name for each in named for name in each.split(",")} <= set(extras)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / document).read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_readme_python_is_python() -> None:
    assert blocks("python")
    for block in blocks("python"):
        ast.parse(block)


@pytest.mark.slow
def test_readme_python_runs(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").symlink_to(bundle)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], check=True, timeout=300)
    assert list(tmp_path.glob("*.mp4"))
