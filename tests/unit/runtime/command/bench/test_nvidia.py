"""A GPU by a driver that says what it should."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from stiv_deploy.runtime.command.bench.nvidia import Gpu
from stiv_deploy.runtime.command.bench.record import Clocks


class Nvml(SimpleNamespace):
    """Functions of NVML for the one GPU at ``0000:65:00.0``."""

    def __init__(self) -> None:
        super().__init__(
            NVML_CLOCK_SM=1,
            NVML_CLOCK_MEM=2,
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByPciBusId=lambda place: {b"0000:65:00.0": "handle"}[place],
            nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"handle": 12_500}[handle],
            nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=2**30),
            nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=30),
            nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1980, 2: 2619}[kind],
        )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    nvml = Nvml()
    places = {3: (0, b"0000:65:00.0" + b"\0" * 20)}
    cuda: Any = SimpleNamespace(cudaDeviceGetPCIBusId=lambda length, index: places.get(index, (101, b"")))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    return nvml


def test_a_gpu_is_found_by_its_place_and_asked(driver: Nvml) -> None:
    gpu = Gpu.open(3)
    assert gpu is not None
    assert (gpu.joules(), gpu.used_bytes(), gpu.busy()) == (12.5, 2**30, 0.3)
    found = gpu.clocks(Clocks(governor="performance"))
    assert found == Clocks(governor="performance", gpu_mhz=1980, gpu_memory_mhz=2619)


def test_what_a_driver_does_not_tell_is_unknown(driver: Nvml) -> None:
    gpu = Gpu.open(3)
    assert gpu is not None
    del driver.nvmlDeviceGetTotalEnergyConsumption
    assert gpu.joules() is None
    assert Gpu.open(0) is None
