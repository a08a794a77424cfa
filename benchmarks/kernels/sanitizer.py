"""compute-sanitizer over a few small launches: memory errors, races, uninitialized reads, misused barriers.

A tool that is missing, refuses the device or does not reach the end of the program is ``not run``, never ``passed``.
"""

import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels.outcome import Outcome, Save, Status, table

SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 57
"""Exit code that the tool is told to have when it found something."""
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
DONE = re.compile(r"^launched (\d+) calls$", re.MULTILINE)
LIMIT = 120
"""Seconds of one tool."""


@dataclass(frozen=True)
class Finding:
    """What one tool said: its status, a line, and how many launches the program did under it."""

    tool: str
    status: Status
    line: str
    launches: int = 0


def judge(tool: str, code: int, output: str) -> Finding:
    """Read the exit code and output of ``tool``: passed only if it says so and the program ran to its end."""
    summaries = [int(number) for number in SUMMARY.findall(output)]
    done = DONE.search(output)
    launches = int(done.group(1)) if done else 0
    if code == FOUND or any(summaries):
        found = [line.strip("= ") for line in output.splitlines() if line.startswith("=========") and " at " in line]
        what = f"{max(summaries, default=1)} found"
        return Finding(tool, "failed", f"{what}; the first {found[0]}" if found else what, launches)
    if code == 0 and summaries and done:
        return Finding(tool, "passed", "none found", launches)
    last = [line.strip("= ") for line in output.splitlines() if line.strip("= ")] or ["no output"]
    return Finding(tool, "not run", f"exit code {code}: {last[-1][:200]}")


def run_tool(sanitizer: str, tool: str, program: Path) -> Finding:
    """Run ``program`` under one tool."""
    command = (sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), program)
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return Finding(tool, "not run", f"took more than {LIMIT} s")
    return judge(tool, done.returncode, done.stdout)


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is, if it is on PATH or in the toolkit that nvcc belongs to."""
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent)] if nvcc else []
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=":".join((*beside, "/usr/local/cuda/bin")))


def sanitize(program: Path, save: Save, sanitizer: str | None) -> Outcome:
    """Run ``program`` (``launches.cpp``) by itself, then under each tool of ``sanitizer``; without one, say so."""
    started = time.monotonic()
    plain = subprocess.run([program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
    outcome = Outcome("sanitizer", "not run")
    if plain.returncode or not DONE.search(plain.stdout):
        return Outcome("sanitizer", "failed", f"{program.name} fails by itself: {plain.stdout.strip()[-200:]}")
    if sanitizer is None:
        outcome.message = f"no {SANITIZER}: nothing was checked by it ({plain.stdout.strip()} without it)"
        return outcome
    findings: list[Finding] = []
    for tool in TOOLS:
        findings.append(run_tool(sanitizer, tool, program))
        outcome = _outcome(findings, time.monotonic() - started)
        save(outcome)
    return outcome


def _outcome(findings: list[Finding], seconds: float) -> Outcome:
    states = {finding.status for finding in findings}
    status: Status = "failed" if "failed" in states else "passed" if states == {"passed"} else "not run"
    faults = [f"{finding.tool}: {finding.line}" for finding in findings if finding.status != "passed"]
    rows = [(finding.tool, finding.status, finding.line, finding.launches) for finding in findings]
    return Outcome(
        "sanitizer",
        status,
        "; ".join(faults),
        table(("tool", "status", "what", "launches"), rows),
        {"tools": [asdict(finding) for finding in findings]},
        seconds,
    )
