"""Faults of the kernels: each finds its place in the sources, and the proof tells a right library from a wrong one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from stiv_deploy.runtime.errors import StivError

TESTS = "tests/unit/runtime/plugins/test_kernels.py"
ONE = (f"{TESTS}::test_one_frame_gives_its_values", f"{TESTS}::test_a_nan_stays_in_its_row_of_pre_processing")


@pytest.fixture
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("kernel_faults")


def test_every_fault_finds_its_place(script: ModuleType) -> None:
    found = list(enumerate(script.faults(), 1))
    assert len(found) > 60
    assert len({(fault.file, fault.what) for _, fault in found}) == len(found)
    for file in {fault.file for _, fault in found}:
        source = (script.PLUGINS / file).read_text()
        numbered = [each for each in found if each[1].file == file]
        patched = script.patched(source, numbered)
        assert all(f"FAULT({number})" in patched for number, _ in numbered)


def test_faults_of_one_place_share_a_switch(script: ModuleType) -> None:
    faults = [
        (3, script.Fault("a", "bound", "late", "n < m", "n <= m", "if (n < m)")),
        (4, script.Fault("a", "bound", "never", "n < m", "false", "if (n < m)")),
        (5, script.Fault("a", "barrier", "none", "sync();")),
    ]
    patched = script.patched("if (n < m) go(n < m - 1);\nsync();", faults)
    assert patched == "if ((FAULT(3) ? (n <= m) : FAULT(4) ? (false) : (n < m))) go(n < m - 1);\nif (!FAULT(5)) sync();"


def test_a_place_that_is_not_there_is_named(script: ModuleType) -> None:
    with pytest.raises(StivError, match="'late' finds its place 2 times, not once"):
        script.Fault("a.cuh", "bound", "late", "n < m", "n <= m").span("n < m, n < m")


def test_outcomes_are_counted_by_kind(script: ModuleType) -> None:
    outcomes = [script.Outcome(1, "mask", "a", "one", "test_x"), script.Outcome(2, "mask", "a", "two", None)]
    outcomes.append(script.Outcome(3, "mask", "a", "three", None, "the host does not show it"))
    assert script.table(outcomes) == {"mask": {"planted": 3, "caught": 1, "survived": 1, "unseen": 1}}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulated kernels need a C++ compiler: g++ was not found")
def test_the_proof_tells_right_from_wrong(script: ModuleType, tmp_path: Path) -> None:
    built = script.library(tmp_path)
    wrong = next(number for number, fault in enumerate(script.faults(), 1) if fault.what == "the last task is left out")
    assert script.proof(built, 0, ONE) is None
    assert script.proof(built, wrong, ONE).startswith("test_one_frame_gives_its_values")
