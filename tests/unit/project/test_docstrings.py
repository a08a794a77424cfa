"""References in docstrings (``:func:`name```) are to something that is there, as a page of documentation would link it.

A name that the module itself knows (defined or imported in it), or the class around it, is written as in code; any
other in full, with ``~`` before it, so that only its last part is shown: ``:func:`~stiv_deploy.runtime.files.sha256```.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.append(str(Path(__file__).parent))
from import_graph import PACKAGES, read_sources

ROLE = re.compile(r":(?:attr|class|const|data|exc|func|meth|mod|obj):`([^`]*)`")
Scope = ast.Module | ast.ClassDef


class Role(NamedTuple):
    """A reference, the module that it stands in, and the classes around it, the innermost last."""

    module: str
    classes: tuple[ast.ClassDef, ...]
    text: str


def roles(module: str, tree: ast.Module) -> Iterator[Role]:
    """All references in the strings of ``tree`` that stand alone: docstrings of modules, classes, functions, values."""

    def visit(node: ast.AST, classes: tuple[ast.ClassDef, ...]) -> Iterator[Role]:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield from (Role(module, classes, found) for found in ROLE.findall(text))
                case ast.ClassDef():
                    yield from visit(child, (*classes, child))
                case _:
                    yield from visit(child, classes)

    yield from visit(tree, ())


def names_of(target: ast.expr) -> Iterator[str]:
    """Names that an assignment to ``target`` gives, also of attributes of ``self``."""
    match target:
        case ast.Name(id=name) | ast.Attribute(value=ast.Name(id="self"), attr=name):
            yield name
        case ast.Tuple(elts=parts):
            for part in parts:
                yield from names_of(part)


def definitions(scope: Scope) -> dict[str, ast.AST]:
    """What is defined or imported in ``scope``, by name: in a module anywhere, in a class also what methods assign."""
    found: dict[str, ast.AST] = {}
    waiting: list[ast.AST] = list(scope.body)
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.setdefault(name, node)
            case ast.Assign(targets=targets):
                found |= {name: node for target in targets for name in names_of(target)}
            case ast.AnnAssign(target=target):
                found |= {name: node for name in names_of(target)}
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found |= {alias.asname or alias.name.partition(".")[0]: node for alias in names}
        if not isinstance(node, ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
    return found


class Resolver:
    """Looks names up in the sources of the checkout."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.trees = {module: ast.parse(source) for module, source in sources.items()}

    def resolves(self, role: Role) -> bool:
        """Whether the reference is to something, and is written as it should be."""
        name = role.text.removeprefix("~")
        if name.startswith("stiv_deploy."):
            return role.text.startswith("~") and self._full(name.split(".")[1:])
        if role.text.startswith("~"):
            return False
        parts = name.split(".")
        inside = role.classes and self._member(role.module, role.classes[-1], parts)
        return bool(inside) or self._member(role.module, self.trees[role.module], parts)

    def _full(self, parts: list[str]) -> bool:
        """Whether a module, or something in it, has this name below ``stiv_deploy``."""
        for count in range(len(parts), 0, -1):
            for module in ("/".join(parts[:count]), "/".join((*parts[:count], "__init__"))):
                if module in self.trees:
                    return self._member(module, self.trees[module], parts[count:])
        return False

    def _member(self, module: str, scope: Scope, parts: list[str]) -> bool:
        if not parts:
            return True
        name, *rest = parts
        match definitions(scope).get(name):
            case None:
                return isinstance(scope, ast.ClassDef) and self._inherited(module, scope, parts)
            case ast.ClassDef() as found:
                return self._member(module, found, rest)
            case ast.ImportFrom(module=str(source)) as found if source.startswith("stiv_deploy"):
                (own,) = [alias.name for alias in found.names if name in (alias.asname, alias.name)]
                return self._full([*source.split(".")[1:], own, *rest])
            case ast.Import() | ast.ImportFrom():
                return True  # another project's
        return not rest

    def _inherited(self, module: str, scope: ast.ClassDef, parts: list[str]) -> bool:
        bases = [base.id for base in scope.bases if isinstance(base, ast.Name)]
        tree = self.trees[module]
        return any(self._member(module, tree, [base, *parts]) for base in bases)


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {module: text for module, text in read_sources().items() if module.partition("/")[0] in PACKAGES}


def unresolved(sources: dict[str, str]) -> list[tuple[str, str]]:
    """Modules, and the references in them that lead nowhere."""
    resolver = Resolver(sources)
    found = [role for module, tree in resolver.trees.items() for role in roles(module, tree)]
    return [(role.module, role.text) for role in found if not resolver.resolves(role)]


def test_every_reference_resolves(sources: dict[str, str]) -> None:
    assert unresolved(sources) == []


TEXT = '"""A :func:`{}` of the module."""\n'
OWN = """
from stiv_deploy.runtime.errors import StivError
import numpy as np

LIMIT = 3

class Base:
    size: int

    def method(self):
        self.made, (self.one, self.two) = 1, (2, 3)

class Child(Base):
    '''Has :meth:`{}` too.'''
"""


def found(source: str) -> list[str]:
    """What does not resolve in a runtime module of this source, beside the module of errors."""
    errors = "class StivError(Exception):\n    exit_code = 2\n"
    return [text for _, text in unresolved({"runtime/a": source, "runtime/errors": errors, "runtime/b/__init__": ""})]


@pytest.mark.parametrize(
    "name",
    ["LIMIT", "Base", "Base.size", "Child.method", "StivError", "StivError.exit_code", "np.ndarray", "Child.two"]
    + ["~stiv_deploy.runtime.a.Child.size", "~stiv_deploy.runtime.errors", "~stiv_deploy.runtime.b"],
)
def test_names_that_resolve(name: str) -> None:
    assert found(TEXT.format(name) + OWN.format("method")) == []


@pytest.mark.parametrize(
    "name",
    ["Limit", "Base.weight", "method", "a.LIMIT", "runtime.errors", "StivError.code", "~Base", "LIMIT.x"]
    + ["stiv_deploy.runtime.errors", "~stiv_deploy.runtime.c", "~stiv_deploy.runtime.errors.Other"],
)
def test_names_that_lead_nowhere(name: str) -> None:
    assert found(TEXT.format(name) + OWN.format("method")) == [name]


@pytest.mark.parametrize(("name", "wrong"), [("size", False), ("made", False), ("Base", False), ("weight", True)])
def test_a_class_knows_its_own(name: str, wrong: bool) -> None:
    assert bool(found(OWN.format(name))) == wrong
