"""Runs one part of ``bench_kernel.py`` by itself; the order comes as JSON on the command line."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401 - stiv_deploy need not be installed

    from kernels.parts import Order, run_part

    run_part(Order.from_json(sys.argv[1]))
