"""The laws of the import graph: who may import whom, no circles, few rooms. `make layout` prints the graph itself."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from import_graph import (
    PACKAGES,
    ROOT,
    Graph,
    all_circles,
    circles,
    imported,
    layers,
    lines,
    module_graph,
    reachable,
    read_sources,
    room_graph,
)

LAWS = {
    "runtime": {"runtime"},
    "runtime/errors": set(),
    "runtime/files": {"runtime/errors"},
    "runtime/progress": set(),
    "runtime/tensorrt_library": {"runtime/errors"},
    "runtime/plugins": {"runtime/errors", "runtime/files"},
    "runtime/bundle": {"runtime/errors", "runtime/files", "runtime/tensorrt_library"},
    "runtime/backends": {
        "runtime/bundle",
        "runtime/errors",
        "runtime/files",
        "runtime/plugins",
        "runtime/tensorrt_library",
    },
    "runtime/sampling": {"runtime/backends", "runtime/bundle", "runtime/errors"},
    "runtime/pipeline": {
        "runtime/backends",
        "runtime/bundle",
        "runtime/errors",
        "runtime/files",
        "runtime/plugins",
        "runtime/progress",
        "runtime/sampling",
        "runtime/tensorrt_library",
    },
    "runtime/pipeline/pictures": {"runtime/errors"},
    "serving": {"runtime", "serving"},
    "serving/store": {"runtime/errors", "runtime/files", "serving/errors"},
    "serving/workers": {
        "runtime",
        "serving/costs",
        "serving/errors",
        "serving/logs",
        "serving/settings",
        "serving/spans",
        "serving/store",
        "serving/tracing",
    },
    "serving/triton": {"runtime", "serving/errors"},
    "stiv_ref": {"stiv_ref"},
    "stiv_ref/fused": {"stiv_ref", "runtime/errors", "runtime/plugins"},
    "calibration": {"calibration", "stiv_ref", "runtime/errors", "runtime/pipeline/pictures"},
    "export": {"calibration", "export", "runtime", "stiv_ref"},
    "export/engines": {"export/errors", "runtime"},
    "export/audit": {"export/engines", "export/errors", "runtime"},
    "benchmarks": {"benchmarks", "calibration", "export", "runtime", "serving", "stiv_ref"},
}
"""A room, and what it may import besides itself. The innermost room that a module is in decides."""

TENSORS = {"torch", "torchvision", "safetensors", "sklearn", "scipy", "matplotlib", "modelopt"}
FOREIGN = {
    "runtime": {*TENSORS, "onnx", "onnxscript"},
    "export/engines": TENSORS,
    "export/audit": TENSORS,
    "serving": {*TENSORS, "onnx", "onnxscript"},
    "serving/workers": {"fastapi", "starlette", "uvicorn"},
    "serving/triton": {"fastapi", "starlette", "uvicorn"},
}
"""Libraries that a room must work without, and so must all that it imports."""

POSIX = {"crypt", "fcntl", "grp", "nis", "ossaudiodev", "posix", "pty", "pwd", "readline", "resource"}
POSIX |= {"spwd", "syslog", "termios", "tty"}
"""Modules of the standard library that Windows has not."""

EXCEPTIONS = (
    # Looks at the package inside a function and works without it.
    ("runtime/command/inspection", "onnx"),
)
"""Modules, and the library that just they may import besides."""


def within(module: str, room: str) -> bool:
    return f"{module}/".startswith(f"{room}/")


def law_of(module: str) -> str:
    """The innermost room with a law that ``module`` is in."""
    return max((room for room in LAWS if within(module, room)), key=len)


def crossings(graph: Graph) -> set[tuple[str, str]]:
    """Arrows of ``graph`` that a law forbids."""
    return {
        (module, target)
        for module, targets in graph.items()
        for target in targets
        if not any(within(target, room) for room in {*LAWS[law_of(module)], law_of(module)})
    }


def allowed(module: str, name: str) -> bool:
    return any(module == where and f"{name}.".startswith(f"{library}.") for where, library in EXCEPTIONS)


def strangers(sources: dict[str, str], graph: Graph) -> set[tuple[str, str]]:
    """Imports of libraries that the module itself, or a room that reaches it, must work without."""
    found = set()
    for room, libraries in FOREIGN.items():
        starts = {module for module in sources if within(module, room)}
        for module in starts.union(*(reachable(graph, start) for start in starts)):
            names = {name for name in imported(sources[module]) if name.partition(".")[0] in libraries}
            found |= {(module, name) for name in names if not allowed(module, name)}
    return found


def at_import(source: str) -> Iterator[str]:
    """Names of what ``source`` imports when it is imported: what stands in no function."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(ast.unparse(node))
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def short_names(sources: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Imports by another name than the full one, and of what nothing imports; relative ones begin with a dot."""
    wrong = {*PACKAGES, "tests", "benchmarks", ""}
    for module, source in sources.items():
        for name in imported(source):
            top, _, rest = name.partition(".")
            if top in wrong or (top == "stiv_deploy" and rest.partition(".")[0] not in PACKAGES):
                yield module, name


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return read_sources()


@pytest.fixture(scope="module")
def graph(sources: dict[str, str]) -> Graph:
    return module_graph(sources)


def test_nothing_crosses_a_law(graph: Graph) -> None:
    assert crossings(graph) == set()


def test_no_room_needs_a_library_that_it_must_work_without(sources: dict[str, str], graph: Graph) -> None:
    assert strangers(sources, graph) == set()


def test_the_runtime_imports_nothing_that_windows_lacks(sources: dict[str, str]) -> None:
    runtime = {module: source for module, source in sources.items() if within(module, "runtime")}
    assert len(runtime) > 50
    found = {(module, name) for module, source in runtime.items() for name in at_import(source)}
    assert {(module, name) for module, name in found if name.partition(".")[0] in POSIX} == set()


def test_imports_in_functions_are_not_made_at_import() -> None:
    source = "import a\nif b:\n    import c\ntry:\n    from d import e\nexcept ImportError:\n    pass\n"
    assert set(at_import(source + "def f():\n    import g\nclass H:\n    import i\n")) == {"a", "c", "d.e", "i"}


def test_all_imports_are_by_full_name(sources: dict[str, str]) -> None:
    assert list(short_names(sources)) == []


def test_no_circles_of_files_or_folders(graph: Graph) -> None:
    assert all_circles(graph) == []


@pytest.mark.parametrize("package", ["export", "runtime"])
def test_a_package_has_few_rooms(graph: Graph, package: str) -> None:
    assert len(room_graph(graph, package).keys() - {"__init__"}) <= 10


def test_export_has_few_layers(graph: Graph) -> None:
    assert len(layers(room_graph(graph, "export"))) <= 4


def test_laws_are_of_rooms_that_exist(graph: Graph) -> None:
    rooms = {*LAWS, *FOREIGN}.union(*LAWS.values())
    assert {room for room in rooms if not any(within(module, room) for module in graph)} == set()
    assert {module for module in graph if not any(within(module, room) for room in LAWS)} == set()


def test_the_architecture_page_has_the_same_laws() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("\n## Laws\n")[2]
    rows = re.findall(r"^\| `(.*?)` \| (.*) \|$", page.partition("\n## ")[0], flags=re.MULTILINE)
    written = {room: set(re.findall(r"`(.*?)`", others)) for room, others in rows}
    assert written == {room: others - {room} for room, others in LAWS.items()}


def test_exceptions_are_needed_and_are_for_one_module_and_library(sources: dict[str, str]) -> None:
    for where, library in EXCEPTIONS:
        assert any(allowed(where, name) for name in imported(sources[where])), (where, library)
        assert not allowed(f"{where}_other", library)
        assert not allowed(where, f"{library}_other")


def own_errors(sources: dict[str, str]) -> dict[str, list[str]]:
    """Modules other than ``errors`` and the classes in them that derive from a class of such a module."""
    trees = {module: ast.parse(source) for module, source in sources.items()}
    defined = {
        module: {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for module, tree in trees.items()
    }
    errors = {name for module, classes in defined.items() if module.endswith("/errors") for name in classes}
    found = {
        module: [
            name
            for name, node in classes.items()
            if errors & {base.id for base in node.bases if isinstance(base, ast.Name)}
        ]
        for module, classes in defined.items()
        if not module.endswith("/errors")
    }
    return {module: names for module, names in found.items() if names}


def test_errors_are_in_the_file_of_their_package(sources: dict[str, str]) -> None:
    assert own_errors(sources) == {}


def test_errors_elsewhere_are_seen(sources: dict[str, str]) -> None:
    planted_error = "from stiv_deploy.runtime.errors import StivError\n\n\nclass OtherError(StivError):\n    pass"
    assert own_errors({**sources, "export/x": planted_error}) == {"export/x": ["OtherError"]}


def planted(graph: Graph, module: str, target: str) -> Graph:
    return {**graph, module: {*graph.get(module, ()), target}}


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("runtime/errors", "runtime/files"),
        ("runtime/plugins/library", "runtime/bundle/bundle"),
        ("runtime/plugins/quick/temporal_attention", "runtime/tensorrt_library"),
        ("runtime/bundle/bundle", "runtime/backends/base"),
        ("runtime/backends/__init__", "runtime/sampling/engine"),
        ("runtime/sampling/engine", "runtime/plugins/spec"),
        ("runtime/pipeline/pipeline", "runtime/command/cli"),
        ("runtime/command/cli", "export/errors"),
        ("stiv_ref/block", "runtime/plugins/spec"),
        ("stiv_ref/fused/launch", "runtime/bundle/bundle"),
        ("stiv_ref/model", "calibration/layers"),
        ("calibration/run", "export/cli"),
        ("calibration/prompts", "runtime/pipeline/given"),
        ("runtime/pipeline/pictures", "runtime/pipeline/limits"),
        ("export/engines/build", "export/graphs/modules"),
        ("export/engines/build", "export/audit/audit"),
        ("export/audit/audit", "export/parity/ladder"),
        ("export/cli", "benchmarks/command"),
        ("runtime/command/cli", "serving/cli"),
        ("serving/workers/scheduler", "serving/api/service"),
        ("serving/store/jobs", "serving/workers/order"),
        ("serving/api/app", "export/errors"),
    ],
)
def test_law_sees(graph: Graph, module: str, target: str) -> None:
    assert module in graph
    assert target in graph
    assert crossings(planted(graph, module, target)) == {(module, target)}


@pytest.mark.parametrize(
    ("module", "source", "name"),
    [
        ("runtime/bundle/bundle", "import torch", "torch"),
        ("runtime/command/cli", "def f():\n    from torch import nn", "torch.nn"),
        ("runtime/command/inspection", "import onnxscript", "onnxscript"),
        ("export/engines/worker", "import torch", "torch"),
        ("export/audit/cli", "from torch.nn import functional", "torch.nn.functional"),
        ("export/errors", "import safetensors", "safetensors"),  # as export/audit reaches it, below
    ],
)
def test_strangers_are_seen(sources: dict[str, str], graph: Graph, module: str, source: str, name: str) -> None:
    reached = planted(graph, "export/audit/cli", "export/errors")
    assert strangers({**sources, module: source}, reached) == {(module, name)}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from runtime import errors", "runtime.errors"),
        ("from . import errors", "..errors"),
        ("from tests import conftest", "tests.conftest"),
        ("import benchmarks.command", "benchmarks.command"),
        ("from stiv_deploy import errors", "stiv_deploy.errors"),
    ],
)
def test_short_names_are_seen(source: str, name: str) -> None:
    assert list(short_names({"export/cli": source})) == [("export/cli", name)]


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        ("runtime/a", "import stiv_deploy.runtime.b", "runtime/b"),
        ("runtime/a", "from stiv_deploy.runtime import b", "runtime/b"),
        ("runtime/a", "def f():\n    from stiv_deploy.runtime.b import name", "runtime/b"),
        ("runtime/a", "from stiv_deploy.runtime.c import name", "runtime/c/__init__"),
        ("runtime/a", "from stiv_deploy.runtime.c import d", "runtime/c/d"),
        ("benchmarks/c/a", "from d import name", "benchmarks/c/d"),
        ("benchmarks/c/a", "from c import d", "benchmarks/c/d"),
        ("benchmarks/c/a", "import b", "benchmarks/b"),
    ],
)
def test_imports_are_found(module: str, source: str, target: str) -> None:
    others = (
        "runtime/b",
        "runtime/c/__init__",
        "runtime/c/d",
        "benchmarks/c/d",
        "benchmarks/b",
        "benchmarks/c/__init__",
    )
    assert module_graph({module: source, **dict.fromkeys(others, "")})[module] == {target}


@pytest.mark.parametrize("source", ["import os", "import runtime.b", "from stiv_deploy import other"])
def test_what_is_not_ours_is_no_arrow(source: str) -> None:
    assert module_graph({"runtime/a": source, "runtime/b": ""})["runtime/a"] == set()


def test_circles_are_seen() -> None:
    files: Graph = {"x/a": {"x/b"}, "x/b": {"x/c"}, "x/c": {"x/a"}, "x/d": {"x/a"}}
    assert circles(files) == [["x/a", "x/b", "x/c"]]
    assert all_circles(files) == [["x/a", "x/b", "x/c"]]
    folders: Graph = {"x/one/a": {"x/two/a"}, "x/two/b": {"x/one/b"}, "x/one/b": set(), "x/two/a": set()}
    assert circles(folders) == []
    assert all_circles(folders) == [["x/one", "x/two"]]
    between_packages: Graph = {"x/a": {"y/a"}, "y/b": {"x/b"}, "x/b": set(), "y/a": set()}
    assert all_circles(between_packages) == [["x", "y"]]


def test_layers_stand_on_what_they_import() -> None:
    assert layers({"top": {"left", "ground"}, "left": {"ground"}, "right": {"ground"}, "ground": set()}) == [
        ["ground"],
        ["left", "right"],
        ["top"],
    ]


def test_rooms_are_files_and_folders() -> None:
    modules: Graph = {"x/__init__": set(), "x/a": {"x/b/c", "y/a"}, "x/b/c": {"x/b/d"}, "x/b/d": set(), "y/a": set()}
    assert room_graph(modules, "x") == {"a": {"b"}, "b": set()}
    assert room_graph(modules) == {"x": {"y"}, "y": set()}


def test_print_says_layers_and_circles() -> None:
    tall = list(lines({"runtime/a": {"runtime/b"}, "runtime/b": set()}))
    assert "runtime: 2 rooms, 2 layers, 1 arrows" in tall
    assert tall[-1] == "circles: none"
    round_ = list(lines({"runtime/a": {"runtime/b"}, "runtime/b": {"runtime/a"}}))
    assert "runtime: 2 rooms, no layers, there are circles, 2 arrows" in round_
    assert round_[-2:] == ["circles: 1", "  runtime/a <-> runtime/b"]


POSIX_ONLY = frozenset({"fcntl", "grp", "nis", "posix", "pty", "pwd", "resource", "spwd", "syslog", "termios", "tty"})
"""Modules of Python that Windows has not."""


@pytest.mark.parametrize("package", ["runtime", "export/engines"])
def test_what_runs_on_windows_imports_nothing_that_it_has_not(package: str) -> None:
    """Inside a function, behind a question for the system, anything goes."""
    for path in (ROOT / package).rglob("*.py"):
        tops = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in tops if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & POSIX_ONLY, path
        text = path.read_text()
        assert "signal.SIGKILL" not in text, f"{path}: Windows has no SIGKILL"
