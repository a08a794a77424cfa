"""Puts ``benchmarks/`` on the import path, for the scorers and the command frame: every study imports this first."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
