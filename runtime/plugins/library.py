"""The kernel library, loaded once by ctypes: C ABI of ``attention/kernels.h`` with types and one-line errors.

Pointers are plain integers (``tensor.data_ptr()``, a TensorRT address; a numpy address for the emulated library).
Loading needs no GPU and no driver; a launch without them raises :class:`KernelError` with CUDA's own text.
"""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

from stiv_deploy.runtime.errors import KernelError, StivError

LIBRARY_VARIABLE = "STIV_PLUGIN_LIBRARY"
FOLDER = Path(__file__).resolve().parent / "_lib"
KERNELS, EMULATED = "libstiv_kernels.so", "libstiv_kernels_emulated.so"
ABI_VERSION = 1
BUILD_HINT = (
    "build it with `make plugins` (nvcc and CMake 3.25 needed), or by hand with "
    "`cmake -S . -B build/plugins` and `cmake --build build/plugins --target install`"
)


class KernelDtype(IntEnum):
    """``StivDtype`` of the C ABI."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    FLOAT8_E4M3 = 3

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {0: 4, 1: 2, 2: 2, 3: 1}[self.value]


_POINTER, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _QkvCall(ctypes.Structure):
    """What both calls begin with."""

    _fields_ = tuple((name, _POINTER) for name in ("qkv", "bias", "q_gamma", "k_gamma", "cos", "sin"))


class _TemporalCall(_QkvCall):
    _fields_ = (
        *((name, _POINTER) for name in ("output_scale", "output")),
        *((name, _INT64) for name in ("batch", "frames", "positions", "heads", "head_dim")),
        *((name, _INT32) for name in ("dtype", "output_dtype")),
        ("epsilon", ctypes.c_float),
    )


class _SpatialCall(_QkvCall):
    _fields_ = (
        *((name, _POINTER) for name in ("q_scale", "k_scale", "v_scale", "q", "k", "v")),
        *((name, _INT64) for name in ("rows", "positions", "heads", "head_dim")),
        *((name, _INT32) for name in ("dtype", "output_dtype")),
        *((name, ctypes.c_float) for name in ("epsilon", "query_scale")),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        ("blocks", _INT64),
        *(
            (name, _INT32)
            for name in (
                "threads",
                "shared_bytes",
                "heads_per_block",
                "positions_per_block",
                "splits",
                "tiles",
            )
        ),
    )


@dataclass(frozen=True)
class Plan:
    """How a call is cut into thread blocks; fields as ``StivPlan`` in ``attention/kernels.h``."""

    blocks: int
    threads: int
    shared_bytes: int
    heads_per_block: int
    positions_per_block: int
    splits: int
    tiles: int


POINTERS = ("qkv", "q_gamma", "k_gamma", "cos", "sin")
"""Inputs that both calls must have."""


@dataclass(frozen=True, kw_only=True)
class QkvCall:
    """What both calls have; pointers are addresses, 0 for none. Layouts: ``attention/kernels.h``."""

    qkv: int
    q_gamma: int
    k_gamma: int
    cos: int
    sin: int
    positions: int
    heads: int
    head_dim: int
    dtype: KernelDtype
    output_dtype: KernelDtype
    bias: int = 0
    epsilon: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class TemporalAttention(QkvCall):
    """One call of temporal attention."""

    output: int
    batch: int
    frames: int
    output_scale: int = 0


@dataclass(frozen=True, kw_only=True)
class SpatialQkv(QkvCall):
    """One call of spatial pre-processing."""

    q: int
    k: int
    v: int
    rows: int
    q_scale: int = 0
    k_scale: int = 0
    v_scale: int = 0
    query_scale: float = 1.0


def _fill(structure: ctypes.Structure, call: QkvCall) -> ctypes.Structure:
    for name, value in vars(call).items():
        setattr(structure, name, value)
    return structure


class KernelLibrary:
    """An open kernel library. Every method raises :class:`KernelError` when the library returns a code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._dll = ctypes.CDLL(str(path))
            _declare(self._dll)
            version = self._dll.stiv_abi_version()
        except (OSError, AttributeError) as error:
            raise KernelError(f"kernel library {path} cannot be loaded ({error}); {BUILD_HINT}") from error
        if version != ABI_VERSION:
            raise KernelError(
                f"kernel library {path} has ABI {version}, this package wants {ABI_VERSION}; {BUILD_HINT}"
            )

    @property
    def backend(self) -> str:
        """``cuda``, or ``emulated`` for the build that runs on the host."""
        return bytes(self._dll.stiv_backend()).decode()

    def error_string(self, code: int) -> str:
        """One line about ``code``, a CUDA error or one of our own (``StivError`` in ``attention/kernels.h``)."""
        return bytes(self._dll.stiv_error_string(code)).decode()

    def temporal_attention(self, call: TemporalAttention, stream: int = 0) -> None:
        """Enqueue temporal attention on ``stream`` (a ``cudaStream_t``)."""
        self._check("temporal attention", self._dll.stiv_temporal_attention(_fill(_TemporalCall(), call), stream))

    def spatial_qkv(self, call: SpatialQkv, stream: int = 0) -> None:
        """Enqueue spatial pre-processing on ``stream`` (a ``cudaStream_t``)."""
        self._check("spatial pre-processing", self._dll.stiv_spatial_qkv(_fill(_SpatialCall(), call), stream))

    def temporal_attention_plan(self, call: TemporalAttention) -> Plan:
        """Thread blocks of ``call``; checks sizes and dtypes, looks at no pointer."""
        return self._plan("temporal attention", self._dll.stiv_temporal_attention_plan, _fill(_TemporalCall(), call))

    def spatial_qkv_plan(self, call: SpatialQkv) -> Plan:
        """Thread blocks of ``call``; checks sizes and dtypes, looks at no pointer."""
        return self._plan("spatial pre-processing", self._dll.stiv_spatial_qkv_plan, _fill(_SpatialCall(), call))

    def set_emulation_seed(self, seed: int) -> None:
        """Emulated library only: the order in which the threads of a block take turns; 0 is ascending."""
        if self.backend != "emulated":
            raise KernelError(f"{self.path.name} runs on a GPU; only the emulated library has a thread order to set")
        self._dll.stiv_emulation_seed(seed)

    def _plan(self, what: str, function: Callable[..., int], call: ctypes.Structure) -> Plan:
        plan = _Plan()
        self._check(what, function(call, ctypes.byref(plan)))
        return Plan(**{name: getattr(plan, name) for name in Plan.__dataclass_fields__})

    def _check(self, what: str, code: int) -> None:
        if code:
            raise KernelError(f"{what}: {self.error_string(code)} (code {code})")


def _declare(dll: ctypes.CDLL) -> None:
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "stiv_temporal_attention": (_INT32, [ctypes.POINTER(_TemporalCall), _POINTER]),
        "stiv_temporal_attention_plan": (_INT32, [ctypes.POINTER(_TemporalCall), ctypes.POINTER(_Plan)]),
        "stiv_spatial_qkv": (_INT32, [ctypes.POINTER(_SpatialCall), _POINTER]),
        "stiv_spatial_qkv_plan": (_INT32, [ctypes.POINTER(_SpatialCall), ctypes.POINTER(_Plan)]),
        "stiv_error_string": (ctypes.c_char_p, [_INT32]),
        "stiv_abi_version": (_INT32, []),
        "stiv_backend": (ctypes.c_char_p, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(dll, name)
        function.restype, function.argtypes = result, arguments
    if hasattr(dll, "stiv_emulation_seed"):
        dll.stiv_emulation_seed.restype, dll.stiv_emulation_seed.argtypes = None, [ctypes.c_uint64]


def find_library(title: str, variable: str, name: str, hint: str, error: type[StivError] = KernelError) -> Path:
    """The library file that the environment's ``variable`` names, else ``name`` where ``make plugins`` installs.

    Raises ``error``, which calls it a ``title`` and ends with ``hint``, if there is none.
    """
    named = os.environ.get(variable)
    path = Path(named) if named else FOLDER / name
    if not path.is_file():
        found = f"{variable} names {path}, which is not a file" if named else f"none at {path}"
        raise error(f"no {title}: {found}; {hint}")
    return path


def library_path() -> Path:
    """Where the kernel library is; :class:`KernelError`, with the commands that build it, if there is none."""
    return find_library("kernel library", LIBRARY_VARIABLE, KERNELS, BUILD_HINT)


@cache
def _open(path: Path) -> KernelLibrary:
    return KernelLibrary(path)


def open_library(path: Path | None = None) -> KernelLibrary:
    """The kernel library at ``path``, by default :func:`library_path`; each file is loaded once per process."""
    return _open((path or library_path()).resolve())
