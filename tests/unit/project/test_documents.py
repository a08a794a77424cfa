"""README and pages: links and paths lead somewhere, commands parse, Python runs, nothing of a bundle is left out."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from PIL import Image
from pydantic import BaseModel

from stiv_deploy.runtime.bundle.contract import ModelFacts, graph_specs
from stiv_deploy.runtime.bundle.manifest import FORMAT_VERSION, Manifest
from stiv_deploy.runtime.command.group import app

ROOT = Path(__file__).parents[3]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "runtime/plugins/README.md",
    *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
)
FOLDERS = "benchmarks|calibration|checkpoints|deploy|docs|export|recipes|runtime|serving|stiv_ref|tests"
PATHS = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")
"""Files and folders of this repository that a page names."""


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a page in ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), flags=re.MULTILINE | re.DOTALL)


def commands(program: str, pages: tuple[str, ...] = PAGES) -> list[list[str]]:
    """Arguments of every ``program`` line in the shell blocks of ``pages``."""
    joined = "\n".join(block for page in pages for block in blocks(page, "sh")).replace("\\\n", " ")
    found = [shlex.split(line, comments=True)[1:] for line in joined.splitlines() if line.split(" ")[0] == program]
    return [list(each) for each in dict.fromkeys(map(tuple, found))]


def links(page: str) -> list[tuple[str, str]]:
    """Path and anchor of every link into this repository."""
    found = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text(page))
    return [(path, anchor) for path, anchor in found if "://" not in path]


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    assert [path for path, _ in links(page) if not (folder / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_anchors_are_headings(page: str) -> None:
    targets = [((ROOT / page).parent / path if path else ROOT / page, name) for path, name in links(page) if name]
    wrong = [(path, name) for path, name in targets if name not in anchors(str(path.resolve().relative_to(ROOT)))]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_exist(page: str) -> None:
    paths = [ROOT / path for path in PATHS.findall(text(page))]
    assert [path for path in paths if not path.exists() and not path.with_suffix(".py").exists()] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = {"README.md"}, ["README.md"]
    while waiting:
        page = waiting.pop()
        targets = {((ROOT / page).parent / path).resolve() for path, _ in links(page) if path.endswith(".md")}
        new = {str(target.relative_to(ROOT)) for target in targets} - reached
        reached |= new
        waiting += new
    assert set(PAGES) - reached == set()


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
        each[0] for each in commands("stiv", ("README.md",))
    }


@pytest.mark.parametrize("arguments", commands("stiv"), ids=shlex.join)
def test_stiv_command_parses(arguments: list[str]) -> None:
    with suppress(typer.Exit):  # --help and --version
        parse(arguments)


def helps() -> dict[str, str]:
    """What ``--help`` says of every command, subcommands too, by its whole name."""
    group: Any = typer.main.get_command(app)
    context = group.context_class(group)
    found = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        below = getattr(command, "commands", None) or {"": command}
        found |= {f"stiv {name} {part}".strip(): each.help for part, each in below.items()}
    return found


def test_every_command_has_an_example_that_parses() -> None:
    assert len(helps()) > 12
    for name, words in helps().items():
        examples = [line for line in words.splitlines() if line.startswith(name)]
        assert examples, f"{name} --help has no example"
        for line in examples:
            parse(shlex.split(line)[1:])


def test_wrong_option_does_not_parse() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["inspect", "bundle", "--colour"])


@pytest.mark.parametrize("arguments", commands("make"), ids=shlex.join)
def test_make_target_exists(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {each for each in arguments if "=" not in each} <= set(targets)


@pytest.mark.parametrize("arguments", commands("python"), ids=shlex.join)
def test_python_script_exists(arguments: list[str]) -> None:
    assert (ROOT / arguments[0]).is_file()


def test_readme_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"\.\[([a-z,]+)\]", text("README.md"))
    assert named
    assert {name for each in named for name in each.split(",")} <= set(extras)


@pytest.mark.parametrize("page", PAGES)
def test_python_is_python(page: str) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.slow
def test_readme_python_runs(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").symlink_to(bundle)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    for block in blocks("README.md", "python"):
        subprocess.run([sys.executable, "-c", block], check=True, timeout=300)
    assert list(tmp_path.glob("*.mp4"))


@pytest.mark.slow
def test_readme_generates(bundle: Path, tmp_path: Path) -> None:
    """The section's commands in order, with few steps; the first, an export, is what the fixture has done."""
    (tmp_path / "bundle").symlink_to(bundle)
    section = text("README.md").partition("## Generate\n")[2]
    export, *generate = re.findall(r"^stiv (.*)$", section.partition("```python")[0], flags=re.MULTILINE)
    assert export == "export checkpoints/world --out bundle"
    for line in generate:
        command = [Path(sys.executable).parent / "stiv", *shlex.split(line), "--steps", "2"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        "bundle",
        "star.mp4",
        "clips-0.gif",
        "clips-1.gif",
        "cross.webp",
        "frames",
        "ring.webp",
        "again.mp4",
    }


RULE = re.compile(r"\|[-:| ]+$")
"""The line between a table's head and its rows."""


def tables(page: str) -> dict[str, list[list[str]]]:
    """Rows, without heads, of the tables under each heading of a page, as lists of cells."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line, following in pairwise([*text(page).splitlines(), ""]):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and not RULE.match(line) and not RULE.match(following):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def quoted(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def bundle_rows(columns: int) -> list[list[str]]:
    """Rows of those tables of graphs in the bundle's page that have so many columns."""
    return [row for row in tables("docs/bundle.md")["Graphs"] if len(row) == columns]


def parts(annotation: Any) -> Iterator[type[BaseModel]]:
    """All classes of the manifest that a field of this type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from parts(field.annotation)
    for argument in get_args(annotation):
        yield from parts(argument)


def contract() -> dict[str, Any]:
    """Graphs of a video model of two blocks."""
    facts = dict.fromkeys(ModelFacts.model_fields, 2) | {"name": "two", "patch": (1, 2), "base_grid": (4, 4)}
    plain = {"temporal": True, "causal_vae": False, "student": None}
    return graph_specs(ModelFacts.model_validate(facts | plain), "float16", halves=True, skips=True)


@pytest.mark.parametrize("part", sorted(set(parts(Manifest)), key=lambda each: each.__name__))
def test_every_field_of_the_manifest_has_its_line(part: type[BaseModel]) -> None:
    rows = tables("docs/bundle.md").get(part.__name__, [])
    assert sorted(name for row in rows for name in quoted(row[0])) == sorted(part.model_fields)


def test_every_graph_has_its_line_with_its_tensors() -> None:
    page = {name: (quoted(row[1]), quoted(row[2])) for row in bundle_rows(4) for name in quoted(row[0])}
    assert page == {
        name: ([each.name for each in spec.inputs], [each.name for each in spec.outputs])
        for name, spec in contract().items()
    }


def test_every_symbol_has_its_line() -> None:
    tensors = [tensor for spec in contract().values() for tensor in (*spec.inputs, *spec.outputs)]
    symbols = {dim for tensor in tensors for dim in tensor.shape if isinstance(dim, str)}
    assert {name for row in bundle_rows(2) for name in quoted(row[0])} == symbols


def test_inputs_of_the_step_have_their_shapes() -> None:
    written = {
        each.name: f"{each.dtype} [{', '.join(map(str, each.shape))}]".removeprefix("float32 ")
        for each in contract()["step"].inputs
    }
    page = {name: row[1] for row in bundle_rows(3) for name in quoted(row[0])}
    assert page
    assert page == {name: written[name] for name in page}


def test_the_format_is_the_last_of_the_policy() -> None:
    assert f"`format_version` is **{FORMAT_VERSION}**" in text("docs/bundle.md")
    assert tables("docs/bundle.md")["Version policy"][-1][0] == str(FORMAT_VERSION)


def test_the_picture_moves_and_is_small() -> None:
    (picture,) = re.findall(r"^!\[.*\]\((.*)\)$", text("README.md"), flags=re.MULTILINE)
    assert (ROOT / picture).stat().st_size < 300_000
    with Image.open(ROOT / picture) as image:
        assert getattr(image, "n_frames", 1) == 16
