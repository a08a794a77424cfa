"""The built wheel in a fresh environment with the base install only: it generates, and torch is not there."""

import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import stiv_deploy

ROOT = Path(__file__).parents[3]
PACKAGES = ("calibration", "export", "runtime", "serving", "stiv_deploy", "stiv_ref")
OFFLINE = ("NewConnectionError", "ConnectTimeoutError", "Temporary failure in name resolution", "ProxyError")

Once = Callable[..., Path]

pytestmark = pytest.mark.slow


def call(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and keep what it says."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd, timeout=900)


def pip(python: Path | str, *arguments: object) -> None:
    """Run pip; skips the test, saying so, where the package index cannot be reached."""
    done = call(python, "-m", "pip", "--disable-pip-version-check", *arguments)
    if done.returncode and any(sign in done.stdout + done.stderr for sign in OFFLINE):
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def wheel(once: Once) -> Path:
    """A wheel built from a clean copy of the sources: an old build/ must not leak into it."""
    (built,) = (once("wheel", build_wheel) / "dist").glob("*.whl")
    return built


def build_wheel(source: Path) -> None:
    """Copy the sources to ``source`` and build a wheel in its dist/."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip(sys.executable, "wheel", "--quiet", "--no-deps", "--wheel-dir", source / "dist", source)


@pytest.fixture(scope="session")
def bare(wheel: Path, once: Once) -> Path:
    """The scripts folder of a new virtual environment that holds the wheel and its base dependencies."""

    def make(folder: Path) -> None:
        venv.create(folder, with_pip=True)
        pip(folder / "bin" / "python", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)

    return once("bare", make) / "bin"


CHECKOUT_ONLY = {".h", ".cuh", ".cu", ".cpp", ".cmake", ".sh", ".md"}
"""The plugins' sources and page: `make plugins` builds them in a checkout, the wheel is pure Python."""


def test_wheel_holds_every_python_file_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        f"stiv_deploy/{file.relative_to(ROOT / 'stiv_deploy' if package == 'stiv_deploy' else ROOT).as_posix()}"
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix not in CHECKOUT_ONLY and not {"__pycache__", "_lib"} & {*file.parts}
    }
    assert names == sources


def test_it_knows_its_version(bare: Path) -> None:
    done = call(bare / "python", "-I", "-c", "import stiv_deploy as it; print(it.__version__, it.__file__)")
    assert done.stdout.split()[0] == stiv_deploy.__version__
    assert Path(done.stdout.split()[1]).is_relative_to(bare.parent)


def test_torch_is_not_importable_there(bare: Path) -> None:
    done = call(bare / "python", "-I", "-c", "import torch")
    assert done.returncode == 1
    assert "No module named 'torch'" in done.stderr


def test_everything_of_the_base_install_imports(bare: Path) -> None:
    done = call(bare / "python", "-I", Path(__file__).with_name("import_everything.py"), "base")
    assert done.returncode == 0, done.stderr


def test_it_generates(bare: Path, bundle: Path, tmp_path: Path) -> None:
    from stiv_deploy.runtime.pipeline.pictures import read_picture

    arguments = ("--prompt", "digit three moving left", "--steps", 4, "--seed", 3)
    done = call(bare / "stiv", "generate", bundle, *arguments, "--out", tmp_path / "text.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("step ")] == []
    assert (tmp_path / "text.mp4").stat().st_size > 0
    frames = tmp_path / "frames"
    assert call(bare / "stiv", "generate", bundle, *arguments, "--out", frames, cwd=tmp_path).returncode == 0
    image = ("--image", frames / "frame_000.png", "--out", tmp_path / "again")
    assert call(bare / "stiv", "generate", bundle, *arguments, *image, cwd=tmp_path).returncode == 0
    assert read_picture(tmp_path / "again" / "frame_007.png").std() > 0


def test_doctor_is_content_and_help_complete(bare: Path) -> None:
    done = call(bare / "stiv", "doctor")
    assert done.returncode == 0, done.stdout
    assert "torch" in done.stdout
    done = call(bare / "stiv", "--help")
    assert done.returncode == 0
    assert "not available" not in done.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["export", "somewhere", "--out", "b"], "ref"),
        (["train", str(ROOT / "recipes" / "tiny.toml"), "--out", "r"], "ref"),
        (["parity", "b"], "ref"),
        (["serve", "b"], "serve"),
    ],
)
def test_missing_extra_is_one_line(bare: Path, tmp_path: Path, command: list[str], extra: str) -> None:
    done = call(bare / "stiv", *command, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"pip install 'stiv-deploy[{extra}]'" in done.stderr or "b: no such folder" in done.stderr
