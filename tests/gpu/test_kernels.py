"""The kernels on a real GPU against fp64: the check of ``benchmarks/bench_kernel.py``, with the library at hand.

Wants a torch that was built for CUDA. The library is built for this GPU alone, by nvcc and CMake.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.gpu
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GROUPS = (
    "every_size",
    "spatial_sizes",
    "extreme_values",
    "not_finite",
    "determinism",
    "model_sizes",
    "far_offsets",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The script as a module; its folder stays on the path, for what it imports later."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("bench_kernel")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def sm(bench: ModuleType) -> str:
    """Compute capability, with everything built for it."""
    capability: str = bench.capability(dry_run=False)
    bench.build(capability)
    return capability


def order(bench: ModuleType, part: str, sm: str, folder: Path) -> object:
    return bench.Order(part, sm, 60.0, str(folder / "result.json"))


def test_fragments_are_laid_out_as_the_kernels_take_them_to_be(bench: ModuleType, sm: str, tmp_path: Path) -> None:
    built = order(bench, "check", sm, tmp_path).built  # type: ignore[attr-defined]
    assert importlib.import_module("kernels.fragments").check_fragments(built.fragments) == []


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_against_fp64(bench: ModuleType, sm: str, tmp_path: Path, group: str) -> None:
    check = importlib.import_module("kernels.check")
    assert {make.__name__ for make in check.GROUPS} == set(GROUPS)
    library = order(bench, "check", sm, tmp_path).library()  # type: ignore[attr-defined]
    result = getattr(check, group)(check.Device(library, torch.device("cuda")))
    assert result.failed == 0, "\n".join(result.faults)
    assert result.cases or group == "far_offsets"


def test_compute_sanitizer_finds_nothing(bench: ModuleType, sm: str, tmp_path: Path) -> None:
    outcome = importlib.import_module("kernels.parts").run_part(order(bench, "sanitizer", sm, tmp_path))
    if outcome.status == "not run":
        pytest.skip(outcome.message)
    assert outcome.status == "passed", outcome.message
