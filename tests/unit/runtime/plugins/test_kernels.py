"""The kernels, on the host, against fp64 numpy written from the formulas; plain torch sets the scale of the error."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stiv_deploy.runtime.plugins.library import (
    POINTERS,
    KernelDtype,
    KernelLibrary,
    Plan,
    SpatialQkv,
    TemporalAttention,
)

HEAD_DIMS = (32, 48, 64, 72, 96, 128)
NUMPY = {
    KernelDtype.FLOAT32: np.dtype(np.float32),
    KernelDtype.FLOAT16: np.dtype(np.float16),
    KernelDtype.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    KernelDtype.FLOAT8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
}
TORCH = {
    KernelDtype.FLOAT32: torch.float32,
    KernelDtype.FLOAT16: torch.float16,
    KernelDtype.BFLOAT16: torch.bfloat16,
}
ROUNDOFF = {KernelDtype.FLOAT32: 2.0**-24, KernelDtype.FLOAT16: 2.0**-11, KernelDtype.BFLOAT16: 2.0**-8}
EPSILON = 1e-6
GUARD = 64  # elements of NaN before and behind every tensor


@dataclass
class Case:
    """Inputs of one call, of ``dtype``; ``qkv`` is [B, T, S, 3, H, Dh], or [N, S, 3, H, Dh] for pre-processing."""

    dtype: KernelDtype
    qkv: np.ndarray
    q_gamma: np.ndarray
    k_gamma: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    bias: np.ndarray | None
    scales: np.ndarray | None = None  # fp32, of FP8 outputs
    query_scale: float = 1.0


class Guarded:
    """A copy of an array, or an array to be filled, aligned to 16 bytes between zones of NaN."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, values: np.ndarray | None = None) -> None:
        size = int(np.prod(shape))
        raw = np.full((size + 2 * GUARD) * dtype.itemsize + 16, 0xFF, np.uint8)  # all ones is NaN in every type
        start = -raw.ctypes.data % 16
        self._whole = raw[start : start + (size + 2 * GUARD) * dtype.itemsize].view(dtype)
        self.array = self._whole[GUARD : GUARD + size].reshape(shape)
        if values is not None:
            self.array[...] = values

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    def intact(self) -> bool:
        whole = self._whole.view(np.uint8)
        zone = GUARD * self.array.dtype.itemsize
        return bool((whole[:zone] == 0xFF).all() and (whole[-zone:] == 0xFF).all())


def guard(values: np.ndarray) -> Guarded:
    return Guarded(values.shape, values.dtype, values)


def make_case(
    rng: np.random.Generator, dtype: KernelDtype, leading: tuple[int, ...], length: int, heads: int, head_dim: int
) -> Case:
    """Random inputs; ``leading`` are the axes of qkv before its 3, ``length`` the rows of the RoPE tables."""
    kind = NUMPY[dtype]
    angles = rng.uniform(0, 2 * np.pi, (length, head_dim // 2))
    return Case(
        dtype,
        rng.standard_normal((*leading, 3, heads, head_dim)).astype(kind),
        rng.uniform(0.5, 1.5, head_dim).astype(kind),
        rng.uniform(0.5, 1.5, head_dim).astype(kind),
        np.cos(angles).astype(kind),
        np.sin(angles).astype(kind),
        rng.standard_normal((3, heads, head_dim)).astype(kind),
    )


# fp64 oracle


def norm_and_rope(x: np.ndarray, gamma: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RMS norm over the last axis, rotation of the pairs (i, i + Dh / 2); ``x`` [..., Dh], tables broadcast to it."""
    half = x.shape[-1] // 2
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * gamma.astype(np.float64)
    first, second = y[..., :half], y[..., half:]
    c, s = cos.astype(np.float64), sin.astype(np.float64)
    return np.concatenate((first * c - second * s, first * s + second * c), -1)


def exact_qkv(case: Case) -> np.ndarray:
    return case.qkv.astype(np.float64) + (0.0 if case.bias is None else case.bias.astype(np.float64))


@np.errstate(all="ignore")
def exact_temporal(case: Case) -> np.ndarray:
    """fp64 [B, T, S, H * Dh]."""
    x = exact_qkv(case)  # B T S 3 H D
    cos, sin = case.cos[None, :, None, None], case.sin[None, :, None, None]
    q, k = norm_and_rope(x[:, :, :, 0], case.q_gamma, cos, sin), norm_and_rope(x[:, :, :, 1], case.k_gamma, cos, sin)
    logits = np.einsum("btshd,bushd->bshtu", q, k) / np.sqrt(x.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bshtu,bushd->btshd", weights, x[:, :, :, 2]).reshape(*x.shape[:3], -1)


def exact_spatial(case: Case) -> tuple[np.ndarray, ...]:
    """q, k, v, fp64 [N, H, S, Dh]."""
    x = exact_qkv(case)  # N S 3 H D
    cos, sin = case.cos[None, :, None], case.sin[None, :, None]
    q = norm_and_rope(x[:, :, 0], case.q_gamma, cos, sin) * np.float64(np.float32(case.query_scale))
    k = norm_and_rope(x[:, :, 1], case.k_gamma, cos, sin)
    return tuple(y.transpose(0, 2, 1, 3) for y in (q, k, x[:, :, 2]))


# Plain torch in the same precision


def to_torch(x: np.ndarray, dtype: KernelDtype) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32)).to(TORCH[dtype])


def plain_qkv(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [..., H, rows, Dh] for qkv [..., rows, 3, H, Dh], every step rounded to the type."""
    tensor = lambda x: to_torch(x, case.dtype)  # noqa: E731
    x = tensor(case.qkv)
    if case.bias is not None:
        x = x + tensor(case.bias)
    q, k, v = (y.transpose(-2, -3) for y in x.unbind(-3))
    cos, sin, shape = tensor(case.cos), tensor(case.sin), q.shape[-1:]

    def rotated(y: torch.Tensor, gamma: np.ndarray) -> torch.Tensor:
        first, second = F.rms_norm(y, shape, tensor(gamma), EPSILON).chunk(2, -1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)

    return rotated(q, case.q_gamma), rotated(k, case.k_gamma), v


def plain_temporal(case: Case) -> np.ndarray:
    moved = replace(case, qkv=case.qkv.transpose(0, 2, 1, 3, 4, 5))  # B S T 3 H D
    y = F.scaled_dot_product_attention(*plain_qkv(moved))  # B S H T D
    y = y.permute(0, 3, 1, 2, 4)
    return y.reshape(*y.shape[:3], -1).double().numpy()


# Calls


def plan_of(library: KernelLibrary, case: Case) -> Plan:
    """How temporal attention of ``case`` is cut into blocks."""
    batch, frames, positions, _, heads, head_dim = case.qkv.shape
    sizes = {"batch": batch, "frames": frames, "positions": positions, "heads": heads, "head_dim": head_dim}
    nothing = dict.fromkeys((*POINTERS, "output"), 0)
    call = TemporalAttention(**nothing, **sizes, dtype=case.dtype, output_dtype=case.dtype)
    return library.temporal_attention_plan(call)


def run_temporal(library: KernelLibrary, case: Case) -> np.ndarray:
    """Output in fp64, before its FP8 scale is taken off; asserts that nothing beside it was written."""
    batch, frames, positions, _, heads, head_dim = case.qkv.shape
    kind = case.dtype if case.scales is None else KernelDtype.FLOAT8_E4M3
    output = Guarded((batch, frames, positions, heads * head_dim), NUMPY[kind])
    tensors = {name: guard(getattr(case, name)) for name in POINTERS}
    bias = None if case.bias is None else guard(case.bias)
    call = TemporalAttention(
        **{name: tensor.address for name, tensor in tensors.items()},
        output=output.address,
        batch=batch,
        frames=frames,
        positions=positions,
        heads=heads,
        head_dim=head_dim,
        dtype=case.dtype,
        output_dtype=kind,
        bias=bias.address if bias else 0,
        output_scale=0 if case.scales is None else case.scales.ctypes.data,
    )
    library.temporal_attention(call)
    assert output.intact()
    return output.array.astype(np.float64)


def run_spatial(library: KernelLibrary, case: Case) -> list[np.ndarray]:
    rows, positions, _, heads, head_dim = case.qkv.shape
    kind = case.dtype if case.scales is None else KernelDtype.FLOAT8_E4M3
    outputs = [Guarded((rows, heads, positions, head_dim), NUMPY[kind]) for _ in range(3)]
    tensors = {name: guard(getattr(case, name)) for name in POINTERS}
    bias = None if case.bias is None else guard(case.bias)
    scales: dict[str, int] = {}
    if case.scales is not None:
        scales = {f"{name}_scale": case.scales[index:].ctypes.data for index, name in enumerate("qkv")}
    call = SpatialQkv(
        **{name: tensor.address for name, tensor in tensors.items()},
        **{name: output.address for name, output in zip("qkv", outputs, strict=True)},
        **scales,
        rows=rows,
        positions=positions,
        heads=heads,
        head_dim=head_dim,
        dtype=case.dtype,
        output_dtype=kind,
        bias=bias.address if bias else 0,
        query_scale=case.query_scale,
    )
    library.spatial_qkv(call)
    assert all(output.intact() for output in outputs)
    return [output.array.astype(np.float64) for output in outputs]


def rounding_of_fp8(exact: np.ndarray, scale: float) -> np.ndarray:
    """Half a unit in the last place of E4M3 at ``exact / scale``, in units of the output."""
    return scale * np.maximum(np.abs(exact / scale) * 2.0**-4, 2.0**-10)


# Temporal attention


def _plain(case: Case, rng: np.random.Generator) -> None:
    """Numbers of unit size."""


def _large(case: Case, rng: np.random.Generator) -> None:
    case.qkv *= case.qkv.dtype.type(1e3 if case.dtype == KernelDtype.FLOAT16 else 1e15)


def _small(case: Case, rng: np.random.Generator) -> None:
    case.qkv *= case.qkv.dtype.type(1e-4)
    case.bias = None


def _zero_rows(case: Case, rng: np.random.Generator) -> None:
    case.qkv[rng.random(case.qkv.shape[:-1]) < 0.3] = 0
    case.bias = None


def _identical_keys(case: Case, rng: np.random.Generator) -> None:
    case.qkv[:, :, :, 1] = case.qkv[:, :1, :, 1]
    case.cos[...], case.sin[...] = 1, 0


def _sharp(case: Case, rng: np.random.Generator) -> None:
    case.q_gamma *= case.q_gamma.dtype.type(8)


def _spiky(case: Case, rng: np.random.Generator) -> None:
    case.qkv[rng.random(case.qkv.shape) < 0.01] *= case.qkv.dtype.type(100)


CHANGES: tuple[Callable[[Case, np.random.Generator], None], ...] = (
    *((_plain,) * 4),
    _large,
    _small,
    _zero_rows,
    _identical_keys,
    _sharp,
    _spiky,
)


def random_temporal_case(rng: np.random.Generator) -> Case:
    dtype = list(TORCH)[rng.choice(3, p=(0.2, 0.3, 0.5))]
    frames = int(rng.integers(1, 65)) if rng.random() < 0.5 else int(rng.integers(1, 22))
    budget = 64 if dtype == KernelDtype.FLOAT32 else 480  # frames times heads times positions
    positions = int(rng.integers(1, max(2, min(9, budget // frames))))
    heads = int(rng.integers(1, max(2, min(9, budget // (frames * positions)))))
    batch = int(rng.integers(1, 3)) if frames * positions * heads < budget // 2 else 1
    case = make_case(rng, dtype, (batch, frames, positions), frames, heads, int(rng.choice(HEAD_DIMS)))
    if rng.random() < 0.3:
        case.bias = None
    CHANGES[rng.integers(len(CHANGES))](case, rng)
    if rng.random() < 0.25:
        largest = np.abs(exact_temporal(case)).max()
        case.scales = np.array([max(largest / 448, 1e-30) * rng.choice((1.0, 0.25))], np.float32)  # 0.25 saturates
    return case


def temporal_tolerance(case: Case, exact: np.ndarray) -> float:
    """Twice what plain torch of this precision loses, and one rounding of the largest output."""
    lost = np.abs(plain_temporal(case) - exact).max()
    return 2 * float(lost) + 2 * ROUNDOFF[case.dtype] * float(np.abs(exact).max()) + 1e-7 * float(np.abs(exact).max())


@pytest.mark.parametrize("seed", range(20))
def test_temporal_attention_is_as_exact_as_its_type(emulated: KernelLibrary, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for number in range(26):
        case = random_temporal_case(rng)
        emulated.set_emulation_seed(int(rng.integers(2**32)))
        exact = exact_temporal(case)
        got, allowed = run_temporal(emulated, case), temporal_tolerance(case, exact)
        about = f"case {number} of seed {seed}: {case.dtype.name} {case.qkv.shape}"
        if case.scales is None:
            assert np.abs(got - exact).max() <= allowed, about
        else:
            scale = float(case.scales[0])
            clipped = exact.clip(-448 * scale, 448 * scale)
            slack = (1 + 2.0**-4) * allowed + rounding_of_fp8(clipped, scale) * (1 + 1e-6)
            assert (np.abs(got * scale - clipped) <= slack).all(), about


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("frames", [1, 16, 17, 63, 64])
def test_every_head_size_and_number_of_tiles(emulated: KernelLibrary, head_dim: int, frames: int) -> None:
    rng = np.random.default_rng(frames * head_dim)
    case = make_case(rng, KernelDtype.BFLOAT16, (1, frames, 1), frames, 3, head_dim)
    exact = exact_temporal(case)
    assert np.abs(run_temporal(emulated, case) - exact).max() <= temporal_tolerance(case, exact)


def test_a_block_of_several_positions_and_one_of_what_is_left(emulated: KernelLibrary) -> None:
    """Blocks take more than one position only where there are many: here two, and the last block one.

    A lane goes through both heads of both positions, so that their bias begins anew.
    """
    case = make_case(np.random.default_rng(7), KernelDtype.BFLOAT16, (1, 15, 1025), 15, 2, 32)
    plan = plan_of(emulated, case)
    assert (plan.heads_per_block, plan.positions_per_block, plan.splits) == (2, 2, 1)
    exact = exact_temporal(case)
    assert np.abs(run_temporal(emulated, case) - exact).max() <= temporal_tolerance(case, exact)


@pytest.mark.parametrize("dtype", list(TORCH))
def test_one_frame_gives_its_values(emulated: KernelLibrary, dtype: KernelDtype) -> None:
    case = make_case(np.random.default_rng(1), dtype, (2, 1, 5), 1, 3, 72)
    case.bias = None
    expected = case.qkv[:, :, :, 2].reshape(2, 1, 5, -1).astype(np.float64)
    assert np.array_equal(run_temporal(emulated, case), expected)


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("matrix", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_head(
    emulated: KernelLibrary, dtype: KernelDtype, matrix: int, value: float
) -> None:
    case = make_case(np.random.default_rng(2), dtype, (2, 21, 3), 21, 3, 48)
    case.qkv[1, 20, 2, matrix, 1, 5] = value
    with np.errstate(all="ignore"):
        got, exact = run_temporal(emulated, case), exact_temporal(case)
    assert np.array_equal(np.isnan(got), np.isnan(exact))
    assert np.array_equal(got[np.isinf(exact)], exact[np.isinf(exact)])
    assert not np.isfinite(exact).all()


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("fp8", [False, True])
def test_the_order_of_threads_changes_no_bit(emulated: KernelLibrary, dtype: KernelDtype, fp8: bool) -> None:
    case = make_case(np.random.default_rng(3), dtype, (1, 19, 2), 19, 3, 72)
    if fp8:
        case.scales = np.array([0.01], np.float32)
    outputs = []
    for seed in (0, 0, 1, 2, 3, 4):
        emulated.set_emulation_seed(seed)
        outputs.append(run_temporal(emulated, case).tobytes())
    assert len(set(outputs)) == 1


# Spatial pre-processing


@pytest.mark.parametrize("seed", range(6))
def test_spatial_qkv_is_as_exact_as_its_type(emulated: KernelLibrary, seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    for number in range(20):
        dtype = list(TORCH)[rng.integers(3)]
        rows, positions, heads = (int(rng.integers(1, most)) for most in (4, 40, 9))
        case = make_case(rng, dtype, (rows, positions), positions, heads, int(rng.choice(HEAD_DIMS)))
        case.bias = None if rng.random() < 0.4 else case.bias
        case.query_scale = float(rng.choice((1.0, case.qkv.shape[-1] ** -0.5)))
        case.scales = rng.uniform(0.002, 0.02, 3).astype(np.float32) if rng.random() < 0.5 else None
        emulated.set_emulation_seed(int(rng.integers(2**32)))
        for name, got, exact in zip("qkv", run_spatial(emulated, case), exact_spatial(case), strict=True):
            # fp32 arithmetic of Dh terms, then one rounding of the result
            allowed = (case.qkv.shape[-1] * 2.0**-24 + ROUNDOFF[dtype]) * np.abs(exact).max() * np.ones_like(exact)
            if case.scales is not None:
                scale = float(case.scales["qkv".index(name)])
                exact = exact.clip(-448 * scale, 448 * scale)
                allowed = case.qkv.shape[-1] * 2.0**-24 * np.abs(exact).max() + rounding_of_fp8(exact, scale)
                got = got * scale
            assert (np.abs(got - exact) <= allowed * (1 + 1e-6)).all(), f"{name}, case {number}: {dtype.name}"


def test_values_pass_pre_processing_untouched(emulated: KernelLibrary) -> None:
    case = make_case(np.random.default_rng(5), KernelDtype.BFLOAT16, (2, 17), 17, 5, 72)
    case.bias = None
    assert np.array_equal(run_spatial(emulated, case)[2], exact_spatial(case)[2])


@pytest.mark.parametrize("matrix", [0, 1, 2])
def test_a_nan_stays_in_its_row_of_pre_processing(emulated: KernelLibrary, matrix: int) -> None:
    case = make_case(np.random.default_rng(6), KernelDtype.FLOAT16, (2, 17), 17, 3, 64)
    case.qkv[1, 16, matrix, 2, 9] = np.nan
    for got, exact in zip(run_spatial(emulated, case), exact_spatial(case), strict=True):
        assert np.array_equal(np.isnan(got), np.isnan(exact))


# The kernel of the quickly deployable plugin


@pytest.mark.parametrize("frames", [1, 20, 40, 64])
def test_the_ptx_kernel_gives_the_same_bits(emulated: KernelLibrary, frames: int) -> None:
    case = make_case(np.random.default_rng(frames), KernelDtype.BFLOAT16, (2, frames, 3), frames, 3, 72)
    expected = run_temporal(emulated, case)
    function = emulated._dll.stiv_emulation_ptx_kernel
    function.argtypes = emulated._dll.stiv_temporal_attention.argtypes[:1]
    original, emulated._dll.stiv_temporal_attention = (
        emulated._dll.stiv_temporal_attention,
        lambda call, stream: function(ctypes.byref(call)),
    )
    try:
        assert np.array_equal(run_temporal(emulated, case), expected)
    finally:
        emulated._dll.stiv_temporal_attention = original
