"""Finding, opening and calling the kernel library; every refused argument gives one clear line and launches nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stiv_deploy.runtime.errors import KernelError, StivError
from stiv_deploy.runtime.plugins import library as module
from stiv_deploy.runtime.plugins.library import (
    KERNELS,
    LIBRARY_VARIABLE,
    POINTERS,
    KernelDtype,
    KernelLibrary,
    SpatialQkv,
    TemporalAttention,
    library_path,
    open_library,
)


@pytest.fixture
def memory() -> np.ndarray:
    """Aligned memory that a refused call must leave alone."""
    return np.full(4096, 7, np.uint8)


@pytest.fixture
def temporal(memory: np.ndarray) -> TemporalAttention:
    base = memory.ctypes.data + -memory.ctypes.data % 16
    sizes = {"batch": 1, "frames": 2, "positions": 1, "heads": 1, "head_dim": 32}
    tensors = dict.fromkeys((*POINTERS, "output"), base)
    return TemporalAttention(**tensors, **sizes, dtype=KernelDtype.FLOAT16, output_dtype=KernelDtype.FLOAT16)


@pytest.fixture
def spatial(memory: np.ndarray) -> SpatialQkv:
    base = memory.ctypes.data + -memory.ctypes.data % 16
    sizes = {"rows": 1, "positions": 2, "heads": 1, "head_dim": 32}
    tensors = dict.fromkeys((*POINTERS, "q", "k", "v"), base)
    return SpatialQkv(**tensors, **sizes, dtype=KernelDtype.FLOAT16, output_dtype=KernelDtype.FLOAT16)


FP8, INT_LIMIT = KernelDtype.FLOAT8_E4M3, 2**31
REFUSED_SIZES = [
    ({"dtype": FP8}, "float32, float16 or bfloat16"),
    ({"dtype": 9}, "float32, float16 or bfloat16"),
    ({"output_dtype": KernelDtype.FLOAT32}, "the input's or float8_e4m3"),
    ({"head_dim": 80}, "32, 48, 64, 72, 96 or 128"),
    ({"head_dim": 0}, "32, 48, 64, 72, 96 or 128"),
    ({"heads": 0}, "at least 1"),
    ({"positions": -1}, "at least 1"),
    ({"heads": INT_LIMIT}, "split the batch"),
    ({"positions": INT_LIMIT - 1, "heads": INT_LIMIT - 1}, "split the batch"),
    ({"epsilon": -1.0}, "epsilon must be finite"),
    ({"epsilon": float("nan")}, "epsilon must be finite"),
]
REFUSED_FRAMES = [({"frames": 0}, "1 to 64"), ({"frames": 65}, "1 to 64"), ({"batch": 0}, "at least 1")]


@pytest.mark.parametrize(("change", "line"), REFUSED_SIZES + REFUSED_FRAMES)
def test_temporal_attention_refuses_sizes(
    emulated: KernelLibrary, temporal: TemporalAttention, memory: np.ndarray, change: dict, line: str
) -> None:
    for function in (emulated.temporal_attention, emulated.temporal_attention_plan):
        with pytest.raises(KernelError, match=line) as caught:
            function(replace(temporal, **change))
        assert "\n" not in str(caught.value)
    assert (memory == 7).all()


@pytest.mark.parametrize(
    ("change", "line"),
    [*REFUSED_SIZES, ({"rows": 0}, "at least 1"), ({"query_scale": float("inf")}, "not finite")],
)
def test_pre_processing_refuses_sizes(
    emulated: KernelLibrary, spatial: SpatialQkv, memory: np.ndarray, change: dict, line: str
) -> None:
    for function in (emulated.spatial_qkv, emulated.spatial_qkv_plan):
        with pytest.raises(KernelError, match=line):
            function(replace(spatial, **change))
    assert (memory == 7).all()


@pytest.mark.parametrize("name", ["qkv", "q_gamma", "k_gamma", "cos", "sin", "output"])
def test_temporal_attention_refuses_pointers(
    emulated: KernelLibrary, temporal: TemporalAttention, memory: np.ndarray, name: str
) -> None:
    with pytest.raises(KernelError, match="null"):
        emulated.temporal_attention(replace(temporal, **{name: 0}))
    with pytest.raises(KernelError, match="misaligned"):
        emulated.temporal_attention(replace(temporal, **{name: getattr(temporal, name) + 8}))
    assert (memory == 7).all()


@pytest.mark.parametrize("name", ["qkv", "q_gamma", "k_gamma", "cos", "sin", "q", "k", "v"])
def test_pre_processing_refuses_pointers(
    emulated: KernelLibrary, spatial: SpatialQkv, memory: np.ndarray, name: str
) -> None:
    with pytest.raises(KernelError, match="null"):
        emulated.spatial_qkv(replace(spatial, **{name: 0}))
    with pytest.raises(KernelError, match="misaligned"):
        emulated.spatial_qkv(replace(spatial, **{name: getattr(spatial, name) + 8}))
    assert (memory == 7).all()


def test_optional_pointers_are_checked_too(
    emulated: KernelLibrary, temporal: TemporalAttention, spatial: SpatialQkv, memory: np.ndarray
) -> None:
    address = temporal.qkv
    with pytest.raises(KernelError, match="misaligned"):
        emulated.temporal_attention(replace(temporal, bias=address + 2))
    with pytest.raises(KernelError, match="needs one fp32 scale"):
        emulated.temporal_attention(replace(temporal, output_dtype=FP8))
    with pytest.raises(KernelError, match="misaligned"):
        emulated.temporal_attention(replace(temporal, output_dtype=FP8, output_scale=address + 2))
    with pytest.raises(KernelError, match="needs one fp32 scale"):
        emulated.spatial_qkv(replace(spatial, output_dtype=FP8, q_scale=address, k_scale=address))
    assert (memory == 7).all()


def test_a_plan_looks_at_no_pointer(emulated: KernelLibrary, temporal: TemporalAttention) -> None:
    assert emulated.temporal_attention_plan(replace(temporal, qkv=0, output=1)).blocks >= 1


def test_the_emulated_library_says_so(emulated: KernelLibrary) -> None:
    assert emulated.backend == "emulated"
    assert emulated.error_string(0) == "no error"


def test_a_missing_library_names_the_commands_that_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    with pytest.raises(StivError, match=f"no kernel library: none at .*{KERNELS}.*make plugins.*cmake -S .*--build"):
        library_path()


def test_the_variable_names_the_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, emulated: KernelLibrary
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(emulated.path))
    assert open_library() is open_library()
    assert open_library().backend == "emulated"
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "absent.so"))
    with pytest.raises(KernelError, match=f"{LIBRARY_VARIABLE} names .*absent.so, which is not a file"):
        open_library()


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / KERNELS
    path.write_bytes(b"not ELF")
    with pytest.raises(KernelError, match="cannot be loaded.*make plugins"):
        KernelLibrary(path)


def test_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch, emulated: KernelLibrary) -> None:
    monkeypatch.setattr(module, "ABI_VERSION", 99)
    with pytest.raises(KernelError, match="has ABI 1, this package wants 99"):
        KernelLibrary(emulated.path)
