"""Which faults of the attention kernels does their own proof find? Each is planted into their host build.

    python benchmarks/kernel_faults.py --out benchmarks/results/NAME.json

``benchmarks/kernel_faults.toml`` has the faults. The sources are patched and compiled once, each fault behind a number
that the environment chooses; each is then put to the tests of the kernels (``tests/unit/runtime/plugins``), which run
every CUDA thread on the host against float64. A fault is *caught* if a test fails, or the process dies or comes to no
end; else it is *unseen* where the table says why the host cannot show it, and *survives* where it does not. Without a
fault all tests must pass.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import typer
from checkout import ROOT
from command import run

from stiv_deploy.runtime.errors import StivError

TABLE = Path(__file__).with_suffix(".toml")
PLUGINS = ROOT / "runtime" / "plugins"
FOLDERS = ("attention", "common")
SOURCES = ("attention/kernels_emulated.cpp", "common/emulation.cpp", "common/device_error.cpp")
FLAGS = ("-std=c++17", "-O0", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-w")
DEFINED = ("-DSTIV_BUILD", "-DSTIV_EMULATE", "-U_FORTIFY_SOURCE")
LIBRARY, CHOICE = "STIV_EMULATED_LIBRARY", "STIV_FAULT"
"""Environment variables: the library that is put to the proof, and the number of its fault, 0 for none."""
PROOF = tuple(f"tests/unit/runtime/plugins/test_{name}.py" for name in ("heuristics", "fragments", "kernels"))
SECONDS = 600
"""A proof that takes longer has come to no end."""
SWITCH = f"""// Before every source.
#pragma once
#include <cstdlib>
namespace stiv {{
inline int chosen_fault() {{
    static const int chosen = std::getenv("{CHOICE}") ? std::atoi(std::getenv("{CHOICE}")) : 0;
    return chosen;
}}
}}
#define FAULT(number) (stiv::chosen_fault() == number)
"""


class Fault(NamedTuple):
    """In ``file`` the text ``old``, within ``around``, is ``new``; where that is None the statement is left out.

    ``unseen`` says why the host build cannot show it, where it cannot.
    """

    file: str
    kind: str
    what: str
    old: str
    new: str | None = None
    around: str | None = None
    unseen: str | None = None

    def span(self, source: str) -> tuple[int, int]:
        """Where ``old`` is in ``source``; raises :class:`StivError` where it is not, or more than once."""
        around = self.around or self.old
        if source.count(around) != 1 or around.count(self.old) != 1:
            count = source.count(around)
            raise StivError(f"{self.file}: {self.what!r} finds its place {count} times, not once; mend {TABLE.name}")
        start = source.index(around) + around.index(self.old)
        return start, start + len(self.old)


def faults() -> list[Fault]:
    """All faults; their numbers are their places, from 1 on."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return [Fault(file, **each) for file, found in table.items() for each in found]


def patched(source: str, numbered: Sequence[tuple[int, Fault]]) -> str:
    """``source`` with every fault of it behind its number."""
    spans: dict[tuple[int, int], list[tuple[int, Fault]]] = {}
    for number, fault in numbered:
        spans.setdefault(fault.span(source), []).append((number, fault))
    for (start, end), found in sorted(spans.items(), reverse=True):
        source = source[:start] + _switched(source[start:end], found) + source[end:]
    return source


def _switched(old: str, found: Sequence[tuple[int, Fault]]) -> str:
    if any(fault.new is None for _, fault in found):
        return "".join(f"if (!FAULT({number})) " for number, _ in found) + old
    return "(" + "".join(f"FAULT({number}) ? ({fault.new}) : " for number, fault in found) + f"({old}))"


def library(folder: Path) -> Path:
    """The host build with all faults in ``folder``; none is there until one is chosen."""
    numbered = list(enumerate(faults(), 1))
    for name in FOLDERS:
        shutil.copytree(PLUGINS / name, folder / name)
    for file in sorted({fault.file for _, fault in numbered}):
        source = (folder / file).read_text()
        (folder / file).write_text(patched(source, [each for each in numbered if each[1].file == file]))
    (folder / "switch.h").write_text(SWITCH)
    target = folder / "faults.so"
    command = ["g++", *FLAGS, *DEFINED, "-include", "switch.h", *SOURCES, "-o", str(target)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error:" in line), done.stderr.strip())
        raise StivError(f"the faults do not compile: {first}; mend {TABLE.name}")
    return target


class Outcome(NamedTuple):
    """What the proof says of a fault: the first test that fails, or how the process ended, ``caught``; else None."""

    number: int
    kind: str
    file: str
    what: str
    caught: str | None
    unseen: str | None = None

    @property
    def state(self) -> str:
        """``caught``, ``unseen`` or ``survived``."""
        return "caught" if self.caught else "unseen" if self.unseen else "survived"


def proof(built: Path, number: int, tests: Sequence[str] = PROOF) -> str | None:
    """Why the library ``built`` with that fault is not right; None where every one of ``tests`` passes."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "--tb=no", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, LIBRARY: str(built), CHOICE: str(number)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end in {SECONDS} s"
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"ended with {done.returncode}" if done.returncode else None


def table(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """How many of each kind were planted, and what became of them."""
    kinds = dict.fromkeys(each.kind for each in outcomes)
    return {kind: _counts([each for each in outcomes if each.kind == kind]) for kind in kinds}


def _counts(found: Sequence[Outcome]) -> dict[str, int]:
    states = Counter(each.state for each in found)
    return {"planted": len(found), **states}


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file of all outcomes.")] = None,
    only: Annotated[list[int] | None, typer.Option(help="Number of a fault; all if not given.")] = None,
) -> None:
    """Print what became of the faults; exit 1 if one survived."""
    with TemporaryDirectory(prefix="stiv-faults-") as folder:
        built = library(Path(folder))
        if wrong := proof(built, 0):
            raise StivError(f"without a fault the proof fails: {wrong}; run the tests of runtime/plugins")
        outcomes = []
        for number, fault in enumerate(faults(), 1):
            if not only or number in only:
                caught = proof(built, number)
                outcomes.append(Outcome(number, fault.kind, fault.file, fault.what, caught, fault.unseen))
                print(f"{number:3} {fault.kind}: {fault.what}: {caught or outcomes[-1].state}", flush=True)
    report = {
        "command": "python benchmarks/kernel_faults.py",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "kinds": table(outcomes),
        "not caught": [each._asdict() | {"state": each.state} for each in outcomes if not each.caught],
        "outcomes": [each._asdict() for each in outcomes],
    }
    print(json.dumps(report["kinds"], indent=1))
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    if any(each.state == "survived" for each in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
