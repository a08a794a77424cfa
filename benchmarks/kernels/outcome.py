"""What a part of the benchmark hands back: a status that cannot be mistaken for another, numbers and a table."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "measured", "not run", "error"]
"""``failed``: a check found a fault. ``not run``: something is missing here. ``error``: the part broke."""


@dataclass
class Outcome:
    """Result of one part, complete or as far as it has come; ``data`` is what the JSON file holds."""

    part: str
    status: Status
    message: str = ""
    markdown: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def write(self, path: Path) -> None:
        """Write JSON to ``path``, whole or not at all."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(to_json(asdict(self)))
        temporary.replace(path)

    @staticmethod
    def read(path: Path) -> "Outcome":
        """What :meth:`write` wrote."""
        return Outcome(**json.loads(path.read_text()))


Save = Callable[[Outcome], None]
"""Called by a part whenever it has something more: what is saved is kept if the part is ended."""


def to_json(value: object) -> str:
    """JSON of ``value``; numbers that are not finite become null, what JSON has no form for becomes text."""
    return json.dumps(_finite(value), indent=1, default=str, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join((lines[0], "|" + "---|" * len(head), *lines[1:]))
