"""ONNX Runtime's telemetry: off wherever we import it, unless the user's own variable says otherwise."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
VARIABLE = "ORT_DISABLE_TELEMETRY"
SILENCERS = (VARIABLE, "ORT_RUNNING_UNIT_TESTS", "CI", "TF_BUILD", "GITHUB_ACTIONS", "JENKINS_URL", "XDG_CACHE_HOME")
GENERATE = "import sys; from stiv_deploy.runtime.command.main import main; sys.exit(main())"


@pytest.mark.parametrize("package", ["calibration", "export", "runtime", "serving", "stiv_ref"])
def test_importing_a_package_switches_it_off_and_leaves_a_users_value(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = importlib.import_module(f"stiv_deploy.{package}")
    monkeypatch.setenv(VARIABLE, "0")
    importlib.reload(door)
    assert os.environ[VARIABLE] == "0"
    monkeypatch.delenv(VARIABLE)
    importlib.reload(door)
    assert os.environ[VARIABLE] == "1"


def test_no_benchmark_imports_onnxruntime_before_a_package_of_ours() -> None:
    def imports(path: Path) -> list[str]:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        return [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]

    assert [path for path in (ROOT / "benchmarks").rglob("*.py") if "onnxruntime" in imports(path)] == []


def run(home: Path, *command: str, **variables: str) -> list[str]:
    """Run ``command`` with an empty ``home`` and no variable that silences telemetry; the files it leaves there."""
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in SILENCERS}
    subprocess.run(command, env=environment | {"HOME": str(home)} | variables, check=True, capture_output=True)
    return [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]


def strace(*options: str) -> list[str]:
    """The command that runs another under strace; nothing where it is not at hand, or may not trace."""
    command = ["strace", "-f", "-qq", *options]
    if (
        shutil.which("strace") is None
        or subprocess.run([*command, "true"], capture_output=True, check=False).returncode
    ):
        return []
    return command


def test_a_generation_leaves_no_identifier_and_connects_to_nobody(bundle_path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    tracer = strace("-e", "trace=connect", "-o", str(trace))
    options = ["--prompt", "digit", "--steps", "1", "--out", str(tmp_path / "clip.png")]
    left = run(tmp_path / "home", *tracer, sys.executable, "-c", GENERATE, "generate", str(bundle_path), *options)
    assert left == []
    connected = trace.read_text().splitlines() if tracer else []
    assert [line for line in connected if "AF_INET" in line] == []


def test_a_user_may_have_it(tmp_path: Path) -> None:
    """Also the proof that the test above can fail, where this ONNX Runtime has telemetry at all."""
    code = "import stiv_deploy.runtime, onnxruntime"
    assert run(tmp_path / "off", sys.executable, "-c", code) == []
    if not run(tmp_path / "plain", sys.executable, "-c", "import onnxruntime"):
        pytest.skip("this ONNX Runtime has no telemetry")
    assert run(tmp_path / "on", sys.executable, "-c", code, **{VARIABLE: "0"}) != []
