"""The fused operators where there is no GPU: their definition, and what they refuse."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stiv_deploy.stiv_ref.errors import AttentionError
from stiv_deploy.stiv_ref.fused.operators import spatial_qkv, temporal_attention
from stiv_deploy.stiv_ref.model import Stiv

ModelFactory = Callable[..., Stiv]
OPERATORS = {"temporal": temporal_attention, "spatial": spatial_qkv}


def arguments(
    kind: str = "temporal",
    *,
    leading: tuple[int, ...] | None = None,
    heads: int = 2,
    head_dim: int = 6,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Random arguments of an operator, by name; ``leading`` is [B, T, S] or [N, S]."""
    leading = leading or {"temporal": (2, 3, 5), "spatial": (4, 5)}[kind]
    generator, length = torch.Generator().manual_seed(0), leading[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "qkv": normal(*leading, 3 * heads * head_dim),
        "bias": normal(3 * heads * head_dim) if bias else None,
        "q_gamma": normal(head_dim),
        "k_gamma": normal(head_dim),
        "cos": normal(length, head_dim // 2),
        "sin": normal(length, head_dim // 2),
        "heads": heads,
    }


# The operators


@pytest.mark.parametrize(
    ("kind", "changes", "extra"),
    [
        ("temporal", {}, {}),
        ("temporal", {"bias": False, "leading": (1, 1, 1), "heads": 1}, {}),
        ("temporal", {"bias": False}, {"output_scale": torch.tensor(0.01)}),
        ("temporal", {"leading": (1, 70, 2), "head_dim": 40, "dtype": torch.float64}, {"epsilon": 1e-3}),
        ("spatial", {}, {"query_scale": 0.3}),
        ("spatial", {"bias": False, "leading": (1, 1), "heads": 1}, {}),
        ("spatial", {}, {f"{name}_scale": torch.tensor(0.01) for name in "qkv"}),
    ],
)
def test_operators_keep_the_rules_of_torch(kind: str, changes: dict[str, Any], extra: dict[str, Any]) -> None:
    """Schema, aliasing, fake kernels, autograd registration and functional tracing."""
    given = arguments(kind, **changes) | extra
    torch.library.opcheck(OPERATORS[kind], tuple(given.values())[:7], {name: given[name] for name in extra})


def fp8(values: Tensor, scale: float) -> np.ndarray:
    """What is to come out, by ml_dtypes."""
    scaled = (values.double().numpy() / scale).clip(-448, 448)
    return scaled.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


@pytest.mark.parametrize("scale", [0.5, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8_is_rounded_once_to_nearest_even_and_saturated(dtype: torch.dtype, scale: float) -> None:
    """One frame passes its values. At scale 0.5: ties, the ends of E4M3, what is not finite, and any others."""
    values = torch.tensor([0.0, 0.53125, 0.59375, 224, 232, 1000, -1000, torch.inf, -torch.inf, torch.nan, 2**-11, 3.3])
    given = arguments(leading=(1, 1, 1), heads=1, head_dim=2000, bias=False)
    given["qkv"][..., -len(values) :] = values
    given = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in given.items()}
    got = temporal_attention(**given, output_scale=torch.tensor(scale))
    assert got.dtype == torch.float8_e4m3fn
    expected = fp8(given["qkv"][0, 0, 0, -2000:], float(np.float32(scale)))
    np.testing.assert_array_equal(got.double().numpy().ravel(), expected)


def test_each_output_of_pre_processing_has_its_scale() -> None:
    given, scales = arguments("spatial", dtype=torch.float64), (0.01, 0.02, 0.03)
    exact = spatial_qkv(**given)
    named = {f"{name}_scale": torch.tensor(scale) for name, scale in zip("qkv", scales, strict=True)}
    for got, wide, scale in zip(spatial_qkv(**given, **named), exact, scales, strict=True):
        np.testing.assert_array_equal(got.double().numpy(), fp8(wide, float(np.float32(scale))))


def test_the_query_scale_is_for_the_query() -> None:
    given = arguments("spatial", dtype=torch.float64)
    q, k, v = spatial_qkv(**given)
    scaled = spatial_qkv(**given, query_scale=0.25)
    assert torch.equal(scaled[0], 0.25 * q)
    assert torch.equal(scaled[1], k)
    assert torch.equal(scaled[2], v)


def test_outputs_share_no_memory_with_inputs() -> None:
    given = arguments("spatial", leading=(1, 1), heads=1, bias=False)
    for out in spatial_qkv(**given):
        assert out.untyped_storage().data_ptr() != given["qkv"].untyped_storage().data_ptr()


MISFITS: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (lambda a: {"qkv": a["qkv"][0]}, r"qkv has shape .*, it wants \["),
    (lambda a: {"qkv": a["qkv"].long()}, r"qkv is torch.int64, it wants floating-point"),
    (lambda a: {"heads": 5}, r"is not 3 \* 5 heads of an even size"),
    (lambda a: {"heads": 4}, r"is not 3 \* 4 heads of an even size"),
    (lambda a: {"heads": 0}, r"is not 3 \* 0 heads"),
    (lambda a: {"qkv": a["qkv"].transpose(0, 1).contiguous().transpose(0, 1)}, "not contiguous"),
    (lambda a: {"bias": a["bias"][:-1]}, r"bias has shape \[35\], .* with 2 heads wants \[36\]"),
    (lambda a: {"q_gamma": a["q_gamma"][:4]}, r"q_gamma has shape \[4\], .* wants \[6\]"),
    (lambda a: {"k_gamma": a["k_gamma"][None]}, r"k_gamma has shape \[1, 6\], .* wants \[6\]"),
    (lambda a: {"cos": a["cos"][:-1]}, r"cos has shape \[\d, 3\], .* wants \[\d, 3\]"),
    (lambda a: {"sin": a["sin"].repeat(1, 2)}, r"sin has shape \[\d, 6\], .* wants \[\d, 3\]"),
    (lambda a: {"bias": a["bias"].half()}, r"bias is torch.float16 on cpu, it wants torch.float32 on cpu"),
    (lambda a: {"sin": a["sin"].bfloat16()}, r"sin is torch.bfloat16 on cpu, it wants torch.float32"),
    (lambda a: {"cos": a["cos"].to("meta")}, r"cos is torch.float32 on meta, it wants torch.float32 on cpu"),
]
SCALES: list[tuple[str, dict[str, Any], str]] = [
    ("temporal", {"output_scale": torch.ones(1)}, r"a scale has shape \[1\]"),
    (
        "temporal",
        {"output_scale": torch.tensor(1.0).half()},
        r"a scale is torch.float16 on cpu, it wants torch.float32",
    ),
    ("spatial", {"q_scale": torch.tensor(1.0)}, "1 of the scales of q, k and v given; give all three, or none"),
    ("spatial", {"q_scale": torch.tensor(1.0), "v_scale": torch.tensor(1.0)}, "2 of the scales"),
    ("spatial", {f"{name}_scale": torch.ones(2) for name in "qkv"}, r"a scale has shape \[2\]"),
]
REFUSED = [(kind, change, message) for kind in OPERATORS for change, message in MISFITS]
REFUSED += [(kind, lambda a, extra=extra: extra, message) for kind, extra, message in SCALES]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("kind", "change", "message"), REFUSED)
def test_what_does_not_fit_is_refused(
    kind: str, change: Callable[[dict[str, Any]], dict[str, Any]], message: str, traced: bool
) -> None:
    """In one line, at run time and at tracing alike."""
    given = arguments(kind)
    given |= change(given)
    if traced:
        mode = FakeTensorMode()
        given = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in given.items()}
    with pytest.raises(AttentionError, match=message) as caught:
        OPERATORS[kind](**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", OPERATORS)
def test_there_is_no_backward(kind: str) -> None:
    given = arguments(kind)
    given["qkv"].requires_grad_(True)
    out = OPERATORS[kind](**given)
    loss = (out if kind == "temporal" else out[2]).sum()
    with pytest.raises(AttentionError, match=r"no backward pass: train a model without fuse\(\)"):
        loss.backward()
