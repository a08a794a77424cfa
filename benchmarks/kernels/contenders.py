"""Who is timed: our kernel, a copy of the same bytes, and what plain PyTorch has for the same function."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from timing import Work, buffer_sets
from torch import Tensor

from kernels.cases import Case
from kernels.inputs import Inputs, launch, random_inputs
from kernels.oracle import plain_spatial, plain_temporal
from stiv_deploy.runtime.plugins.library import KernelLibrary

KERNEL, UNBIASED, COPY, EAGER, COMPILED, FLEX = "kernel", "no bias", "copy", "eager", "compile", "flex"
TITLES = {
    KERNEL: "our kernel",
    UNBIASED: "our kernel without a bias, as where the linear in front adds it for nothing",
    COPY: "copy of as many bytes",
    EAGER: "torch SDPA with its transposes, eager",
    COMPILED: "torch.compile of the same chain",
    FLEX: "torch.compile with FlexAttention",
}
SAME_FUNCTION = 0.1
"""Relative distance to the eager chain that roundings cannot reach (FP8's are 0.03) and another function exceeds."""
FLEX_MODE = "default"
"""More autotuning would take minutes."""
COMPILE_SECONDS = 30.0
"""Time that must be left for one more compilation."""
SPARE = 0.85
"""Share of the free memory that buffers and temporaries may take; the eager chain needs about eight copies of qkv."""
EAGER_COPIES = 8

Chain = Callable[[Inputs], Tensor | tuple[Tensor, ...]]


@dataclass
class Field:
    """The contenders of a case: each ready to be launched, or with the reason why it is not."""

    works: dict[str, Work] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and with what; ``deadline`` by :func:`time.monotonic`."""

    library: KernelLibrary
    device: torch.device
    deadline: float
    mode: str = "max-autotune-no-cudagraphs"

    @property
    def on_gpu(self) -> bool:
        """Whether times mean something."""
        return self.device.type == "cuda"

    def compiled(self, chain: Chain, mode: str | None = None) -> Chain:
        """``chain`` compiled as one graph for fixed sizes; on the CPU without code generation.

        A function may be recompiled only so many times: call ``torch.compiler.reset()`` before new sizes.
        """
        options: dict[str, Any] = {"mode": mode or self.mode} if self.on_gpu else {"backend": "aot_eager"}
        return torch.compile(chain, fullgraph=True, dynamic=False, **options)


def make_sets(bench: Bench, case: Case) -> list[Inputs]:
    """Inputs of ``case`` in as many copies as it takes for none to be in a cache when its turn comes.

    Raises :class:`MemoryError` if the device has not enough for them and for the eager chain's temporaries.
    """
    count = buffer_sets(case.nbytes, bench.device)
    if bench.on_gpu:
        free = torch.cuda.mem_get_info(bench.device)[0]
        if case.nbytes * (3 * count + EAGER_COPIES) > SPARE * free:
            raise MemoryError(f"{free / 2**30:.0f} GiB are free, too few")
    generator = torch.Generator(bench.device).manual_seed(0)
    sets = [random_inputs(generator, case.leading, case.heads, case.head_dim, torch.bfloat16) for _ in range(count)]
    scales = torch.full((3,), 0.01, device=bench.device) if case.fp8 else None
    return [replace(each, scales=scales) for each in sets]


def kernel_work(bench: Bench, sets: list[Inputs]) -> Work:
    """Our kernel, into its own outputs for each set."""
    outputs = [
        [torch.empty(shape, dtype=each.output_dtype, device=bench.device) for shape in each.output_shapes]
        for each in sets
    ]

    def work(number: int) -> list[Tensor]:
        index = number % len(sets)
        launch(bench.library, sets[index], outputs[index])
        return outputs[index]

    return work


def copy_work(bench: Bench, case: Case, sets: list[Inputs]) -> Work:
    """A copy that reads half of the case's bytes, out of the same inputs, and writes as many."""
    half = case.nbytes // 2
    sources = [each.qkv.view(-1).view(torch.uint8)[:half] for each in sets]
    targets = [torch.empty_like(source) for source in sources]

    def work(number: int) -> None:
        targets[number % len(sets)].copy_(sources[number % len(sets)])

    return work


def chain_of(case: Case) -> Chain:
    """The plain chain of operators."""
    return _temporal_chain if case.kernel == "temporal" else plain_spatial


def _temporal_chain(inputs: Inputs) -> Tensor:
    return plain_temporal(inputs, F.scaled_dot_product_attention)


def _flex_chain(inputs: Inputs) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return plain_temporal(inputs, flex_attention)


def chain_work(chain: Chain, sets: list[Inputs]) -> Work:
    """``chain`` on the sets in turn."""
    return lambda number: chain(sets[number % len(sets)])


def assemble(bench: Bench, case: Case, sets: list[Inputs]) -> Field:
    """All contenders of ``case`` that work here and compute the same; compilations while time is left."""
    torch.compiler.reset()
    lineup = Field()
    lineup.works[KERNEL] = kernel_work(bench, sets)
    lineup.works[UNBIASED] = kernel_work(bench, [replace(each, bias=None) for each in sets])
    lineup.works[COPY] = copy_work(bench, case, sets)
    lineup.works[EAGER] = chain_work(chain_of(case), sets)
    expected = _flat(lineup.works[EAGER](0))
    _check_same(lineup, KERNEL, expected)
    chains = {COMPILED: chain_of(case)}
    if case.kernel == "temporal" and not case.fp8:
        chains[FLEX] = _flex_chain
    for name, chain in chains.items():
        if bench.on_gpu and time.monotonic() + COMPILE_SECONDS > bench.deadline:
            lineup.absent[name] = "no time left"
            continue
        mode = FLEX_MODE if name == FLEX else None
        lineup.works[name] = chain_work(bench.compiled(chain, mode), sets)
        _check_same(lineup, name, expected)
    return lineup


def _flat(result: object) -> Tensor:
    parts = result if isinstance(result, tuple | list) else (result,)
    return torch.cat([part.reshape(-1).float() for part in parts])


def _check_same(lineup: Field, name: str, expected: Tensor) -> None:
    """Run contender ``name`` once; move it to the absent if it fails or computes something else."""
    try:
        got = _flat(lineup.works[name](0))
        distance = float((got - expected).norm() / expected.norm())
    except Exception as error:  # whatever a compiler raises: it is told, and the others are timed
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        lineup.absent[name] = f"{type(error).__name__}: {line}"[:300]
        del lineup.works[name]
        return
    if not distance <= SAME_FUNCTION:
        lineup.absent[name] = f"computes something else: relative distance {distance:.3g} to the eager chain"
        del lineup.works[name]
