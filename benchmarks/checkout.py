"""Makes this checkout importable as ``stiv_deploy`` where nothing is installed: a benchmark may import this first."""

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]

if "stiv_deploy" not in sys.modules:
    package = ModuleType("stiv_deploy")
    package.__path__ = [str(ROOT)]
    sys.modules["stiv_deploy"] = package
