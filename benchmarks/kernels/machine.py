"""What was measured on: GPU, driver, clocks and versions; and the datasheet's bandwidth where it is known."""

import platform
import re
import subprocess
from typing import Any

import torch

PEAKS = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}
"""Bytes per second by the vendor's datasheets, by the name that the driver gives."""
QUERY = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "temperature.gpu",
    "power.limit",
)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Names, versions and sizes of the device and of the software on it."""
    found: dict[str, Any] = {
        "device": "cpu",
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "peak_bytes_per_second": PEAKS.get(properties.name),
        }
    return found


def clocks() -> dict[str, str]:
    """What nvidia-smi says now of the first GPU, or nothing where it is not there."""
    command = ("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(QUERY, values, strict=True)) if done.returncode == 0 and len(values) == len(QUERY) else {}


def slug(name: str) -> str:
    """``nvidia-h200`` of ``NVIDIA H200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
