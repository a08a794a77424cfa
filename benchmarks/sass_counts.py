"""Instructions of the temporal attention kernel, by class, for a token and head: static counts, no times.

    python benchmarks/sass_counts.py --source before=CHECKOUT --source after=. --out benchmarks/results/NAME.json

needs nvcc, CMake, and ``nvdisasm`` (of the CUDA toolkit, or of the package nvidia-cuda-nvdisasm) on the path, no GPU.
The kernel is compiled as ``make plugins`` does; ``kernels/sass.py`` carries out the control flow of a whole thread
block, its first, of XL's and M's shape. The bytes that it copies in and out are compared with what they must be.
Counted are instructions that a warp issues; they say nothing about how long one waits for another.
"""

import json
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import command
import numpy as np
import typer
from kernels.build import build_library
from kernels.errors import BenchmarkError
from kernels.sass import CLASSES, Code, Warp, issue, read_code

from stiv_deploy.runtime.files import write_text
from stiv_deploy.runtime.plugins.library import EMULATED, POINTERS, KernelDtype, KernelLibrary, Plan, TemporalAttention

ROOT = Path(__file__).resolve().parents[1]
FIRST_PARAMETER = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}
"""Where a kernel's parameters begin in constant bank 0, by compute capability."""
LANES = 32


@dataclass(frozen=True)
class Case:
    """A call in bfloat16: batch 2, 1024 positions."""

    head_dim: int
    heads: int
    frames: int
    bias: bool = True

    def plan(self, library: KernelLibrary) -> Plan:
        """How it is cut into thread blocks."""
        sizes = {"batch": 2, "frames": self.frames, "positions": 1024, "heads": self.heads, "head_dim": self.head_dim}
        dtypes = {"dtype": KernelDtype.BFLOAT16, "output_dtype": KernelDtype.BFLOAT16}
        pointers = dict.fromkeys((*POINTERS, "output"), 0)
        return library.temporal_attention_plan(TemporalAttention(**pointers, **sizes, **dtypes))

    def constants(self, sm: int, plan: Plan) -> bytes:
        """Constant bank 0 with the kernel's parameters, ``TemporalParameters`` in temporal_attention.cuh."""
        pointers = [0x7F0000000000 + (each << 32) for each in range(8)]
        pointers[1] *= self.bias
        pointers[6] = 0  # no FP8
        sizes = (self.frames, 1024, self.heads, plan.heads_per_block, plan.positions_per_block, plan.splits)
        return bytes(FIRST_PARAMETER[sm]) + struct.pack("<8Q6if", *pointers, *sizes, 1e-6) + bytes(64)


CASES = (
    Case(64, 18, 20),
    Case(64, 18, 20, bias=False),
    Case(72, 16, 20),
    Case(72, 16, 20, bias=False),
    Case(64, 18, 40),
    Case(72, 16, 40),
)


def disassembled(source: Path, sm: int) -> str:
    """The kernels of the checkout ``source`` for compute capability ``sm``, as ``nvdisasm`` writes them."""
    base = max(each for each in (80, 89, 100) if each <= sm)  # as CMakeLists.txt has it
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        options = ["-O3", "-DNDEBUG", "-std=c++17", "-DSTIV_BUILD", f"-gencode=arch=compute_{base},code=sm_{sm}"]
        file = source / "runtime" / "plugins" / "attention" / "temporal_attention.cu"
        _output("nvcc", *options, "-cubin", str(file), "-o", str(cubin))
        return _output("nvdisasm", "-c", str(cubin))


def _output(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        raise BenchmarkError(f"{tool} was not found; put the CUDA toolkit (12.8 or later) on PATH")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{tool} failed: {(done.stderr.strip() or 'it says nothing').splitlines()[0]}")
    return done.stdout


def find_kernel(text: str, case: Case) -> Code:
    """The kernel that ``case`` launches: of those for its head size, the one for the fewest tiles that suffice."""
    tiles = -(-case.frames // 16)
    symbol = re.compile(rf"temporal_attentionINS_8BFloat16ELi{case.head_dim}ELi(\d+)E")
    found = {}
    for section in re.split(r"^//-+ \.text\.", text, flags=re.MULTILINE)[1:]:
        if (match := symbol.search(section.partition("\n")[0])) and int(match[1]) >= tiles:
            found[int(match[1])] = section
    if not found:
        raise BenchmarkError(f"no kernel for head size {case.head_dim} and {case.frames} frames was compiled")
    return read_code(found[min(found)])


def count(code: Code, case: Case, sm: int, plan: Plan) -> dict[str, float]:
    """Instructions that the warps of the first block issue, by class, for each of its tokens and heads."""
    kinds: Counter[str] = Counter()
    lanes: Counter[str] = Counter()
    for warp in range(plan.threads // LANES):
        special = {"SR_TID.X": np.arange(LANES) + LANES * warp}
        for (index, active), times in issue(code, Warp(case.constants(sm, plan), special)).items():
            instruction = code.instructions[index]
            kinds[instruction.kind] += times
            lanes[instruction.name.split(".")[0]] += active * times
    rows = case.frames * plan.heads_per_block * plan.positions_per_block
    check(case, rows, lanes["LDGSTS"], lanes["STG"], lanes["HMMA"] // LANES)
    return {kind: round(kinds[kind] / rows, 2) for kind in CLASSES} | {"all": round(kinds.total() / rows, 2)}


def check(case: Case, rows: int, copied: int, stored: int, products: int) -> None:
    """Whether 16-byte chunks in and out and tensor-core products are those of a block with so many tokens and heads."""
    chunks, tiles, pieces = rows * case.head_dim * 2 // 16, -(-case.frames // 16), -(-case.frames // 8)
    steps, half = case.head_dim // 16, case.head_dim % 16 > 0
    products_of_tile = pieces * (steps + half) + tiles * (2 * steps + half)  # q k^T, by 8 keys; then p v
    given, want = (copied, stored, products), (3 * chunks, chunks, rows // case.frames * tiles * products_of_tile)
    if given != want:
        raise BenchmarkError(
            f"the machine code was misread: chunks in, chunks out and products are {given}, where {want} are wanted; "
            "see kernels/sass.py"
        )


def measure(name: str, source: Path, sm: int, library: KernelLibrary) -> list[dict[str, Any]]:
    """A row for each case."""
    text, rows = disassembled(source, sm), []
    for case in CASES:
        plan, code = case.plan(library), find_kernel(text, case)
        row = {"source": name, "sm": sm, **asdict(case), "plan": asdict(plan), "in_code": len(code.instructions)}
        rows.append(row | {"per_token_and_head": count(code, case, sm, plan)})
        typer.echo(f"{name} SM {sm} {case}: {rows[-1]['per_token_and_head']}")
    return rows


def main(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the counts go, as JSON.")],
    source: Annotated[list[str] | None, typer.Option(metavar="NAME=CHECKOUT", help="Whose kernels; several.")] = None,
    sm: Annotated[str, typer.Option(help="Compute capabilities, such as 89,90.")] = "89,90",
) -> None:
    """Count instructions of the temporal attention kernel."""
    folder = ROOT / "build" / "sass-counts"
    build_library(None, ROOT, folder)
    library, rows = KernelLibrary(folder / EMULATED), []
    for name, _, checkout in (each.partition("=") for each in source or ["now=."]):
        for number in map(int, sm.split(",")):
            rows += measure(name, Path(checkout), number, library)
    result = {
        "what": "instructions that a warp issues, for a token and head, counted in machine code; no times, no GPU",
        "date": datetime.now(UTC).date().isoformat(),
        "compiler": _output("nvcc", "--version").splitlines()[-1],
        "command": f"python benchmarks/sass_counts.py --sm {sm}",
        "rows": rows,
    }
    write_text(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main)
