"""Where the time of a block goes: kernels as the profiler names them, sorted into GEMM, attention and the rest."""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from blocks.counts import Kind

ELEMENTWISE = re.compile(r"triton_(poi|red|per|for|unk|split_scan)_|cpp_fused|spatial_qkv")
"""Names that list what they were fused from, GEMMs too, and our kernel that prepares attention but is none."""
ATTENTION = re.compile(
    r"flash|fmha|sdpa|flex_attention|flex_decoding|scaled_dot_product|temporal_attention|attention_kernel"
    r"|pytorch_mem_?eff|efficient_attention|softmax",
    re.IGNORECASE,
)
GEMM = re.compile(
    r"nvjet|gemm|gemv|cutlass|cublas|splitk|triton_tem|triton_(mm|bmm|addmm|scaled_mm)"
    r"|^aten::(mm|bmm|addmm|addmv|_scaled_mm|matmul|linear|mkldnn_linear)|mkl_linear|matmul",
    re.IGNORECASE,
)
LARGEST_REST = 10
"""Names of the rest that are kept, so that a wrong class can be seen."""
TRACE_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Shares:
    """Parts of the time in kernels, together 1, and the largest of the rest by name: (name, part)."""

    gemm: float
    attention: float
    rest: float
    largest_rest: list[tuple[str, float]]


def classify(name: str) -> Kind:
    """What a kernel is by its (demangled) name, or an operator of the CPU; unknown ones are the rest."""
    if ELEMENTWISE.search(name):
        return "rest"
    if ATTENTION.search(name):
        return "attention"
    return "gemm" if GEMM.search(name) else "rest"


def shares(times: Mapping[str, float]) -> Shares:
    """Sort ``times`` (kernel name to time in any unit) into classes; ``ValueError`` if there is no time at all."""
    total = sum(times.values())
    if total <= 0:
        raise ValueError("the profiler saw no kernels; is another profiler attached to this process?")
    parts: dict[Kind, float] = {"gemm": 0.0, "attention": 0.0, "rest": 0.0}
    for name, spent in times.items():
        parts[classify(name)] += spent / total
    rest = [(name, spent / total) for name, spent in times.items() if classify(name) == "rest"]
    largest = sorted(rest, key=lambda pair: pair[1], reverse=True)[:LARGEST_REST]
    return Shares(parts["gemm"], parts["attention"], parts["rest"], largest)


def trace_times(trace: Mapping[str, Any]) -> dict[str, float]:
    """Microseconds by kernel name in a Chrome trace of ``torch.profiler``; copies and fills of memory count, too."""
    times: defaultdict[str, float] = defaultdict(float)
    for event in trace["traceEvents"]:
        if event.get("cat") in TRACE_KERNELS:
            times[event["name"]] += event.get("dur", 0.0)
    return dict(times)


def kernel_times(call: Callable[[], object], device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Microseconds by kernel over ``repeats`` calls on a GPU; on a CPU of operators without those that they call."""
    on_gpu = device.type == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    if not on_gpu:
        return {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return trace_times(json.loads(path.read_text(encoding="utf-8")))
