"""What a GPU tells of itself by NVML: energy, memory, clocks, and whether it is at work."""

from importlib import import_module
from typing import Any, Self

from stiv_deploy.runtime.command.bench.record import Clocks
from stiv_deploy.runtime.command.doctor import reason_of

MILLI = 1e-3
PCI_LENGTH = 32


class Gpu:
    """One GPU. What the driver does not tell is None."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, index: int) -> Self | None:
        """The GPU that CUDA counts as ``index``, found by its place on the bus; None without NVML or CUDA."""
        found, _ = reason_of(lambda: cls._found(index))
        return found if isinstance(found, cls) else None

    @classmethod
    def _found(cls, index: int) -> Self:
        runtime, nvml = import_module("cuda.bindings.runtime"), import_module("pynvml")
        error, place = runtime.cudaDeviceGetPCIBusId(PCI_LENGTH, index)
        if int(error):
            raise RuntimeError(f"CUDA does not tell where GPU {index} is ({error})")
        nvml.nvmlInit()
        return cls(nvml, nvml.nvmlDeviceGetHandleByPciBusId(place.rstrip(b"\0")))

    def _asked(self, name: str, *arguments: Any) -> Any:
        """What the function ``name`` says of this GPU."""
        told, _ = reason_of(lambda: getattr(self._nvml, name)(self._handle, *arguments))
        return told

    def joules(self) -> float | None:
        """Energy since the driver was loaded; GPUs before Volta do not count it."""
        told = self._asked("nvmlDeviceGetTotalEnergyConsumption")
        return None if told is None else MILLI * told

    def used_bytes(self) -> int | None:
        """Memory in use, by whomever."""
        told = self._asked("nvmlDeviceGetMemoryInfo")
        return None if told is None else int(told.used)

    def busy(self) -> float | None:
        """The share of the last moments in which a kernel ran."""
        told = self._asked("nvmlDeviceGetUtilizationRates")
        return None if told is None else told.gpu / 100

    def clocks(self, cpu: Clocks) -> Clocks:
        """``cpu`` with the clocks of the GPU as they are now."""
        kinds = ("NVML_CLOCK_SM", "NVML_CLOCK_MEM")
        told = [self._asked("nvmlDeviceGetClockInfo", getattr(self._nvml, kind)) for kind in kinds]
        return cpu.model_copy(update={"gpu_mhz": told[0], "gpu_memory_mhz": told[1]})
