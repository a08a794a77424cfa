"""Are the kernels right on this device? Every head size, many lengths and types, against fp64; then what else holds.

The gate is the tests' own: twice the error of plain torch in the same precision, and one rounding of the result.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.inputs import Guarded, Inputs, launch, random_inputs
from kernels.oracle import (
    exact_spatial,
    exact_temporal,
    share_of_tolerance,
    spatial_tolerance,
    temporal_tolerance,
)
from stiv_deploy.runtime.plugins.library import KernelLibrary
from stiv_deploy.runtime.plugins.spec import HEAD_DIMS

FRAMES = (1, 2, 7, 16, 17, 20, 21, 32, 40, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODEL_SIZES = ((20, 256, 18, 64), (20, 256, 48, 64), (40, 64, 24, 64))
"""T, S, H, Dh of XL, M and XXL."""
MOST_FAULTS = 10
"""Faults of a group that are kept."""
FAR_ELEMENTS, FAR_BYTES = 2**31, 16 * 2**30
"""Offsets beyond 32 bits are checked where that much memory is free."""


@dataclass
class Group:
    """Result of the cases of one kind: how many, the largest error as a share of what is allowed, what went wrong."""

    name: str
    cases: int = 0
    worst: float = 0.0
    faults: list[str] = field(default_factory=list)
    failed: int = 0

    def add(self, about: str, share: float, *, intact: bool = True) -> None:
        """Count a case whose error is ``share`` of what is allowed."""
        self.worst = max(self.worst, share)
        self.expect(intact, f"{about}: wrote beside its output")
        self.expect(share <= 1, f"{about}: error is {share:.3g} of what is allowed", count=False)

    def expect(self, holds: bool, fault: str, *, count: bool = True) -> None:
        """Count a case (or not), and a fault unless ``holds``."""
        self.cases += count
        if not holds:
            self.failed += 1
            if len(self.faults) < MOST_FAULTS:
                self.faults.append(fault)


@dataclass(frozen=True)
class Device:
    """The library and where it runs; ``tiny`` leaves only as many cases as a CPU can emulate."""

    library: KernelLibrary
    device: torch.device
    tiny: bool = False

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers of ``device``."""
        return torch.Generator(self.device).manual_seed(seed)

    def run(self, inputs: Inputs) -> tuple[list[Tensor], bool]:
        """Outputs of one launch, and whether nothing beside them was written."""
        guarded = [Guarded(shape, inputs.output_dtype, self.device) for shape in inputs.output_shapes]
        launch(self.library, inputs, [each.tensor for each in guarded])
        return [each.tensor for each in guarded], all(each.intact() for each in guarded)


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def describe(inputs: Inputs) -> str:
    """Sizes and types of a call in a few words."""
    *leading, _, heads, head_dim = inputs.qkv.shape
    bias = "" if inputs.bias is not None else ", no bias"
    return (
        f"{name_of(inputs.dtype)} -> {name_of(inputs.output_dtype)}, {tuple(leading)}, H {heads}, Dh {head_dim}{bias}"
    )


def check_temporal(on: Device, group: Group, inputs: Inputs, *, fp8: bool = False, clip: float = 1.0) -> None:
    """One case of temporal attention; ``clip`` below 1 makes the FP8 scale too small for the largest numbers."""
    exact = exact_temporal(inputs)
    scale = None
    if fp8:
        largest = max(float(exact.abs().max()) / 448, 1e-30)
        inputs = replace(inputs, scales=torch.tensor([largest * clip], device=on.device))
        scale = float(inputs.scales[0])  # type: ignore[index]
    (got,), intact = on.run(inputs)
    share = share_of_tolerance(got, exact, temporal_tolerance(inputs, exact), scale)
    group.add(f"temporal, {describe(inputs)}", share, intact=intact)


def check_spatial(on: Device, group: Group, inputs: Inputs) -> None:
    """One case of spatial pre-processing."""
    got, intact = on.run(inputs)
    shares = []
    for index, (output, exact) in enumerate(zip(got, exact_spatial(inputs), strict=True)):
        scale = None if inputs.scales is None else float(inputs.scales[index])
        if scale is not None:
            exact = exact.clamp(-448 * scale, 448 * scale)
        shares.append(share_of_tolerance(output, exact, spatial_tolerance(inputs, exact), scale))
    group.add(f"spatial, {describe(inputs)}", max(shares), intact=intact)


# Groups


def every_size(on: Device) -> Group:
    """Temporal attention: all lengths, head sizes, types, FP8 output, with and without bias; odd sizes elsewhere."""
    group, number = Group("temporal attention: lengths x head sizes x types"), 0
    for frames in (1, 2, 17, 20) if on.tiny else FRAMES:
        for head_dim in (48, 72) if on.tiny else HEAD_DIMS:
            for dtype in DTYPES:
                for fp8 in (False, True):
                    number += 1
                    leading = (1, frames, 3) if on.tiny else (2, frames, 5)
                    inputs = random_inputs(on.generator(number), leading, 3, head_dim, dtype)
                    check_temporal(on, group, inputs, fp8=fp8, clip=0.25 if number % 4 == 0 else 1.0)
                    if not on.tiny or head_dim == 72:
                        check_temporal(on, group, replace(inputs, bias=None), fp8=fp8)
    return group


def spatial_sizes(on: Device) -> Group:
    """Spatial pre-processing: head sizes, types, FP8 outputs, with and without bias, at odd sizes."""
    group, number = Group("spatial pre-processing: head sizes x types"), 0
    for head_dim in (72,) if on.tiny else HEAD_DIMS:
        for dtype in DTYPES:
            for positions in (17,) if on.tiny else (1, 17, 64, 255):
                for fp8 in (False, True):
                    number += 1
                    inputs = random_inputs(on.generator(number), (2, positions), 5, head_dim, dtype)
                    inputs.query_scale = head_dim**-0.5 if fp8 else 1.0
                    if fp8:
                        inputs.scales = torch.tensor([0.002, 0.01, 0.02], device=on.device)
                    check_spatial(on, group, inputs)
                    check_spatial(on, group, replace(inputs, bias=None))
    return group


def _large(inputs: Inputs) -> None:
    inputs.qkv *= 1e3 if inputs.dtype == torch.float16 else 1e15


def _small(inputs: Inputs) -> None:
    inputs.qkv *= 1e-4
    inputs.bias = None


def _zero_rows(inputs: Inputs) -> None:
    inputs.qkv[..., ::3, :] = 0
    inputs.qkv[:, ::4] = 0
    inputs.bias = None


def _identical_keys(inputs: Inputs) -> None:
    inputs.qkv[:, :, :, 1] = inputs.qkv[:, :1, :, 1].clone()
    inputs.cos.fill_(1)
    inputs.sin.fill_(0)


def _sharp(inputs: Inputs) -> None:
    inputs.q_gamma *= 8


def _spiky(inputs: Inputs) -> None:
    inputs.qkv.view(-1)[::97] *= 100


EXTREMES: dict[str, Callable[[Inputs], None]] = {
    "large": _large,
    "small": _small,
    "zero rows": _zero_rows,
    "identical keys": _identical_keys,
    "sharp": _sharp,
    "spiky": _spiky,
}


def extreme_values(on: Device) -> Group:
    """Temporal attention on numbers that overflow, vanish, or make the softmax flat or sharp."""
    group = Group("temporal attention: extreme values")
    for seed, (name, change) in enumerate(EXTREMES.items()):
        for dtype in DTYPES:
            for frames, head_dim in ((20, 48),) if on.tiny else ((1, 48), (20, 72), (40, 64), (64, 128)):
                inputs = random_inputs(on.generator(seed), (1, frames, 3), 3, head_dim, dtype)
                change(inputs)
                before = group.failed
                check_temporal(on, group, inputs)
                if group.failed > before and group.faults:
                    group.faults[-1] += f" ({name})"
    return group


def not_finite(on: Device) -> Group:
    """NaN and infinity in one head reach what they reach in fp64 and nothing else."""
    group = Group("NaN and infinity stay where they belong")
    for dtype in DTYPES:
        for matrix in range(3):
            for value in (float("nan"), float("inf"), float("-inf")):
                inputs = random_inputs(on.generator(matrix), (2, 21, 3), 3, 48, dtype)
                inputs.qkv[1, 20, 2, matrix, 1, 5] = value
                (got,), _ = on.run(inputs)
                _same_places(
                    group, f"temporal, {name_of(dtype)}, {value} in {'qkv'[matrix]}", got, exact_temporal(inputs)
                )
            inputs = random_inputs(on.generator(matrix), (2, 17), 3, 64, dtype)
            inputs.qkv[1, 16, matrix, 2, 9] = float("nan")
            outputs, _ = on.run(inputs)
            for got, exact in zip(outputs, exact_spatial(inputs), strict=True):
                _same_places(group, f"spatial, {name_of(dtype)}, NaN in {'qkv'[matrix]}", got, exact)
    return group


def _same_places(group: Group, about: str, got: Tensor, exact: Tensor) -> None:
    got = got.double()
    endless = exact.isinf()
    same = torch.equal(got.isnan(), exact.isnan()) and torch.equal(got[endless], exact[endless])
    group.expect(same, f"{about}: NaN or infinity is elsewhere than in fp64")


def _bits(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1).view(torch.uint8) for x in tensors])


def determinism(on: Device) -> Group:
    """The same bits at every run, and when a CUDA graph replays the launch."""
    group = Group("same bits at every run" + (" and in CUDA graphs" if on.device.type == "cuda" else ""))
    for fp8 in (False, True):
        for dtype in DTYPES:
            for leading in ((1, 19, 2), (3, 17)) if on.tiny else ((2, 20, 64), (2, 40, 31), (40, 64)):
                inputs = random_inputs(on.generator(7), leading, 2 if on.tiny else 8, 72, dtype)
                inputs.scales = torch.full((3,), 0.01, device=on.device) if fp8 else None
                first = _bits(on.run(inputs)[0])
                same = all(torch.equal(_bits(outputs), first) for outputs in _again(on, inputs))
                group.expect(same, f"{describe(inputs)}: bits differ between runs")
    return group


def _again(on: Device, inputs: Inputs) -> Iterator[list[Tensor]]:
    for _ in range(3):
        yield on.run(inputs)[0]
    if on.device.type != "cuda":
        return
    outputs = [torch.empty(shape, dtype=inputs.output_dtype, device=on.device) for shape in inputs.output_shapes]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(on.library, inputs, outputs)
    for _ in range(3):
        for output in outputs:
            output.view(torch.uint8).fill_(0xFF)
        graph.replay()
        yield outputs


def model_sizes(on: Device) -> Group:
    """The shapes of the large models as they are, 16 bits and FP8 out: many thread blocks, several positions each."""
    group = Group("sizes of the large models")
    for frames, positions, heads, head_dim in () if on.tiny else MODEL_SIZES:
        for fp8 in (False, True):
            inputs = random_inputs(on.generator(heads), (2, frames, positions), heads, head_dim, torch.bfloat16)
            check_temporal(on, group, inputs, fp8=fp8)
            rows = replace(inputs, qkv=inputs.qkv.flatten(0, 1))
            spatial = random_inputs(on.generator(heads), (1, positions), heads, head_dim, torch.bfloat16)
            rows.cos, rows.sin = spatial.cos, spatial.sin
            rows.scales = torch.full((3,), 0.01, device=on.device) if fp8 else None
            check_spatial(on, group, rows)
    return group


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU; none on a CPU, which has no time for large cases."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def far_offsets(on: Device) -> Group:
    """More than 2^31 elements: the last positions are right. Skipped, with no case, where memory is short."""
    group = Group("offsets beyond 32 bits")
    if free_bytes(on.device) < FAR_BYTES:
        return group
    frames, heads, head_dim = 20, 48, 64
    positions = FAR_ELEMENTS // (frames * 3 * heads * head_dim) + 3
    inputs = random_inputs(on.generator(0), (1, frames, positions), heads, head_dim, torch.bfloat16)
    (got,), intact = on.run(inputs)
    end = replace(inputs, qkv=inputs.qkv[:, :, -3:].clone())
    exact = exact_temporal(end)
    share = share_of_tolerance(got[:, :, -3:], exact, temporal_tolerance(end, exact), None)
    group.add(f"temporal, {describe(inputs)}", share, intact=intact)
    return group


GROUPS = (
    every_size,
    spatial_sizes,
    extreme_values,
    not_finite,
    determinism,
    model_sizes,
    far_offsets,
)
