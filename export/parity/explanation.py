"""What ``stiv parity --explain`` found, as rows and as text."""

import platform
from importlib.metadata import version
from pathlib import Path

from stiv_deploy.export.parity.modules import ModuleRow
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.bundle.manifest import ParityRow

MOST = 2
"""Operators that a table names of a piece, the last ones."""
COLUMNS = ("module", "operators", "error", "torch", "bound", "")
NUMBERS = ("error", "torch", "bound")
FIRST, LATER = "<- first", "NO"
TOOLS = ("onnxruntime", "onnx", "numpy", "torch")
MOVES = ("Cast", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that change no number but by a rounding; a table names them where a piece has nothing else."""


class Explanation(Frozen):
    """Why one graph failed: the errors of its modules, each alone, and where the reproduction is.

    ``measured_on`` is what ran the modules; ``first`` the place of the first row of ``modules`` beyond its bound, None
    if all pass alone.
    """

    row: ParityRow
    graph: str
    measured_on: str
    modules: tuple[ModuleRow, ...]
    first: int | None
    reproduction: Path

    @property
    def culprit(self) -> str:
        """What is wrong, by its name in the bundle."""
        return self.graph if self.first is None else module_name(self.graph, self.modules[self.first])

    def lines(self) -> list[tuple[str, ...]]:
        """The rows of the table: :data:`COLUMNS`."""
        return [self._line(index, row) for index, row in enumerate(self.modules)]

    def _line(self, index: int, row: ModuleRow) -> tuple[str, ...]:
        numbers = (row.rel_l2, row.plain_torch, row.bound)
        mark = "" if row.passed else FIRST if index == self.first else LATER
        return (
            f"to {row.before}" if row.before else row.module,
            operators_text(row, MOST),
            *("not finite" if value is None else f"{value:.1e}" for value in numbers),
            mark,
        )

    @property
    def verdict(self) -> str:
        """What is wrong, in a line."""
        if self.first is not None:
            row = self.modules[self.first]
            return f"{self.culprit} is the first beyond its bound ({operators_text(row)})"
        why = f"every module of {self.graph} passes alone, on {self.measured_on}"
        if self.row.backend.startswith("onnxruntime"):
            return f"{why}: it is wrong as a whole, by what {self.row.backend} makes of it"
        return f"{why}: the graph is right, and its {self.row.backend} engine is wrong"


def module_name(graph: str, row: ModuleRow) -> str:
    """``block_03.spatial.qkv``; with what follows where the piece is no module of its own."""
    name = f"{graph}.{row.module}" if row.module else graph
    return f"{name}, before {row.before}" if row.before else name


def operators_text(row: ModuleRow, most: int | None = None) -> str:
    """The operators that compute something, or, where there are none, all; at ``most`` so many, the last ones."""
    names = [each for each in row.operators if each not in MOVES] or list(row.operators)
    return ", ".join(names if most is None else names[-most:])


def description(explanation: Explanation, bundle: Bundle) -> str:
    """The explanation in Markdown, with the versions that it was made with."""
    row, manifest = explanation.row, bundle.manifest
    versions = ", ".join(f"{name} {version(name)}" for name in TOOLS)
    head = ["|".join(("", *COLUMNS, "")), "|".join(("", *["---"] * len(COLUMNS), ""))]
    table = [*head, *("|".join(("", *line, "")) for line in explanation.lines())]
    return "\n".join(
        (
            f"# {explanation.culprit}",
            "",
            f"{row.level} {row.name} on {row.backend}, {row.precision}: relative L2 error {row.rel_l2:.1e}, gate "
            f"{row.gate:.1e}. {explanation.verdict[0].upper()}{explanation.verdict[1:]}.",
            "",
            f"Bundle {bundle.hash[:12]}, model {manifest.model.name}. {versions}; Python {platform.python_version()}, "
            f"{platform.machine()}. Each module alone, on {explanation.measured_on}, on what the reference feeds it:",
            "",
            *table,
        )
    )
