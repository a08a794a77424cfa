"""`make plugins` from nothing: kernels for every GPU within their register ceiling, libraries that load with no driver.

The TensorRT plugins are compiled against the test interface and linked with the CUDA kernels, in folders of their own,
so that what the user has built stays as it is.
"""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stiv_deploy.runtime.errors import KernelError
from stiv_deploy.runtime.plugins.library import KERNELS, POINTERS, KernelDtype, KernelLibrary, TemporalAttention
from stiv_deploy.runtime.plugins.spec import HEAD_DIMS

pytestmark = [pytest.mark.slow, pytest.mark.alone]
ROOT = Path(__file__).parents[4]
INTERFACE = ROOT / "tests" / "cpp" / "tensorrt_interface"
BUILD = ROOT / "build" / "plugins-test"
INSTALLED = BUILD / "installed"
GPUS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
NO_DRIVER = 35  # cudaErrorInsufficientDriver


@pytest.fixture(scope="module")
def _tools() -> None:
    missing = [tool for tool in ("make", "cmake", "nvcc", "g++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the plugins cannot be built here: no {', '.join(missing)} on the path")


@pytest.fixture(scope="module")
def built(_tools: None) -> str:
    """What `make plugins` prints, compilers' messages included."""
    variables = [f"PLUGIN_BUILD={BUILD}", f"PLUGIN_FOLDER={INSTALLED}", f"TENSORRT_ROOT={INTERFACE}"]
    done = subprocess.run(["make", "plugins", *variables], cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def test_every_kernel_is_below_its_register_ceiling(built: str) -> None:
    lines = [line.split() for line in built.splitlines() if line.endswith(" registers")]
    kernels = {"temporal_attention", "temporal_attention_scalar", "spatial_qkv"}
    assert {(kernel, gpu) for kernel, gpu, *_ in lines} == {(kernel, gpu) for kernel in kernels for gpu in GPUS}


def test_no_warnings(built: str) -> None:
    assert "warning" not in built.lower()


def test_everything_is_installed(built: str) -> None:
    ptx = {
        f"stiv_temporal_attention_{dtype}_{head_dim}{fp8}.ptx"
        for dtype in ("float16", "bfloat16")
        for head_dim in HEAD_DIMS
        for fp8 in ("", "_fp8")
    }
    assert {path.name for path in (INSTALLED / "ptx").iterdir()} == ptx
    fp8 = INSTALLED / "ptx" / "stiv_temporal_attention_bfloat16_72_fp8.ptx"
    assert "cvt.rn.satfinite.e4m3x2" in fp8.read_text(), "FP8 is converted by many instructions, not by one"
    libraries = {"libstiv_kernels.so", "libstiv_kernels_emulated.so", "libstiv_plugins.so"}
    assert {path.name for path in INSTALLED.glob("*.so")} == libraries


def test_the_kernels_load_and_answer_without_a_driver(built: str) -> None:
    library = KernelLibrary(INSTALLED / KERNELS)
    memory = np.zeros(4096, np.uint8)
    base = memory.ctypes.data + -memory.ctypes.data % 16
    tensors = dict.fromkeys((*POINTERS, "output"), base)
    sizes = {"batch": 1, "frames": 2, "positions": 1, "heads": 1, "head_dim": 32}
    call = TemporalAttention(**tensors, **sizes, dtype=KernelDtype.BFLOAT16, output_dtype=KernelDtype.BFLOAT16)
    assert library.backend == "cuda"
    assert library.temporal_attention_plan(call).threads == 128
    assert "driver" in library.error_string(NO_DRIVER)
    with pytest.raises(KernelError, match="need 16 bytes"):
        library.temporal_attention(replace(call, qkv=1))
    with pytest.raises(KernelError, match="only the emulated library"):
        library.set_emulation_seed(1)
    if shutil.which("nvidia-smi") is None:  # on a GPU these are no addresses of its memory
        with pytest.raises(KernelError, match=rf"code {NO_DRIVER}"):
            library.temporal_attention(call)


def test_the_plugins_on_cuda_kernels_answer_without_a_driver(built: str) -> None:
    target = ["--build", str(BUILD), "--target", "stiv_plugin_harness"]
    subprocess.run(["cmake", *target], check=True, capture_output=True, timeout=600)
    command = [str(BUILD / "stiv_plugin_harness"), str(INSTALLED / "libstiv_plugins.so"), "build"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    failed = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert failed == ["0 failed"], done.stderr


@pytest.mark.usefixtures("_tools")
def test_the_headers_are_those_of_the_folder_that_is_given(tmp_path: Path) -> None:
    def configured(root: Path) -> subprocess.CompletedProcess[str]:
        command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DTENSORRT_ROOT={root}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    other = tmp_path / "other"
    shutil.copytree(INTERFACE, other / "include")
    for root, headers in ((INTERFACE, INTERFACE), (other, other / "include")):
        assert configured(root).returncode == 0
        found = re.findall("^TENSORRT_INCLUDE:PATH=(.*)$", (tmp_path / "build" / "CMakeCache.txt").read_text(), re.M)
        assert found == [str(headers)]
    refused = configured(tmp_path / "nowhere")
    message = " ".join(refused.stderr.split())
    assert refused.returncode != 0
    assert f"TENSORRT_ROOT is {tmp_path / 'nowhere'}, which has no include/NvInferRuntime.h; give" in message


@pytest.mark.usefixtures("_tools")
def test_a_gpu_that_is_no_number_is_refused(tmp_path: Path) -> None:
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DSTIV_CUDA_ARCHITECTURES=80;90a-real"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "STIV_CUDA_ARCHITECTURES has 90a-real; give numbers such as 90 or 90-real" in " ".join(done.stderr.split())
