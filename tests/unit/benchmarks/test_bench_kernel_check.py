"""Checks of the kernel benchmark: that they pass what is right and fail what is not."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from stiv_deploy.runtime.plugins.library import SpatialQkv, TemporalAttention
from stiv_deploy.stiv_ref.fused.operators import spatial_qkv, temporal_attention

Load = Callable[[str], ModuleType]
Program = Callable[[str, str], Path]
CPU = torch.device("cpu")


def random_inputs(kernels: Load, leading: tuple[int, ...], dtype: torch.dtype = torch.float64) -> object:
    return kernels("inputs").random_inputs(torch.Generator().manual_seed(0), leading, 3, 32, dtype)


class NothingDone:
    """A library whose launches write nothing."""

    def temporal_attention(self, call: TemporalAttention, stream: int) -> None:
        """Nothing."""

    def spatial_qkv(self, call: SpatialQkv, stream: int) -> None:
        """Nothing."""


# Oracle and gate


def test_oracle_is_the_definition_of_the_operators(kernels: Load) -> None:
    x, oracle = random_inputs(kernels, (2, 5, 3)), kernels("oracle")
    rest = (x.bias.flatten(), x.q_gamma, x.k_gamma, x.cos, x.sin, 3)
    assert torch.allclose(oracle.exact_temporal(x), temporal_attention(x.qkv.flatten(3), *rest), atol=1e-12)
    assert torch.allclose(oracle.plain_temporal(x), oracle.exact_temporal(x), atol=1e-12)
    x = random_inputs(kernels, (2, 5))
    rest = (x.bias.flatten(), x.q_gamma, x.k_gamma, x.cos, x.sin, 3)
    for exact, plain, other in zip(
        oracle.exact_spatial(x), oracle.plain_spatial(x), spatial_qkv(x.qkv.flatten(2), *rest), strict=True
    ):
        assert torch.allclose(exact, other, atol=1e-12)
        assert torch.allclose(exact, plain, atol=1e-12)


def test_share_of_the_tolerance(kernels: Load) -> None:
    share = kernels("oracle").share_of_tolerance
    exact = torch.tensor([1.0, 2.0, 100.0], dtype=torch.float64)
    assert share(exact.clone(), exact, 0.0, None) == 0
    assert share(exact + 0.5, exact, 0.25, None) == pytest.approx(2)
    assert share(torch.tensor([1.0, torch.nan, 100.0]), exact, 1.0, None) == torch.inf
    saturated = torch.tensor([8.0, 16.0, 448.0]).to(torch.float8_e4m3fn)  # at 1 / 8, 100 is beyond 448 / 8
    assert share(saturated, exact, 0.0, 0.125) == 0
    assert share(torch.tensor([9.0, 16.0, 448.0]).to(torch.float8_e4m3fn), exact, 0.0, 0.125) > 1


class TooFar(NothingDone):
    """Writes one byte behind its output."""

    def temporal_attention(self, call: TemporalAttention, stream: int) -> None:
        """One byte."""
        size = call.batch * call.frames * call.positions * call.heads * call.head_dim * call.output_dtype.itemsize
        ctypes.memset(call.output + size, 0, 1)


def test_check_fails_where_nothing_is_written(kernels: Load) -> None:
    check = kernels("check")
    on = check.Device(NothingDone(), CPU, tiny=True)
    for make in (check.every_size, check.spatial_sizes, check.extreme_values, check.not_finite):
        group = make(on)
        assert group.failed == group.cases > 0
        assert 0 < len(group.faults) <= check.MOST_FAULTS


def test_check_sees_writes_beside_the_output(kernels: Load) -> None:
    check = kernels("check")
    inputs = random_inputs(kernels, (1, 2, 3), torch.bfloat16)
    assert check.Device(NothingDone(), CPU).run(inputs)[1]
    assert not check.Device(TooFar(), CPU).run(inputs)[1]


def test_check_sees_bits_that_change(kernels: Load) -> None:
    class Counting(NothingDone):
        calls = 0

        def temporal_attention(self, call: TemporalAttention, stream: int) -> None:
            self.calls += 1
            ctypes.memset(call.output, self.calls, 1)

    check = kernels("check")
    group = check.determinism(check.Device(Counting(), CPU, tiny=True))
    assert group.failed == group.cases // 2  # pre-processing writes nothing, always the same


def test_large_cases_are_checked_where_there_is_room(kernels: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    check = kernels("check")
    on = check.Device(NothingDone(), CPU)
    assert check.far_offsets(on).cases == 0
    monkeypatch.setattr(check, "free_bytes", lambda device: check.FAR_BYTES)
    monkeypatch.setattr(check, "FAR_ELEMENTS", 2**19)
    group = check.far_offsets(on)
    assert (group.cases, group.failed) == (1, 1)
    monkeypatch.setattr(check, "MODEL_SIZES", ((3, 4, 2, 32),))
    group = check.model_sizes(on)
    assert (group.cases, group.failed) == (4, 4)


# Fragments


def test_a_wrong_fragment_is_named(kernels: Load) -> None:
    fragments = kernels("fragments")
    for name, make in fragments.PROBES.items():
        words, expected = make()
        assert words.dtype == expected.dtype == np.uint32
        assert fragments._faults(name, expected.copy(), expected) is None
        wrong = expected.copy()
        wrong[[7, 9]] = wrong[[9, 7]]  # two lanes exchanged
        assert str(fragments._faults(name, wrong, expected)).startswith(f"{name}: ")


# compute-sanitizer

CLEAN = "========= COMPUTE-SANITIZER\nlaunched 66 calls\n========= ERROR SUMMARY: 0 errors\n"
RACES = "launched 66 calls\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
BAD_READ = (
    "========= Invalid __global__ read of size 16 bytes\n=========     at temporal_attention+0x40 in a.cuh:12\n"
    "launched 66 calls\n========= ERROR SUMMARY: 3 errors\n"
)


@pytest.mark.parametrize(
    ("code", "output", "status"),
    [
        (0, CLEAN, "passed"),
        (0, RACES, "passed"),
        (57, BAD_READ, "failed"),
        (0, BAD_READ, "failed"),
        (57, "no summary", "failed"),
        (0, RACES.replace("0 hazards", "2 hazards"), "failed"),
        (0, "launched 66 calls\n", "not run"),
        (0, "========= ERROR SUMMARY: 0 errors\n", "not run"),
        (1, "Device not supported\n", "not run"),
        (1, CLEAN, "not run"),
        (0, "", "not run"),
    ],
)
def test_sanitizer_passes_only_what_it_has_seen_to_the_end(kernels: Load, code: int, output: str, status: str) -> None:
    assert kernels("sanitizer").judge("memcheck", code, output).status == status


def test_sanitizer_report(kernels: Load, program: Program) -> None:
    sanitize, saved = kernels("sanitizer").sanitize, []
    launches = program("launches", "echo 'launched 66 calls'")
    absent = sanitize(launches, saved.append, None)
    assert absent.status == "not run"
    assert "nothing was checked" in absent.message
    tool = program("tool", f"cat <<'END'\n{CLEAN}END\n")
    outcome = sanitize(launches, saved.append, str(tool))
    assert (outcome.status, len(saved)) == ("passed", 4)
    tool = program("tool", f"[ \"$2\" = racecheck ] && echo refused && exit 1\ncat <<'END'\n{CLEAN}END\n")
    outcome = sanitize(launches, saved.append, str(tool))
    assert (outcome.status, outcome.message) == ("not run", "racecheck: exit code 1: refused")
    broken = program("launches", "echo 'CUDA: no device'; exit 1")
    assert sanitize(broken, saved.append, str(tool)).status == "failed"
