"""What the device can do at best, measured: large matrix products in bf16 and FP8, and a copy."""

import torch
from timing import Work, copy_rate, interleaved

from blocks.counts import Peaks
from blocks.fp8 import quantized, scale_of

SIZE, COPIED = 8192, 2**31
"""Side of the square matrices, and bytes that a copy reads and writes."""
DRY_SIZE, DRY_COPIED = 128, 2**20
FP8_CAPABILITY = (8, 9)


def has_fp8(device: torch.device) -> bool:
    """Whether ``torch._scaled_mm`` runs here: GPUs of compute capability 8.9 and up, and the CPU for dry runs."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def measure_peaks(device: torch.device) -> Peaks:
    """Peaks of ``device`` on random numbers (zeros run faster); on a CPU with small sizes that mean nothing."""
    on_gpu = device.type == "cuda"
    size = SIZE if on_gpu else DRY_SIZE
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    work: dict[str, Work] = {"bf16": lambda _: torch.mm(a, b)}
    if has_fp8(device):
        one = torch.ones((), device=device)
        a8, b8 = quantized(a, scale_of(a)), quantized(b, scale_of(b)).t()
        work["fp8"] = lambda _: torch._scaled_mm(
            a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    times = interleaved(work, 11, 5 if on_gpu else 1, device)
    flops = {name: 2 * size**3 / timing.median_us * 1e6 for name, timing in times.items()}
    return Peaks(flops["bf16"], flops.get("fp8"), copy_rate(device, COPIED if on_gpu else DRY_COPIED))
