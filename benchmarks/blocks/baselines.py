"""One whole block of XL and M as PyTorch runs it: the baselines of every later claim of speed.

    python benchmarks/blocks/baselines.py --out benchmarks/results

Eager and compiled, bf16 and FP8, with the attention of PyTorch and with the project's own kernels: time, what part of
it GEMMs and attention take, fraction of the roofline, memory and error. Without a GPU a dry run on a tiny block says
that the script works.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import checkout  # noqa: F401 - stiv_deploy need not be installed

from command import run

from blocks.measure import BlockRow, measure_case
from blocks.peaks import measure_peaks
from blocks.sizes import CASES, DRY, QUICK

MIB = 2**20
NAME = "block-baselines"
HEADINGS = (
    "block",
    "variant",
    "time, us (deciles)",
    "GEMM / attention / rest, %",
    "bound, us",
    "of the roofline",
    "GEMM arithmetic alone",
    "error (plain bf16)",
    "weights, memory of a call, MiB",
)


def run_baselines(
    device: torch.device, quick: bool = False, keep: Callable[[list[BlockRow]], None] | None = None
) -> list[BlockRow]:
    """Measure all variants of the blocks: of XL and M at 256 and 512 pixels, with ``quick`` of XL at 256 pixels.

    On a CPU always one tiny block, whose times mean nothing. ``keep`` gets the rows so far after every case. Progress
    goes to stderr.
    """
    cases = DRY if device.type != "cuda" else QUICK if quick else CASES
    peaks = measure_peaks(device)
    rows: list[BlockRow] = []
    for case in cases:
        started = time.perf_counter()
        rows += measure_case(case, device, peaks, rounds=5 if quick else 11)
        typer.echo(f"block of {case}: {time.perf_counter() - started:.0f} s", err=True)
        if keep is not None:
            keep(rows)
    return rows


def report(rows: list[BlockRow]) -> str:
    """A Markdown table of ``rows``, what is wrong with them if anything, and how they were measured."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|", *(_line(row) for row in rows)]
    parts = ["\n".join(lines), *(f"**Wrong result:** {fault}" for fault in faults(rows)), _method(rows)]
    return "\n\n".join(parts) + "\n"


def faults(rows: list[BlockRow]) -> list[str]:
    """Variants whose error rounding does not explain, in words."""
    return [
        f"{row.case.model} at {row.case.pixels} pixels, {row.variant}: error {row.parity.error:.2g}, "
        f"rounding explains {row.parity.limit:.2g}"
        for row in rows
        if row.parity is not None and not row.parity.good
    ]


def _line(row: BlockRow) -> str:
    cells = [f"{row.case.model}, {row.case.pixels} px", row.variant, _time(row), _shares(row)]
    cells += [f"{row.bound.total_us:,.0f}" if row.bound else "", _percent(row.fraction), _percent(row.gemm_fraction)]
    cells += [f"{row.parity.error:.2g} ({row.parity.bf16_error:.2g})" if row.parity else "", _memory(row)]
    return f"| {' | '.join(cells)} |"


def _time(row: BlockRow) -> str:
    if row.timing is None:
        return (row.note or "not measured").replace("|", "/")
    how = "" if row.timing.how != "stream" else ", launch by launch"
    return f"{row.timing.median_us:,.0f} ({row.timing.low_us:,.0f} to {row.timing.high_us:,.0f}{how})"


def _shares(row: BlockRow) -> str:
    if row.shares is None:
        return "" if row.timing is None else (row.note or "").replace("|", "/")
    return " / ".join(f"{100 * part:.0f}" for part in (row.shares.gemm, row.shares.attention, row.shares.rest))


def _percent(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.0f} %"


def _memory(row: BlockRow) -> str:
    if not row.weight_bytes:
        return ""
    peak = "not measured" if row.peak_bytes is None else f"{row.peak_bytes / MIB:,.0f}"
    return f"{row.weight_bytes / MIB:,.0f}, {peak}"


def _method(rows: list[BlockRow]) -> str:
    if not rows:
        return "Nothing was measured."
    case, peaks = rows[0].case, rows[0].peaks
    references = sorted({row.parity.reference for row in rows if row.parity})
    fp8 = "no FP8" if peaks.fp8 is None else f"FP8 {peaks.fp8 / 1e12:,.4g} TFLOP/s"
    dry = (
        ""
        if rows[0].device == "cuda"
        else "**A dry run on a CPU: times, peaks and fractions say only that the script runs.** There `torch.compile` "
        "makes no code, fused attention is its definition in plain operators, and shares are of operators. "
    )
    return (
        f"{dry}One block on {case.batch} clips of {case.frames} frames, {case.text} text tokens whose keys and values "
        "are given, random weights. All variants of a size take turns in one process, each a CUDA graph over rotating "
        "inputs larger than the L2; median of the rounds, first and ninth decile. FP8 is `torch._scaled_mm` in E4M3 "
        "with fast accumulation and one scale a tensor, of activations static unless it says dynamic; attention stays "
        "bf16. Shares are kernel times of the profiler, sorted by name; QK-norm, RoPE and changes of layout count as "
        "rest, unless our temporal kernel does them. **Roofline:** a sum over the parts of the block (eight GEMMs, "
        "three attentions, five passes of norms and residuals), for each the larger of its flops over the peak and "
        "its least bytes over the copy rate, as if every kernel were perfect and none overlapped; bias and GELU are "
        "free inside GEMMs, QK-norm and RoPE inside attention, quantization inside what comes before it. Time over "
        "that is the price of what is not fused and of kernels below the peak; small tensors that stay in the L2 may "
        "beat it in part. 'GEMM arithmetic alone' is the GEMMs' flops over the peak and the measured time, the usual "
        "utilization: it has no place for the bytes that attention and norms must move, so that even a perfect block "
        f"stays below 100 %. Peaks measured in the same run: bf16 {peaks.bf16 / 1e12:,.4g} TFLOP/s, {fp8}, copy "
        f"{peaks.copy / 1e12:,.4g} TB/s (read + written). Error: relative L2 of the block's result against the same "
        f"weights in {' and '.join(references) or 'high precision'}; beside it that of plain eager bf16. Memory of a "
        "call is what torch allocates beyond weights and inputs."
    )


def to_json(rows: list[BlockRow]) -> list[dict[str, Any]]:
    """Rows as JSON values, with the fractions."""
    return [asdict(row) | {"fraction": row.fraction, "gemm_fraction": row.gemm_fraction} for row in rows]


def write(rows: list[BlockRow], device: torch.device, folder: Path) -> None:
    """Write ``block-baselines-DATE.json`` and ``.md`` into ``folder``; each appears whole or not at all."""
    date = datetime.now(UTC).date().isoformat()
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, no GPU"
    result = {
        "date": date,
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "rows": to_json(rows),
    }
    heading = f"# One block in PyTorch ({date})\n\n{machine}; torch {torch.__version__}.\n\n"
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", heading + report(rows))):
        path = folder / f"{NAME}-{date}{suffix}"
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for a JSON and a Markdown file.", metavar="DIR")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="XL at 256 pixels only, fewer rounds.")] = False,
) -> None:
    """Measure one block in eager and compiled bf16 and FP8; exit 1 if a result is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = run_baselines(device, quick)
    if out is not None:
        write(rows, device, out)
    typer.echo(report(rows))
    if faults(rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
