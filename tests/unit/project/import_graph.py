"""Who imports whom in this checkout, read off the syntax trees: ``python import_graph.py`` prints it (``make layout``).

A *module* is a Python file, named by its path without the suffix: ``runtime/backends/base``. A *room* of a folder is a
file or a sub-folder in it. An arrow goes from what imports to what is imported, wherever in a file the import stands.
Benchmarks find each other by bare names, from their own folder upwards.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGES = ("calibration", "export", "runtime", "serving", "stiv_ref")
FOLDERS = (*PACKAGES, "benchmarks")
DOOR = "__init__"
"""The file of a folder that is the folder itself, so no room of it."""

Graph = dict[str, set[str]]
"""Each node with those that it imports."""


def imported(source: str) -> Iterator[str]:
    """Full names of everything that ``source`` imports, anywhere in it; relative imports keep their dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def read_sources(root: Path = ROOT) -> dict[str, str]:
    """Text of every module of the checkout at ``root``, by its name."""
    files = [file for folder in FOLDERS for file in sorted((root / folder).rglob("*.py"))]
    return {file.relative_to(root).with_suffix("").as_posix(): file.read_text(encoding="utf-8") for file in files}


def module_graph(sources: dict[str, str]) -> Graph:
    """Which modules of ``sources`` each of them imports."""
    return {
        module: {target for name in imported(source) if (target := _resolve(module, name, sources)) is not None}
        for module, source in sources.items()
    }


def _resolve(module: str, name: str, sources: Iterable[str]) -> str | None:
    """The module that ``module`` means by the import of ``name``; ``None`` where it is none of ours."""
    ours, _, rest = name.partition("stiv_deploy.")
    if not ours and rest:
        return _longest(rest.split("."), sources)
    folders = module.split("/")[:-1] if module.startswith("benchmarks/") else []
    for depth in range(len(folders), 0, -1):
        found = _longest([*folders[:depth], *name.split(".")], sources, depth)
        if found is not None:
            return found
    return None


def _longest(parts: list[str], sources: Iterable[str], above: int = 0) -> str | None:
    """The module that most of ``parts``, and more than ``above`` of them, name: what follows is a name in it."""
    for count in range(len(parts), above, -1):
        path = "/".join(parts[:count])
        for candidate in (path, f"{path}/{DOOR}"):
            if candidate in sources:
                return candidate
    return None


def room_graph(modules: Graph, folder: str = "") -> Graph:
    """Which rooms of ``folder`` each of them imports (``""``: the packages); its door is a node if it imports."""
    rooms: Graph = {}
    for module, targets in modules.items():
        room = _room(module, folder)
        if room is not None:
            others = {_room(target, folder) for target in targets} - {room, None}
            rooms.setdefault(room, set()).update(other for other in others if other is not None)
    return {room: targets for room, targets in rooms.items() if room != DOOR or targets}


def _room(module: str, folder: str) -> str | None:
    inside = module.removeprefix(f"{folder}/" if folder else "")
    return inside.split("/")[0] if inside != module or not folder else None


def folders(modules: Graph) -> list[str]:
    """All folders that hold modules, and ``""`` for what holds them."""
    return sorted({"/".join(parts[:depth]) for parts in (m.split("/") for m in modules) for depth in range(len(parts))})


def reachable(graph: Graph, start: str) -> set[str]:
    """Everything that ``start`` imports, directly or through others; ``start`` itself only if a circle leads back."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes each of which reaches all of its group, sorted."""
    reach = {node: reachable(graph, node) for node in graph}
    groups = {frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in graph}
    return sorted(sorted(group) for group in groups if group)


def all_circles(modules: Graph) -> list[list[str]]:
    """Circles of files, then of the rooms of each folder; rooms as full paths."""
    found = circles(modules)
    for folder in folders(modules):
        prefix = f"{folder}/" if folder else ""
        found += [[prefix + room for room in circle] for circle in circles(room_graph(modules, folder))]
    return [circle for number, circle in enumerate(found) if circle not in found[:number]]


def layers(graph: Graph) -> list[list[str]]:
    """Nodes from the ground up: each stands right above the highest that it imports; ``CycleError`` on a circle."""
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    found = []
    while sorter.is_active():
        ready = sorter.get_ready()
        found.append(sorted(ready))
        sorter.done(*ready)
    return found


def lines(modules: Graph) -> Iterator[str]:
    """The packages, then the rooms of each, from the top down, with what each imports; at last the circles."""
    for folder in ("", *FOLDERS):
        graph = room_graph(modules, folder)
        rooms = len(set(graph) | {DOOR}) - 1
        arrows = sum(map(len, graph.values()))
        floors = [] if circles(graph) else layers(graph)
        height = f"{len(floors)} layers" if floors else "no layers, there are circles"
        yield f"{folder or 'packages'}: {rooms} rooms, {height}, {arrows} arrows"
        for number, floor in reversed([*enumerate(floors or [sorted(graph)], 1)]):
            for room in floor:
                yield f"  {number}  {room:22} -> {', '.join(sorted(graph[room])) or '-'}"
    found = all_circles(modules)
    yield f"circles: {len(found) or 'none'}"
    yield from (f"  {' <-> '.join(circle)}" for circle in found)


def main() -> None:
    """Print the graph of this checkout."""
    sys.stdout.write("\n".join(lines(module_graph(read_sources()))) + "\n")


if __name__ == "__main__":
    main()
