"""INT8 products in ONNX Runtime on a CPU: fast where they are exact, exact everywhere.

A bundle's activations are symmetric signed bytes, as TensorRT wants them. ONNX Runtime moves them to unsigned bytes
with zero point 128 when it loads a graph (the same grid: q + 128) and multiplies them with signed weights. CPUs with
VNNI instructions add such products in 32 bits. x86 CPUs without add pairs of them in 16 bits, which saturates: two
products of 255 and 127 are twice what fits, and results are silently wrong. There ONNX Runtime can make the weights
unsigned too: exact, and slower (see benchmarks/cpu_int8.py).
"""

from functools import cache
from pathlib import Path

import onnxruntime as ort

CPU_INFO = Path("/proc/cpuinfo")
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Linux's names of the instructions that add products of bytes in 32 bits, each enough by itself."""
EXACT = "session.x64quantprecision"
"""ONNX Runtime's option for unsigned weights on x86. CPUs of other makes ignore it."""


@cache
def cpu_flags(path: Path = CPU_INFO) -> frozenset[str]:
    """Instruction sets of this CPU by Linux's names; empty where the system does not tell."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def keep_products_exact(options: ort.SessionOptions, flags: frozenset[str] | None = None) -> None:
    """Ask for exact products unless the CPU (its ``flags``; None: the one here) is known to add them in 32 bits."""
    if not VNNI & (cpu_flags() if flags is None else flags):
        options.add_session_config_entry(EXACT, "1")
