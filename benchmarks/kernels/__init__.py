"""Parts of ``benchmarks/bench_kernel.py``: build, check and time the attention kernels."""
