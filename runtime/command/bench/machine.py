"""The machine that is measured on: what it is, how fast its processors are set, and what else runs there."""

import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from stiv_deploy.runtime.command.bench.record import Clocks, Machine
from stiv_deploy.runtime.command.doctor import cpu_name, installed_version, list_gpus, memory_gib, reason_of

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
LIBRARIES = (
    *("stiv-deploy", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13", "tensorrt_rtx_cu13_bindings"),
    *("cuda-python", "av", "mlcommons-loadgen"),
)
"""Distributions that times follow from."""
IDLE = ("idle", "iowait", "guest", "guest_nice")
"""Of a CPU's times, those in which nothing is computed, or that are counted elsewhere."""


def machine() -> Machine:
    """This one."""
    gpus, _ = reason_of(list_gpus) if shutil.which("nvidia-smi") else ((), None)
    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        memory_gib=memory_gib(),
        gpus=tuple(gpus or ()),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def versions() -> dict[str, str]:
    """Python, and the libraries that are there."""
    found = {name: installed_version(name) for name in LIBRARIES}
    return {"python": platform.python_version()} | {name: each for name, each in found.items() if each is not None}


def cpu_clocks() -> Clocks:
    """How the system governs the CPU's clock, where it tells."""
    import psutil

    frequency, _ = reason_of(psutil.cpu_freq)
    governor, _ = reason_of(GOVERNOR.read_text)
    most = getattr(frequency, "max", None)
    return Clocks(governor=None if governor is None else governor.strip(), cpu_most_mhz=most or None)


def busy_seconds() -> float:
    """Seconds of computing of all cores since the machine started."""
    import psutil

    times: dict[str, float] = psutil.cpu_times()._asdict()
    return sum(each for name, each in times.items() if name not in IDLE)


def own_seconds() -> float:
    """Seconds of computing of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class LoadMeter:
    """What other processes do, from when it is made."""

    def __init__(self, busy: Any = busy_seconds, own: Any = own_seconds, now: Any = time.perf_counter) -> None:
        self._busy, self._own, self._now = busy, own, now
        self._start = (busy(), own(), now())

    def others(self) -> float:
        """The share of all cores that they have kept busy."""
        busy, own, now = (end - start for end, start in zip(self._read(), self._start, strict=True))
        return min(1.0, max(0.0, busy - own) / (now * (os.cpu_count() or 1))) if now > 0 else 0.0

    def _read(self) -> tuple[float, float, float]:
        return self._busy(), self._own(), self._now()
