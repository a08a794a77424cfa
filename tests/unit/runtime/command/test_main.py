"""The start of ``stiv``: Ctrl-C while it imports is one word, whatever it hits."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from stiv_deploy.runtime import tensorrt_library
from stiv_deploy.runtime.backends import available
from stiv_deploy.runtime.command import doctor
from stiv_deploy.runtime.errors import raise_interrupt

STIV = "import sys; from stiv_deploy.runtime.command.main import main; sys.exit(main())"
INTERRUPT = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


def test_ctrl_c_during_the_first_imports(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(INTERRUPT)  # the first library that is imported
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", STIV], env=environment, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"interrupted\n")


@pytest.fixture
def _stopped_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is imported by name is a module of C that Ctrl-C stops."""

    def stop(_name: str) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    for module in ("tensorrt_library", "command.doctor", "backends.cuda"):
        monkeypatch.setattr(import_module(f"stiv_deploy.runtime.{module}"), "import_module", stop)


@pytest.mark.usefixtures("_stopped_import")
def test_ctrl_c_during_the_import_of_a_library_is_not_its_absence() -> None:
    with pytest.raises(KeyboardInterrupt):
        tensorrt_library.missing_library("tensorrt-rtx")
    with pytest.raises(KeyboardInterrupt):
        available()
    with pytest.raises(KeyboardInterrupt):
        doctor.cuda_devices()
    with pytest.raises(KeyboardInterrupt):
        doctor.check_package(doctor.DEPENDENCIES[0])


def test_other_errors_are_no_interrupt() -> None:
    raise_interrupt(ImportError("absent"))
    error = ValueError("the state could not be saved")
    error.__context__ = KeyboardInterrupt()
    raise_interrupt(error)
