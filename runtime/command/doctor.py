"""What ``stiv doctor`` reports: this machine, what is installed, and which backends work or why they do not."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from stiv_deploy.runtime.errors import BackendError, one_line, raise_interrupt
from stiv_deploy.runtime.progress import Progress, unheard

GIB = 2**30


class Dependency(NamedTuple):
    """An imported module, the distribution that brings it, and the extras that bring that (none for the base install).

    Without a ``module`` nothing is imported: it is enough that the distribution is there.
    """

    module: str
    distribution: str
    extras: tuple[str, ...] = ()


DEPENDENCIES = (
    Dependency("numpy", "numpy"),
    Dependency("onnxruntime", "onnxruntime"),
    Dependency("tokenizers", "tokenizers"),
    Dependency("av", "av"),
    Dependency("filelock", "filelock"),
    Dependency("PIL", "pillow"),
    Dependency("typer", "typer"),
    Dependency("rich", "rich"),
    Dependency("pydantic", "pydantic"),
    Dependency("torch", "torch", ("ref",)),
    Dependency("safetensors", "safetensors", ("ref",)),
    Dependency("sklearn", "scikit-learn", ("ref",)),
    Dependency("matplotlib", "matplotlib", ("ref",)),
    Dependency("scenedetect", "scenedetect", ("data",)),
    Dependency("cv2", "opencv-python", ("data",)),
    Dependency("webdataset", "webdataset", ("data",)),
    Dependency("diffusers", "diffusers", ("encoders",)),
    Dependency("transformers", "transformers", ("encoders",)),
    Dependency("tensorboard", "tensorboard", ("tensorboard",)),
    Dependency("modelopt", "nvidia-modelopt", ("calibration",)),
    Dependency("requests", "requests", ("calibration",)),
    Dependency("onnx", "onnx", ("export",)),
    Dependency("onnxscript", "onnxscript", ("export",)),
    Dependency("polygraphy", "polygraphy", ("export",)),
    Dependency("fastapi", "fastapi", ("serve",)),
    Dependency("starlette", "starlette", ("serve",)),
    Dependency("uvicorn", "uvicorn", ("serve",)),
    Dependency("python_multipart", "python-multipart", ("serve",)),
    Dependency("prometheus_client", "prometheus-client", ("serve",)),
    Dependency("psycopg", "psycopg", ("postgres",)),
    Dependency("fsspec", "fsspec", ("fsspec",)),
    Dependency("ray", "ray", ("ray",)),
    Dependency("opentelemetry.sdk", "opentelemetry-sdk", ("otel",)),
    Dependency("opentelemetry.exporter.otlp.proto.http", "opentelemetry-exporter-otlp-proto-http", ("otel",)),
    Dependency("tensorrt_rtx_bindings", "tensorrt_rtx_cu13_bindings", ("rtx",)),
    Dependency("tensorrt_rtx_libs", "tensorrt_rtx_cu13_libs", ("rtx",)),
    Dependency("cuda.bindings", "cuda-python", ("rtx", "tensorrt", "nccl", "gpu")),
    Dependency("tensorrt", "tensorrt-cu13", ("tensorrt",)),
    Dependency("nccl.bindings", "nccl4py", ("nccl",)),
    Dependency("onnxruntime", "onnxruntime-gpu", ("gpu",)),
    Dependency("hypothesis", "hypothesis", ("dev",)),
    Dependency("httpx2", "httpx2", ("dev",)),
    Dependency("ml_dtypes", "ml_dtypes", ("dev",)),
    Dependency("mypy", "mypy", ("dev",)),
    Dependency("openai", "openai", ("dev",)),
    Dependency("playwright", "playwright", ("dev",)),
    Dependency("pre_commit", "pre-commit", ("dev",)),
    Dependency("mlperf_loadgen", "mlcommons-loadgen", ("bench",)),
    Dependency("nvtx", "nvtx", ("bench",)),
    Dependency("pynvml", "nvidia-ml-py", ("bench",)),
    Dependency("psutil", "psutil", ("bench", "dev")),
    Dependency("pytest", "pytest", ("dev",)),
    Dependency("pytest_timeout", "pytest-timeout", ("dev",)),
    Dependency("xdist", "pytest-xdist", ("dev",)),
    Dependency("yaml", "pyyaml", ("dev",)),
    Dependency("ruff", "ruff", ("dev",)),
    Dependency("", "scikit-video", ("dev",)),
)
"""All that ``pyproject.toml`` names; of two that bring the same module, the one of the base install first."""

ALTERNATIVES = {
    "onnxruntime": ("onnxruntime-gpu",),
    "opencv-python": ("opencv-python-headless", "opencv-contrib-python"),
}
"""Other distributions that bring the same module, by distribution."""


class Package(BaseModel):
    """One dependency: the extras that it is in, with commas, its version, or why it cannot be used."""

    name: str
    extra: str
    version: str | None
    problem: str | None


class BackendState(BaseModel):
    """One backend: whether it works here and why not, and whether it will use CUDA graphs: yes, or no and why not."""

    name: str
    works: bool
    reason: str
    cuda_graphs: str


class LibraryState(BaseModel):
    """One of the libraries that ``make plugins`` builds: what it is, or why there is none and how to build it."""

    name: str
    works: bool
    state: str


class Report(BaseModel):
    """Everything that ``stiv doctor --json`` prints."""

    stiv_deploy: str
    python: str
    executable: str
    platform: str
    cpu: str
    cores: int
    memory_gib: float | None
    disk_free_gib: float
    gpus: list[str]
    gpu_problem: str | None
    cuda_driver: str | None
    cuda_problem: str | None
    devices: list[str]
    mp4: bool
    mp4_problem: str | None
    packages: list[Package]
    backends: list[BackendState]
    libraries: list[LibraryState]

    @property
    def healthy(self) -> bool:
        """Whether the base install can generate: its packages import, mp4 can be written, one backend works."""
        base = all(package.problem is None for package in self.packages if not package.extra)
        return base and self.mp4 and any(backend.works for backend in self.backends)


def reason_of(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """Result of ``action``, or None and its failure in one line: a doctor outlives whatever is broken."""
    try:
        return action(), None
    except Exception as error:
        raise_interrupt(error)
        return None, one_line(f"{type(error).__name__}: {error}", 300)


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def check_package(dependency: Dependency) -> Package:
    """Import one dependency and note its version, or what is wrong."""
    names = (dependency.distribution, *ALTERNATIVES.get(dependency.distribution, ()))
    name, found = next(((name, found) for name in names if (found := installed_version(name))), (names[0], None))
    problem: str | None = None
    if found is None:
        problem = f"not installed; run: pip install '{installable(dependency)}'"
    elif dependency.module:
        _, problem = reason_of(lambda: import_module(dependency.module))
    return Package(name=name, extra=", ".join(dependency.extras), version=found, problem=problem)


def installable(dependency: Dependency) -> str:
    """What pip installs to bring ``dependency``: this project, with the first extra that it is in."""
    return f"stiv-deploy[{dependency.extras[0]}]" if dependency.extras else "stiv-deploy"


def cpu_name() -> str:
    """Model name of the processor, as far as the system tells."""
    lines, _ = reason_of(Path("/proc/cpuinfo").read_text().splitlines)
    names = [line.partition(":")[2].strip() for line in lines or [] if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Physical memory in GiB, where the system tells."""
    pages, _ = reason_of(lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB)
    return None if pages is None else round(pages, 1)


def list_gpus() -> list[str]:
    """Name, memory, compute capability and driver of each NVIDIA GPU, as nvidia-smi tells."""
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip() or f"nvidia-smi ended with {done.returncode}")
    return done.stdout.strip().splitlines()


def cuda_driver() -> str:
    """Version of CUDA that the driver supports, by cuda-python; raises whatever that raises without a driver."""
    from cuda.bindings import driver

    for call in (driver.cuInit(0), driver.cuDriverGetVersion()):
        if call[0] != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver answers {call[0].name}")
    return f"{call[1] // 1000}.{call[1] % 1000 // 10}"


def cuda_devices() -> list[str]:
    """Index, name and compute capability of each GPU that CUDA sees; the order may not be nvidia-smi's."""
    from stiv_deploy.runtime.backends.cuda import Cuda, count_gpus

    return [str(Cuda(index=index).device) for index in range(count_gpus() or 0)]


def mp4_encoder() -> str:
    """Name of the H.264 encoder that PyAV brings; raises if it brings none."""
    import av

    return av.Codec("libx264", "w").name


def backend_states() -> list[BackendState]:
    """Every backend that this version knows, and whether it works here."""
    from stiv_deploy.runtime.backends import available

    return [
        BackendState(name=name, works=reason is None, reason=reason or "ok", cuda_graphs=cuda_graphs(name))
        for name, reason in available().items()
    ]


def cuda_graphs(name: str) -> str:
    """Whether the backend ``name`` will use CUDA graphs: "yes", or "no: " and why not."""
    from stiv_deploy.runtime.backends import graph_reason

    reason = graph_reason(name)
    return "yes" if reason is None else f"no: {reason}"


def no_backends(reason: str) -> BackendState:
    """The one row of a machine whose backends cannot even be asked."""
    return BackendState(name="all", works=False, reason=reason, cuda_graphs="no")


def kernel_library() -> str:
    """The kernel library in words; raises whatever is wrong with it."""
    from stiv_deploy.runtime.plugins.library import ABI_VERSION, open_library

    library = open_library()
    return f"{library.path} ({library.backend}, ABI {ABI_VERSION})"


def tensorrt_plugin_library() -> str:
    """The TensorRT plugin library in words; raises whatever is wrong with it. TensorRT is not asked."""
    from stiv_deploy.runtime.plugins.tensorrt_plugins import BUILD_HINT, open_in_process, plugin_library

    library = plugin_library()
    if not hasattr(open_in_process(library), "getCreators"):
        raise BackendError(
            f"{library.path} is no TensorRT plugin library (it has no function getCreators); {BUILD_HINT}"
        )
    return str(library)


def library_state(name: str, describe: Callable[[], str]) -> LibraryState:
    """Whether ``describe`` finds a library that loads, and its words or its error's."""
    try:
        return LibraryState(name=name, works=True, state=describe())
    except Exception as error:  # whatever is broken, the rest of the report is wanted
        return LibraryState(name=name, works=False, state=one_line(str(error)))


def check_packages(progress: Progress) -> list[Package]:
    """Import all that ``pyproject.toml`` names, one after another: what takes the time of an examination."""
    found = []
    for done, dependency in enumerate(DEPENDENCIES):
        progress(dependency.distribution, done, len(DEPENDENCIES))
        found.append(check_package(dependency))
    return found


def examine(progress: Progress = unheard) -> Report:
    """Look at everything; never raises for something that is merely missing or broken."""
    gpus, gpu_problem = (
        reason_of(list_gpus) if shutil.which("nvidia-smi") else (None, "nvidia-smi not found: no NVIDIA driver here")
    )
    driver, cuda_problem = reason_of(cuda_driver)
    devices, device_problem = reason_of(cuda_devices)
    encoder, mp4_problem = reason_of(mp4_encoder)
    backends, backend_problem = reason_of(backend_states)
    return Report(
        stiv_deploy=installed_version("stiv-deploy") or "not installed",
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        memory_gib=memory_gib(),
        disk_free_gib=round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        gpus=gpus or [],
        gpu_problem=gpu_problem,
        cuda_driver=driver,
        cuda_problem=cuda_problem or device_problem,
        devices=devices or [],
        mp4=encoder is not None,
        mp4_problem=mp4_problem,
        packages=check_packages(progress),
        backends=backends or [no_backends(backend_problem or "none registered")],
        libraries=[
            library_state("attention kernels", kernel_library),
            library_state("TensorRT plugins", tensorrt_plugin_library),
        ],
    )
