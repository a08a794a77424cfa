"""PyTorch's way into the kernels, on CPU tensors by the emulated library, and the operators' definition, in fp64 numpy.

The kernels themselves are tested in ``test_kernels.py``; here it is which tensor goes where, and what is refused.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stiv_deploy.runtime.errors import KernelError
from stiv_deploy.runtime.plugins.library import LIBRARY_VARIABLE, KernelLibrary, SpatialQkv, TemporalAttention
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.errors import AttentionError
from stiv_deploy.stiv_ref.fused import operators
from stiv_deploy.stiv_ref.fused.launch import cuda_library, launch_spatial, launch_temporal
from stiv_deploy.stiv_ref.fused.modules import fuse
from stiv_deploy.stiv_ref.fused.operators import (
    spatial_qkv,
    spatial_qkv_on_gpu,
    temporal_attention,
    temporal_attention_on_gpu,
)
from stiv_deploy.stiv_ref.model import Stiv

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
HEAD_DIMS = (32, 48, 64, 72, 96, 128)


@dataclass(frozen=True)
class Case:
    """Arguments of both operators; ``qkv`` [B, T, S, 3*H*Dh], or [N, S, 3*H*Dh]."""

    qkv: Tensor
    bias: Tensor | None
    q_gamma: Tensor
    k_gamma: Tensor
    cos: Tensor
    sin: Tensor
    heads: int
    epsilon: float = 1e-6

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        return self.qkv, self.bias, self.q_gamma, self.k_gamma, self.cos, self.sin

    @property
    def arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def make_case(
    leading: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype, *, bias: bool = True, seed: int = 0
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    angles = 6.28 * torch.rand(leading[1], head_dim // 2, generator=generator)
    gammas = (0.5 + torch.rand(2, head_dim, generator=generator)).to(dtype)
    qkv, shift = normal(*leading, 3 * heads * head_dim), normal(3 * heads * head_dim) if bias else None
    return Case(qkv, shift, *gammas.unbind(), angles.cos().to(dtype), angles.sin().to(dtype), heads)


# fp64 oracle


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def normed(x: np.ndarray, gamma: Tensor, cos: np.ndarray, sin: np.ndarray, epsilon: float) -> np.ndarray:
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * wide(gamma)
    first, second = np.split(y, 2, -1)
    return np.concatenate((first * cos - second * sin, first * sin + second * cos), -1)


def exact_qkv(case: Case) -> list[np.ndarray]:
    """q, k (normed and rotated) and v, [..., M, S or nothing, H, Dh]; tables belong to the second axis."""
    x = wide(case.qkv) + (0 if case.bias is None else wide(case.bias))
    x = x.reshape(*x.shape[:-1], 3, case.heads, -1)
    q, k, v = (x[..., index, :, :] for index in range(3))
    between = (1,) * (q.ndim - 3)
    cos, sin = (wide(table).reshape(len(table), *between, -1) for table in (case.cos, case.sin))
    return [normed(q, case.q_gamma, cos, sin, case.epsilon), normed(k, case.k_gamma, cos, sin, case.epsilon), v]


def exact_logits(case: Case) -> np.ndarray:
    q, k, _ = exact_qkv(case)  # [B, T, S, H, Dh]
    return np.einsum("btshd,bushd->bshtu", q, k) / np.sqrt(q.shape[-1])


def exact_temporal(case: Case) -> np.ndarray:
    logits, v = exact_logits(case), exact_qkv(case)[2]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    y = np.einsum("bshtu,bushd->btshd", weights / weights.sum(-1, keepdims=True), v)
    return y.reshape(*y.shape[:3], -1)


def exact_spatial(case: Case, query_scale: float) -> list[np.ndarray]:
    q, k, v = exact_qkv(case)  # [N, S, H, Dh]
    return [y.transpose(0, 2, 1, 3) for y in (q * query_scale, k, v)]


def allowed(plain: Tensor, exact: np.ndarray) -> float:
    """Twice what plain torch of the same type loses, and a rounding of the largest output."""
    lost, largest = np.abs(wide(plain) - exact).max(), np.abs(exact).max()
    return float(2 * lost + (2 * ROUNDOFF[plain.dtype] + 1e-7) * largest)


def allowed_temporal(case: Case, exact: np.ndarray) -> float:
    """With one fp32 rounding of the largest logit: weights change by as much, results by that of two largest values.

    What plain torch happens to lose on a few numbers is no bound on that.
    """
    logit, value = np.abs(exact_logits(case)).max(), np.abs(exact_qkv(case)[2]).max()
    return allowed(temporal_attention(**case.arguments), exact) + float(2 * 2.0**-24 * logit * value)


def fp8_rounding(exact: np.ndarray, scale: float) -> np.ndarray:
    """Half a unit in the last place of E4M3 at ``exact / scale``, in units of ``exact``."""
    return scale * np.maximum(np.abs(exact / scale) * 2.0**-4, 2.0**-10) * (1 + 1e-6)


def check(got: Tensor, exact: np.ndarray, slack: float, scale: Tensor | None) -> None:
    """``got`` is ``exact`` within ``slack``, and in FP8 within its rounding too."""
    if scale is None:
        assert np.abs(wide(got) - exact).max() <= slack
        return
    assert got.dtype == torch.float8_e4m3fn
    s = float(scale)
    clipped = exact.clip(-448 * s, 448 * s)
    assert (np.abs(wide(got) * s - clipped) <= (1 + 2.0**-4) * slack + fp8_rounding(clipped, s)).all()


# Launches and definitions

sizes = {
    "heads": st.integers(1, 3),
    "head_dim": st.sampled_from(HEAD_DIMS),
    "dtype": st.sampled_from(tuple(ROUNDOFF)),
    "bias": st.booleans(),
    "epsilon": st.sampled_from((1e-6, 0.5)),
    "seed": st.integers(0, 2**16),
}
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@example(  # plain torch is lucky here
    batch=1,
    frames=10,
    tokens=1,
    scaled=False,
    heads=1,
    head_dim=96,
    dtype=torch.float32,
    bias=False,
    epsilon=1e-6,
    seed=590,
)
@given(batch=st.integers(1, 2), frames=st.integers(1, 20), tokens=st.integers(1, 3), scaled=st.booleans(), **sizes)
def test_temporal_attention(
    emulated: KernelLibrary,
    batch: int,
    frames: int,
    tokens: int,
    scaled: bool,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    bias: bool,
    epsilon: float,
    seed: int,
) -> None:
    case = make_case((batch, frames, tokens), heads, head_dim, dtype, bias=bias, seed=seed)
    case = replace(case, epsilon=epsilon)
    exact = exact_temporal(case)
    slack = allowed_temporal(case, exact)
    scale = torch.tensor(np.abs(exact).max() / 300, dtype=torch.float32) if scaled else None
    got = launch_temporal(emulated, case.tensors, heads, epsilon, scale)
    check(got, exact, slack, scale)
    check(temporal_attention(**case.arguments, output_scale=scale), exact, slack, scale)
    assert got.is_contiguous()
    assert temporal_attention(**case.arguments).dtype == dtype


@relaxed
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 20),
    scaled=st.booleans(),
    query_scale=st.sampled_from((1.0, 0.3)),
    **sizes,
)
def test_spatial_qkv(
    emulated: KernelLibrary,
    rows: int,
    tokens: int,
    scaled: bool,
    query_scale: float,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    bias: bool,
    epsilon: float,
    seed: int,
) -> None:
    case = replace(make_case((rows, tokens), heads, head_dim, dtype, bias=bias, seed=seed), epsilon=epsilon)
    exact = exact_spatial(case, query_scale)
    plain = spatial_qkv(**case.arguments, query_scale=query_scale)
    values = [torch.tensor(np.abs(y).max() / 300, dtype=torch.float32) for y in exact]
    scales = tuple(values) if scaled else (None, None, None)
    got = launch_spatial(emulated, case.tensors, heads, epsilon, query_scale, scales)
    defined = spatial_qkv(*case.tensors, heads, epsilon, query_scale, *scales)
    for index, scale in enumerate(scales):
        slack = allowed(plain[index], exact[index])
        check(got[index], exact[index], slack, scale)
        check(defined[index], exact[index], slack, scale)
        assert got[index].is_contiguous()


def test_parameters_may_be_slices(emulated: KernelLibrary) -> None:
    """As those of a fused or sharded state are: not contiguous, or at any address."""
    case = make_case((1, 5, 3), 2, 32, torch.float16)
    assert case.bias is not None
    cos = torch.stack((case.cos, case.sin), -1)  # interleaved
    moved = torch.cat((case.bias[:1], case.bias))[1:]
    assert moved.data_ptr() % 16 == 2
    sliced = replace(case, bias=moved, cos=cos[..., 0], sin=cos[..., 1])
    expected = launch_temporal(emulated, case.tensors, 2, 1e-6, None)
    assert torch.equal(launch_temporal(emulated, sliced.tensors, 2, 1e-6, None), expected)


@pytest.mark.parametrize("axis", [0, 2])
def test_nothing_to_do(emulated: KernelLibrary, axis: int) -> None:
    leading = [2, 3, 4]
    leading[axis] = 0
    case = make_case(tuple(leading), 2, 32, torch.bfloat16)
    assert launch_temporal(emulated, case.tensors, 2, 1e-6, None).shape == (*leading, 64)
    qkv = case.qkv.flatten(0, 1)
    case = replace(make_case((1, qkv.shape[1]), 2, 32, torch.bfloat16), qkv=qkv)
    for out in launch_spatial(emulated, case.tensors, 2, 1e-6, 1.0, (None, None, None)):
        assert out.shape == (qkv.shape[0], 2, qkv.shape[1], 32)


# What runs for GPU tensors, here for CPU tensors


class Gpu:
    """Stands in for the device: which one was chosen, and the streams that work was put on."""

    def __init__(self, library: KernelLibrary) -> None:
        self.library = library
        self.devices: list[torch.device] = []
        self.inside = False
        self.streams: list[int] = []

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.devices.append(device)
        self.inside = True
        yield
        self.inside = False

    def stream(self) -> int:
        assert self.inside, "streams are of the tensors' device"
        return 77

    def temporal_attention(self, call: TemporalAttention, stream: int) -> None:
        self.streams.append(stream)
        self.library.temporal_attention(call)

    def spatial_qkv(self, call: SpatialQkv, stream: int) -> None:
        self.streams.append(stream)
        self.library.spatial_qkv(call)


@pytest.fixture
def gpu(emulated: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A device whose kernels are the emulated ones."""
    gpu = Gpu(emulated)
    monkeypatch.setattr(torch.cuda, "device", gpu.device)
    monkeypatch.setattr(operators, "cuda_library", lambda: gpu)
    monkeypatch.setattr(operators, "current_stream", gpu.stream)
    return gpu


def test_operators_on_a_gpu(gpu: Gpu) -> None:
    case, scale = make_case((2, 5, 3), 2, 48, torch.float16), torch.tensor(0.02)
    exact = exact_temporal(case)
    slack = allowed_temporal(case, exact)
    check(temporal_attention_on_gpu(**case.arguments), exact, slack, None)
    check(temporal_attention_on_gpu(**case.arguments, output_scale=scale), exact, slack, scale)
    case = replace(make_case((4, 5), 2, 48, torch.float16), epsilon=0.5)
    plain, scales = spatial_qkv(**case.arguments, query_scale=0.3), [torch.tensor(0.01 + 0.01 * i) for i in range(3)]
    narrow = dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True))
    wide = spatial_qkv_on_gpu(**case.arguments, query_scale=0.3)
    eights = spatial_qkv_on_gpu(**case.arguments, query_scale=0.3, **narrow)
    for index, part in enumerate(exact_spatial(case, 0.3)):
        check(wide[index], part, allowed(plain[index], part), None)
        check(eights[index], part, allowed(plain[index], part), scales[index])
    assert gpu.devices == [torch.device("cpu")] * 4
    assert gpu.streams == [77] * 4


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("frames", [3, 20])
def test_a_model_on_a_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, frames: int) -> None:
    """The whole model through the kernels: every layout, table and parameter is where the model means it to be."""
    monkeypatch.setattr(operators, "temporal_attention", temporal_attention_on_gpu)
    monkeypatch.setattr(operators, "spatial_qkv", spatial_qkv_on_gpu)
    config = StivConfig(name="x", blocks=2, width=64, heads=2, text_width=4, frequency_width=4)
    model, generator = Stiv(config).requires_grad_(False), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.2, generator=generator)
    shapes = ((2, frames, 4, 4, 6), (2,), (2, 6), (2, 5, 4))
    latents, time, micro, states = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    inputs = [latents, time.sigmoid(), micro, states, torch.ones(2, 5), states.mean(1)]
    model.to(dtype)
    native, fused = (each(*inputs).double() for each in (model, fuse(copy.deepcopy(model))))
    assert len(gpu.streams) == 4
    exact = model.double()(*(value.double() for value in inputs))
    # Two blocks add the roundings of a dozen operators; each form may have the better luck with some of them.
    slack = 2 * (native - exact).abs().max() + 8 * ROUNDOFF[dtype] * exact.abs().max()
    assert (fused - exact).abs().max() <= slack


def test_what_does_not_fit_is_refused_before_a_gpu_is_touched(gpu: Gpu) -> None:
    case = make_case((2, 5, 3), 2, 48, torch.float16)
    with pytest.raises(AttentionError, match="cos has shape"):
        temporal_attention_on_gpu(**replace(case, cos=case.cos[1:]).arguments)
    case = make_case((4, 5), 2, 48, torch.float16)
    with pytest.raises(AttentionError, match="cos has shape"):
        spatial_qkv_on_gpu(**replace(case, cos=case.cos[1:]).arguments)
    assert gpu.devices == []


# What is refused


def launch_both(library: KernelLibrary, case: Case) -> None:
    """Temporal attention or pre-processing, by the rank of qkv."""
    if case.qkv.dim() == 4:
        launch_temporal(library, case.tensors, case.heads, case.epsilon, None)
    else:
        launch_spatial(library, case.tensors, case.heads, case.epsilon, 1.0, (None, None, None))


@pytest.mark.parametrize("leading", [(1, 3, 2), (3, 2)])
def test_heads_without_a_kernel_are_refused(emulated: KernelLibrary, leading: tuple[int, ...]) -> None:
    with pytest.raises(
        AttentionError, match=r"head sizes 32, 48, 64, 72, 96, 128, not 40; use the model without fuse\("
    ):
        launch_both(emulated, make_case(leading, 2, 40, torch.float32))


@pytest.mark.parametrize("leading", [(1, 3, 2), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_types_without_a_kernel_are_refused(
    emulated: KernelLibrary, leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    with pytest.raises(AttentionError, match=f"float32, float16 and bfloat16, not {dtype}; cast the model"):
        launch_both(emulated, make_case(leading, 2, 32, dtype))


@pytest.mark.parametrize("leading", [(1, 3, 2), (3, 2)])
def test_a_misaligned_qkv_is_refused(emulated: KernelLibrary, leading: tuple[int, ...]) -> None:
    case = make_case(leading, 2, 32, torch.bfloat16)
    moved = torch.cat((torch.zeros(3).bfloat16(), case.qkv.flatten()))[3:].view_as(case.qkv)
    assert moved.is_contiguous()
    with pytest.raises(AttentionError, match=r"no multiple of 16 bytes \(storage offset 3\); .* \.clone\(\)"):
        launch_both(emulated, replace(case, qkv=moved))


def test_too_many_frames_are_refused(emulated: KernelLibrary) -> None:
    launch_both(emulated, make_case((1, 64, 1), 1, 32, torch.bfloat16))
    with pytest.raises(AttentionError, match=r"up to 64 token frames, qkv \[1, 65, 1, 96\] has 65; give a shorter"):
        launch_both(emulated, make_case((1, 65, 1), 1, 32, torch.bfloat16))


def test_what_only_the_library_knows_is_its_error(emulated: KernelLibrary) -> None:
    with pytest.raises(KernelError, match="epsilon must be finite"):
        launch_both(emulated, replace(make_case((1, 3, 2), 2, 32, torch.float32), epsilon=-1.0))
    case, scale = make_case((1, 3, 2), 2, 32, torch.float32), torch.tensor(1.0)
    with pytest.raises(KernelError, match="epsilon must be finite"):
        launch_temporal(emulated, case.tensors, 2, float("nan"), scale)


@pytest.fixture
def _forgetful() -> Iterator[None]:
    cuda_library.cache_clear()
    yield
    cuda_library.cache_clear()


@pytest.mark.usefixtures("_forgetful")
def test_the_emulated_library_is_not_for_gpu_tensors(emulated: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read their addresses as its own memory."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(emulated.path))
    with pytest.raises(AttentionError, match=r"emulated kernel library, which cannot read GPU memory.*make plugins"):
        cuda_library()


@pytest.mark.usefixtures("_forgetful")
def test_the_library_may_come_later(emulated: KernelLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A failure is not remembered, a library is: it is opened once a process."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(KernelError, match="make plugins"):
        cuda_library()
    monkeypatch.setattr(KernelLibrary, "backend", "cuda")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(emulated.path))
    assert cuda_library() is cuda_library()
