"""Tables and comparisons whose columns are those of the ground."""

from collections.abc import Sequence

from ground import Ground, Result
from records import shown
from report import Comparison


def heads(ground: Ground) -> list[str]:
    """Titles of the columns of ``ground``."""
    return [f"{words} %" for words in ground.columns.values()]


def cells(ground: Ground, rows: Sequence[Result]) -> list[str]:
    """Its scores over the seeds of ``rows``."""
    return [shown([row[key] for row in rows]) for key in ground.columns]


def compared(
    what: str, ground: Ground, first: Sequence[Result], second: Sequence[Result], *keys: str
) -> list[Comparison]:
    """``first`` minus ``second`` in each of ``keys``, by default all columns of ``ground``."""
    return [
        Comparison(
            what=f"{what}: {ground.columns.get(key, key)}",
            first=[row[key] for row in first],
            second=[row[key] for row in second],
            unit="points of real speed" if key == ground.speed else "points",
        )
        for key in keys or ground.columns
    ]
