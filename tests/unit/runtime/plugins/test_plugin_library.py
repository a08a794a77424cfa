"""The TensorRT plugins, without TensorRT: a host program (tests/cpp/harness) does with the library what TensorRT does.

Plugins and host are compiled against ``tests/cpp/tensorrt_interface``; with ``TENSORRT_ROOT`` in the environment also
against TensorRT's own headers, each against each, which shows that the two interfaces agree in binary.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from stiv_deploy.runtime.plugins.library import KernelLibrary, library_path
from stiv_deploy.runtime.plugins.spec import DOMAIN, PLUGINS, VERSION
from stiv_deploy.runtime.plugins.spec_header import HEADER, extent, header
from stiv_deploy.runtime.plugins.tensorrt_plugins import PluginLibrary, open_in_process

ROOT = Path(__file__).parents[4]
ATTENTION = ROOT / "runtime" / "plugins" / "attention"
HARNESS = ROOT / "tests" / "cpp" / "harness"
INTERFACE = ROOT / "tests" / "cpp" / "tensorrt_interface"
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
SHARED = ["-fPIC", "-shared", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wl,-z,defs"]
PLUGIN_SOURCES = sorted([*ATTENTION.glob("plugin_*.cpp"), *ATTENTION.glob("*_plugin.cpp")])
HARNESS_SOURCES = sorted(HARNESS.glob("*.cpp"))
Once = Callable[..., Path]
UNLOGGED = "[stiv] StivTemporalAttention: attribute heads is missing"


def cuda_root() -> Path | None:
    """Folder of the CUDA toolkit whose nvcc is on the path."""
    nvcc = shutil.which("nvcc")
    roots = [Path(nvcc).resolve().parents[1]] if nvcc else []
    roots += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
    return next((root for root in roots if (root / "include" / "cuda_runtime_api.h").is_file()), None)


def tensorrt_headers() -> list[str]:
    """Compiler options for TensorRT's own headers; skips the test where there are none."""
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        pytest.skip("TENSORRT_ROOT is not set: TensorRT's own headers are not compared with the test interface")
    folders = (Path(root) / "include", Path(root))
    headers = next((folder for folder in folders if (folder / "NvInferRuntime.h").is_file()), None)
    assert headers, f"TENSORRT_ROOT={root} has no include/NvInferRuntime.h"
    cuda = cuda_root()
    if cuda is None:
        pytest.skip("TensorRT's headers include CUDA's, which are not installed")
    return ["-isystem", str(headers), "-isystem", str(cuda / "include")]


@dataclass(frozen=True)
class Build:
    """A plugin library and the host program that checks it."""

    library: Path
    harness: Path

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.harness), str(self.library), command], capture_output=True, text=True, timeout=300
        )

    def check(self, command: str, least: int) -> None:
        """Every check of ``command`` passes, and there are at least ``least``."""
        done = self.run(command)
        lines = done.stdout.splitlines()
        failed = [line for line in lines if not line.startswith("ok ")]
        assert failed == ["0 failed"], "\n".join([*failed, done.stderr])
        assert done.returncode == 0
        assert len(lines) > least
        assert done.stderr == UNLOGGED + "\n"  # made before a logger was given; nothing after


def compiled(once: Once, name: str, sources: list[Path], options: list[str]) -> Path:
    """``name`` made from ``sources``; compiled again when one of the files or options has changed."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the plugins need a C++ compiler: g++ was not found")
    digest = hashlib.sha256(" ".join([*FLAGS, *options]).encode())
    inputs = {*sources, *(path for source in sources for path in source.parent.glob("*.h")), *INTERFACE.glob("*.h")}
    for path in sorted(inputs):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    command = [compiler, *FLAGS, *map(str, sources), *options, "-o"]
    target = ROOT / "build" / "harness" / digest.hexdigest()[:16] / name
    return once(target, lambda path: subprocess.run([*command, str(path)], check=True, timeout=600))


def plugin_library(once: Once, headers: list[str], kernels: Path) -> Path:
    """The plugins, linked with a kernel library."""
    folder = str(kernels.parent)
    link = ["-L" + folder, f"-l:{kernels.name}", f"-Wl,-rpath,{folder}"]
    return compiled(once, "libstiv_plugins.so", PLUGIN_SOURCES, [*headers, *SHARED, *link])


def host_program(once: Once, headers: list[str], options: list[str]) -> Path:
    """The program that does with the plugins what TensorRT does."""
    return compiled(once, "plugin_harness", HARNESS_SOURCES, [*headers, *options])


@pytest.fixture(scope="module")
def build(once: Once, emulated: KernelLibrary) -> Build:
    """Plugins and harness against the test interface, on the emulated kernels."""
    headers = ["-I", str(INTERFACE)]
    return Build(plugin_library(once, headers, emulated.path), host_program(once, headers, ["-ldl"]))


@pytest.fixture(params=["plugin", "harness", "both"], scope="module")
def tensorrt_build(request: pytest.FixtureRequest, once: Once, emulated: KernelLibrary) -> Build:
    """The same with TensorRT's own headers on one side or on both."""
    real, interface = tensorrt_headers(), ["-I", str(INTERFACE)]
    plugin = interface if request.param == "harness" else real
    harness = interface if request.param == "plugin" else real
    return Build(plugin_library(once, plugin, emulated.path), host_program(once, harness, ["-ldl"]))


def test_header_is_written_from_the_specification() -> None:
    assert HEADER.read_text() == header(), "run: python -m stiv_deploy.runtime.plugins.spec_header"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", "{1, 1, false, Symbol::kB}"),
        ("H", "{1, 1, true, Symbol::kNone}"),
        ("Dh/2", "{1, 2, false, Symbol::kDh}"),
        ("H*Dh", "{1, 1, true, Symbol::kDh}"),
        ("3*H*Dh", "{3, 1, true, Symbol::kDh}"),
    ],
)
def test_sizes_of_the_specification(text: str, wanted: str) -> None:
    assert extent(text) == wanted


def test_creators_report_the_specification(build: Build) -> None:
    reported = [json.loads(line) for line in build.run("describe").stdout.splitlines()]
    assert reported == [
        {
            "name": plugin.name,
            "version": VERSION,
            "namespace": DOMAIN,
            "attributes": {attribute.name: attribute.kind for attribute in plugin.attributes},
        }
        for plugin in PLUGINS
    ]


def test_creation_types_shapes_formats_and_serialization(build: Build) -> None:
    build.check("build", least=130)


def test_enqueue_computes_what_the_oracle_does(build: Build) -> None:
    build.check("enqueue", least=60)


def test_it_opens_in_a_process_without_tensorrt(build: Build) -> None:
    """As `stiv doctor` does, and every load before TensorRT's own."""
    assert hasattr(open_in_process(PluginLibrary.at(build.library)), "getCreators")


def test_no_symbol_of_tensorrt_is_left_open(build: Build) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm was not found")
    listed = subprocess.run(
        [nm, "-DC", "--undefined-only", str(build.library)], capture_output=True, text=True, check=True
    )
    own = {"stiv_temporal_attention", "stiv_temporal_attention_plan", "stiv_spatial_qkv", "stiv_spatial_qkv_plan"}
    symbols = {line.split(maxsplit=1)[-1].split()[-1] for line in listed.stdout.splitlines()}
    assert own | {"stiv_error_string"} == {symbol for symbol in symbols if symbol.startswith("stiv")}
    assert "nvinfer" not in listed.stdout
    assert "getLogger" not in listed.stdout
    assert "getPluginRegistry" not in listed.stdout


@pytest.mark.parametrize("arguments", [[], ["missing.so", "build"], ["missing.so", "dance"]])
def test_harness_says_what_is_wrong(build: Build, arguments: list[str]) -> None:
    done = subprocess.run([str(build.harness), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("command", ["build", "enqueue"])
def test_tensorrts_own_headers(tensorrt_build: Build, command: str) -> None:
    tensorrt_build.check(command, least=60)


@pytest.mark.gpu
def test_enqueue_on_the_gpu(once: Once) -> None:
    kernels, cuda = library_path(), cuda_root()
    assert cuda is not None, "the CUDA toolkit that built the kernels is not found"
    headers = ["-I", str(INTERFACE)]
    runtime = ["-DSTIV_HARNESS_CUDA", "-isystem", str(cuda / "include"), "-L" + str(cuda / "lib64"), "-lcudart_static"]
    harness = host_program(once, headers, [*runtime, "-ldl", "-lpthread", "-lrt"])
    Build(plugin_library(once, headers, kernels), harness).check("enqueue", least=60)
