"""``make setup``: what pip does is shown line by line, with the size of each download and their sum."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PIP = """#!/bin/sh
case "$*" in
*" install "*)
    echo "Collecting torch"
    echo "  Downloading torch-2-py3.whl.metadata (29 kB)"
    echo "  Downloading torch-2-py3.whl (190.5 MB)"
    echo "Downloading small-1.whl (500 kB)"
    echo "Downloading large-1.whl (1.5 GB)"
    echo "Requirement already satisfied: numpy"
    echo "Installing collected packages: torch"
    echo "ERROR: as pip says it" >&2
    exit $STATUS;;
esac
"""
SHOWN = """  Downloading torch-2-py3.whl (190.5 MB)
  Downloading small-1.whl (500 kB)
  Downloading large-1.whl (1.5 GB)
  Installing collected packages: torch
  1691 MB downloaded
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("status", [0, 3])
def test_what_pip_does_is_shown_and_its_failure_is_the_end(tmp_path: Path, status: int) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PIP)
    (tmp_path / "bin" / "python").chmod(0o755)
    command = ["make", "setup", f"VENV={tmp_path}", "PYTHON=python3", "TORCH_INDEX=anywhere"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"STATUS": str(status)}, capture_output=True, text=True, check=False
    )
    assert done.stdout.count(SHOWN) == (1 if status else 3)
    assert "Collecting" not in done.stdout
    assert "ERROR: as pip says it" in done.stderr
    assert (done.returncode != 0) == (not (tmp_path / ".stamp").exists()) == (status != 0)
