"""Finished parts of a study on disk, one JSON file per arm and seed, and the numbers over seeds."""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stiv_deploy.stiv_ref import files
from stiv_deploy.stiv_ref.errors import StivRefError

WORK = Path("out/studies")
Result = dict[str, Any]


def seeds_of(text: str) -> list[int]:
    """The seeds of an option such as ``0,1,2``; :class:`StivRefError` for anything else."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise StivRefError(f"--seeds {text!r}: wanted different whole numbers from 0, with commas, such as 0,1,2")
    return seeds


def scales_of(text: str) -> tuple[float, ...]:
    """The guidance scales of an option such as ``2,4``; :class:`StivRefError` for anything else."""
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if not scales or not all(1 < scale < math.inf for scale in scales) or len(set(scales)) != len(scales):
        raise StivRefError(f"--scales {text!r}: wanted different numbers above 1, with commas, such as 2,4")
    return scales


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def fingerprint(what: object) -> str:
    """Hash over the settings that a part was made with."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def part(folder: Path, name: str, settings: object, make: Callable[[], Result]) -> Result:
    """The finished part ``name``, if it was made with the same ``settings``; else make it and keep it."""
    path, wanted = folder / f"{name}.json", fingerprint(settings)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    if kept.get("fingerprint") != wanted:
        kept = {"fingerprint": wanted, "result": make()}
        write_text(path, json.dumps(kept))
    return kept["result"]


def spread(values: Sequence[float]) -> Result:
    """Mean, lowest and highest of ``values``, and their standard deviation (of a sample; 0 for one value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values), "sd": deviation}


def shown(values: Sequence[float], digits: int = 1) -> str:
    """``mean (low..high)`` for a table."""
    found = spread(values)
    return f"{found['mean']:.{digits}f} ({found['low']:.{digits}f}..{found['high']:.{digits}f})"


def paired(first: Sequence[float], second: Sequence[float]) -> Result:
    """Differences ``first - second`` seed by seed: mean, range, and whether all seeds agree on the sign."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return spread(differences) | {"one_sign": min(differences) > 0 or max(differences) < 0}
