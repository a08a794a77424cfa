"""What ptxas says about the kernels, against a ceiling: registers a thread, no spills, static shared memory.

The build keeps ptxas's messages next to each object (``common/keep_report.sh``). Run after a build:
``python -m stiv_deploy.runtime.plugins.register_report build/plugins``.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from stiv_deploy.runtime.errors import RegisterError

CEILING = Path(__file__).parent / "attention" / "registers.json"
_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\w+)' for '(?P<target>sm_\w+)'")
_SPILLS = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")


@dataclass(frozen=True)
class KernelReport:
    """One kernel on one GPU: registers a thread, bytes of local memory (spills and stack)."""

    symbol: str
    target: str
    registers: int
    local_bytes: int

    @property
    def family(self) -> str:
        """The kernel's name in the source, which the ceiling is keyed by: the last identifier of the mangled name."""
        rest, names = self.symbol, []
        while match := re.search(r"(\d+)", rest):
            size = int(match[1])
            names.append(rest[match.end() : match.end() + size])
            rest = rest[match.end() + size :]
            if rest[:1] == "I":  # template arguments begin
                break
        return names[-1] if names else self.symbol


def parse(text: str) -> list[KernelReport]:
    """Kernels in the messages of ``ptxas -v``."""
    reports, symbol, target, local = [], "", "", 0
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            symbol, target, local = match["symbol"], match["target"], 0
        elif (match := _SPILLS.search(line)) and symbol:
            local = max(int(match["stack"]), int(match["stores"]), int(match["loads"]))
        elif (match := _USED.search(line)) and symbol:
            reports.append(KernelReport(symbol, target, int(match["registers"]), local))
            symbol = ""
    return reports


def read_reports(build: Path) -> list[KernelReport]:
    """Kernels of all objects below ``build``; :class:`RegisterError` if there are none."""
    reports = [report for path in sorted(build.rglob("*.ptxas.log")) for report in parse(path.read_text())]
    if not reports:
        raise RegisterError(
            f"no ptxas report below {build}: no kernel was compiled for a GPU there; run `make plugins` where nvcc "
            "(12.8 or later) is on the path"
        )
    return reports


def read_ceiling(path: Path = CEILING) -> dict[str, int]:
    """Most registers a thread, by kernel."""
    return {str(name): int(most) for name, most in json.loads(path.read_text())["registers"].items()}


def faults(reports: list[KernelReport], ceiling: dict[str, int]) -> list[str]:
    """What is wrong, one line each; empty if every kernel is below its ceiling and none uses local memory."""
    lines = []
    for report in reports:
        about = f"{report.symbol} on {report.target}"
        most = ceiling.get(report.family)
        if most is None:
            lines.append(f"{about}: kernel {report.family!r} has no ceiling in {CEILING.name}; add it")
        elif report.registers > most:
            lines.append(f"{about}: {report.registers} registers, at most {most} wanted")
        if report.local_bytes:
            lines.append(f"{about}: {report.local_bytes} bytes of local memory (spills or stack), none wanted")
    return lines


def summary(reports: list[KernelReport]) -> str:
    """Most registers by kernel and GPU, a line each."""
    most: dict[tuple[str, str], int] = {}
    for report in reports:
        key = report.family, report.target
        most[key] = max(most.get(key, 0), report.registers)
    return "\n".join(f"{family:28} {target:8} {count:4} registers" for (family, target), count in sorted(most.items()))


def main(arguments: list[str]) -> int:
    """Print the summary of the build folder ``arguments[0]``; 2 and the faults if there are any."""
    try:
        reports = read_reports(Path(arguments[0] if arguments else "build/plugins"))
    except RegisterError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    wrong = faults(reports, read_ceiling())
    sys.stdout.write(summary(reports) + "\n")
    for line in wrong:
        sys.stderr.write(f"error: {line}\n")
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
