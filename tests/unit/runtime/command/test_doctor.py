"""``stiv doctor``: it reports whatever is there, and outlives whatever is not."""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from stiv_deploy.runtime.backends import cuda
from stiv_deploy.runtime.backends.cuda import Device
from stiv_deploy.runtime.command import doctor
from stiv_deploy.runtime.command.cli import doctor as doctor_command
from stiv_deploy.runtime.command.terminal import Command
from stiv_deploy.runtime.plugins import library, tensorrt_plugins

app = typer.Typer()
app.command(cls=Command)(doctor_command)
run = CliRunner().invoke

ALL = doctor.DEPENDENCIES
METAPACKAGES = {"cuda", "tensorrt"}
"""Modules whose distribution, the one to install, only asks for others that bring them."""
QUICK = (doctor.Dependency("numpy", "numpy"), doctor.Dependency("nonsense", "no-such-thing", ("rtx", "gpu")))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at two dependencies instead of importing all."""
    monkeypatch.setattr(doctor, "DEPENDENCIES", QUICK)


@pytest.fixture
def fake_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts an ``nvidia-smi`` of the given shell code first on the path."""

    def make(code: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return make


def test_report_as_json() -> None:
    result = run(app, ["--json"])
    report = doctor.Report.model_validate(json.loads(result.stdout))
    assert result.exit_code == 0
    assert report.python == ".".join(map(str, sys.version_info[:3]))
    assert report.mp4
    assert report.memory_gib is not None
    assert report.memory_gib > 0
    states = {backend.name: backend for backend in report.backends}
    assert states["onnxruntime"].works
    assert all(backend.works or len(backend.reason) > 10 for backend in report.backends)
    assert {"onnxruntime-cuda", "tensorrt", "tensorrt-rtx"} <= set(states)


def test_report_as_text_names_the_remedy() -> None:
    result = run(app, [], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "not installed; run: pip install 'stiv-deploy[rtx]'" in result.stdout
    assert "onnxruntime" in result.stdout


def test_missing_base_package_is_sick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEPENDENCIES", (doctor.Dependency("nonsense", "no-such-thing"),))
    assert run(app, ["--json"]).exit_code == 1


def test_missing_encoder_is_sick(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("no\n such encoder")

    monkeypatch.setattr(doctor, "mp4_encoder", broken)
    result = run(app, ["--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["mp4_problem"] == "RuntimeError: no such encoder"


def test_no_working_backend_is_sick(monkeypatch: pytest.MonkeyPatch) -> None:
    from stiv_deploy.runtime import backends

    monkeypatch.setattr(backends, "available", lambda: {"onnxruntime": "broken here"})
    monkeypatch.setattr(backends, "graph_reason", lambda _: "it cannot")
    result = run(app, ["--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["backends"] == [
        {"name": "onnxruntime", "works": False, "reason": "broken here", "cuda_graphs": "no: it cannot"}
    ]


def test_installed_but_broken_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy is installed; that its module cannot be imported is the news."""
    package = doctor.check_package(doctor.Dependency("nonsense", "numpy"))
    assert package.version is not None
    assert package.problem is not None
    assert "No module named 'nonsense'" in package.problem


def test_gpu_listing(fake_nvidia_smi: Callable[[str], None]) -> None:
    fake_nvidia_smi("echo 'NVIDIA L4, 23034 MiB, 8.9, 580.1'")
    report = doctor.examine()
    assert report.gpus == ["NVIDIA L4, 23034 MiB, 8.9, 580.1"]
    assert report.gpu_problem is None


def test_devices_are_listed_as_cuda_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA L40S", "NVIDIA T4"]

    def describe(index: int) -> SimpleNamespace:
        return SimpleNamespace(device=Device(index, names[index], "89"))

    monkeypatch.setattr(cuda, "count_gpus", lambda: 2)
    monkeypatch.setattr(cuda, "Cuda", describe)
    assert doctor.examine().devices == ["0: NVIDIA L40S (SM 89)", "1: NVIDIA T4 (SM 89)"]
    assert "--device counts them: 0: NVIDIA L40S (SM 89); 1: NVIDIA T4 (SM 89)" in run(app, []).stdout


def test_cuda_graphs_are_used_or_not_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from stiv_deploy.runtime import backends

    reasons = {"tensorrt": None, "tensorrt-rtx": "cudaGraphInstantiate failed"}
    monkeypatch.setattr(backends, "available", lambda: dict.fromkeys(reasons))
    monkeypatch.setattr(backends, "graph_reason", reasons.get)
    states = {state.name: state.cuda_graphs for state in doctor.backend_states()}
    assert states == {"tensorrt": "yes", "tensorrt-rtx": "no: cudaGraphInstantiate failed"}
    assert "no: cudaGraphInstantiate failed" in run(app, [], env={"COLUMNS": "200"}).stdout


def test_driver_that_does_not_answer(fake_nvidia_smi: Callable[[str], None]) -> None:
    fake_nvidia_smi("echo 'cannot talk to the driver' >&2; exit 9")
    report = doctor.examine()
    assert report.gpus == []
    assert report.gpu_problem == "RuntimeError: cannot talk to the driver"


def test_the_packages_and_extras_are_those_of_the_project(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = {
        (extra, canonicalize_name(Requirement(text).name))
        for extra, texts in {"": project["dependencies"], **project["optional-dependencies"]}.items()
        for text in texts
    }
    known = {(extra, canonicalize_name(each.distribution)) for each in ALL for extra in each.extras or ("",)}
    assert known == {(extra, name) for extra, name in declared if name != "stiv-deploy"}
    assert len({each.distribution for each in ALL}) == len(ALL)


def test_every_module_is_its_distributions() -> None:
    """Of what is installed here; a module of another name would be reported as broken, or as there."""
    owners = packages_distributions()
    for each in ALL:
        top = each.module.partition(".")[0]
        if top and doctor.installed_version(each.distribution) is not None:
            names = {canonicalize_name(name) for name in owners.get(top, [])}
            assert canonicalize_name(each.distribution) in names or top in METAPACKAGES, each


def test_a_distribution_without_a_module_is_looked_for_only() -> None:
    package = doctor.check_package(doctor.Dependency("", "numpy", ("dev",)))
    assert (package.name, package.extra, package.problem) == ("numpy", "dev", None)


@pytest.fixture
def no_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where both libraries are looked for: an empty folder."""
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    monkeypatch.delenv(tensorrt_plugins.PLUGIN_LIBRARY_VARIABLE, raising=False)
    return tmp_path


def test_libraries_that_are_not_built_name_the_command_and_are_no_illness(no_libraries: Path) -> None:
    result = run(app, ["--json"])
    assert result.exit_code == 0
    kernels, plugins = json.loads(result.stdout)["libraries"]
    assert (kernels["name"], kernels["works"]) == ("attention kernels", False)
    assert (plugins["name"], plugins["works"]) == ("TensorRT plugins", False)
    assert "build it with `make plugins`" in kernels["state"]
    assert "build it with `make plugins TENSORRT_ROOT=DIR`" in plugins["state"]
    assert "optional" in run(app, [], env={"COLUMNS": "200"}).stdout


def test_libraries_that_do_not_load(no_libraries: Path) -> None:
    for name in (library.KERNELS, tensorrt_plugins.PLUGIN_LIBRARY):
        (no_libraries / name).write_bytes(b"not ELF")
    states = doctor.examine().libraries
    assert [each.works for each in states] == [False, False]
    assert all("cannot be loaded (" in each.state for each in states)


@pytest.mark.parametrize("function", ["getCreators", "other"])
def test_the_plugin_library_is_opened_without_tensorrt(no_libraries: Path, function: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a library to open needs a C compiler: cc was not found")
    path = no_libraries / tensorrt_plugins.PLUGIN_LIBRARY
    code = f"int {function}(void) {{ return 0; }}"
    subprocess.run([compiler, "-shared", "-x", "c", "-", "-o", str(path)], input=code, text=True, check=True)
    found = doctor.examine().libraries[1]
    if function == "getCreators":
        assert found.works
        assert found.state == str(tensorrt_plugins.PluginLibrary.at(path))
    else:
        assert not found.works
        begin = f"{path} is no TensorRT plugin library (it has no function getCreators); build it with `make plugins "
        assert found.state.startswith(begin)


def test_an_examination_tells_what_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    state = doctor.Package(name="a", extra="", version="1", problem=None)
    monkeypatch.setattr(doctor, "check_package", lambda _dependency: state)
    news: list[tuple[str, int, int]] = []
    found = doctor.check_packages(lambda *each: news.append(each))
    assert [done for _, done, _ in news] == list(range(len(found)))
    assert news[0] == (doctor.DEPENDENCIES[0].distribution, 0, len(doctor.DEPENDENCIES))
