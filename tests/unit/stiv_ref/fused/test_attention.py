"""Fused attention where there is no GPU: the operators' definition, what they refuse, tracing, and the whole model."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stiv_deploy.runtime.plugins.library import LIBRARY_VARIABLE, KernelError
from stiv_deploy.stiv_ref.block import RopeTables, SelfAttention, StivBlock
from stiv_deploy.stiv_ref.config import CONFIGS, StivConfig
from stiv_deploy.stiv_ref.errors import AttentionError
from stiv_deploy.stiv_ref.fused.attention import spatial_qkv, temporal_attention
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, sample
from stiv_deploy.stiv_ref.text import TextStates

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
    with pytest.raises(AttentionError, match=r"no backward pass: train with set_attention\('native'\)"):
        loss.backward()


# A block


class Flat(nn.Module):
    """A block with its tables as arguments of their own."""

    def __init__(self, block: StivBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, modulation: Tensor, k: Tensor, v: Tensor, mask: Tensor, *tables: Tensor) -> Tensor:
        return self.block(x, modulation, k, v, mask, RopeTables(*tables))


def block_inputs(config: StivConfig, batch: int, frames: int, tokens: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    half, text = config.head_dim // 2, (batch, config.heads, 7, config.head_dim)
    shapes = [(batch, frames, tokens, config.width), (batch, 6, config.width), text, text, (batch, 1, 1, 7)]
    shapes += [(tokens, half), (tokens, half), (frames, half), (frames, half)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.fixture
def block(random_model: ModelFactory) -> Flat:
    return Flat(random_model(blocks=1).set_attention("fused").blocks[0])


DIMENSIONS = {name: torch.export.Dim(name, min=1) for name in ("batch", "frames", "tokens")}


def exported(module: Flat, config: StivConfig) -> torch.export.ExportedProgram:
    batch, frames, tokens = ({0: dimension} for dimension in DIMENSIONS.values())
    x = {axis: dimension for axis, dimension in enumerate(DIMENSIONS.values())}
    dynamic = (x, batch, batch, batch, batch, (tokens, tokens, frames, frames))
    return torch.export.export(module, block_inputs(config, 2, 3, 5), dynamic_shapes=dynamic, strict=False)


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("stiv.")]


@pytest.mark.parametrize("frozen", [False, True])
def test_export_of_any_size(block: Flat, small_config: StivConfig, frozen: bool) -> None:
    block.requires_grad_(not frozen)
    program = exported(block, small_config)
    assert targets(program) == ["stiv.spatial_qkv.default", "stiv.temporal_attention.default"]
    assert targets(program.run_decompositions()) == targets(program)
    for sizes in ((1, 1, 1), (1, 4, 7), (3, 70, 2)):
        inputs = block_inputs(small_config, *sizes, seed=1)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(*inputs), block(*inputs), rtol=1e-12, atol=1e-12)


def test_the_native_trace_has_none_of_our_operators(block: Flat, small_config: StivConfig) -> None:
    block.block.set_attention("native")
    assert targets(exported(block, small_config)) == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_sees_through(block: Flat, small_config: StivConfig, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sizes in ((2, 3, 5), (1, 4, 7)):
        inputs = block_inputs(small_config, *sizes)
        torch.testing.assert_close(compiled(*inputs), block(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_the_compiler_of_torch_keeps_the_layout(block: Flat, small_config: StivConfig) -> None:
    """Inductor may pad and reorder what it makes itself; the kernels want packed tensors, and would refuse others."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler: g++ was not found")
    torch._dynamo.reset()
    inputs = block_inputs(small_config, 2, 3, 5)
    got = torch.compile(block, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, block(*inputs), rtol=1e-12, atol=1e-12)


def test_an_input_of_other_strides(block: Flat, small_config: StivConfig) -> None:
    x, *rest = block_inputs(small_config, 2, 3, 5)
    other = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not other.is_contiguous()
    torch.testing.assert_close(block(other, *rest), block(x, *rest), rtol=1e-12, atol=1e-12)


class Uniform(SelfAttention):
    """Attention of a form of its own: values of all rows, averaged."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, width = x.shape
        return self.out(self.qkv(x)[..., 2 * width :].mean(1, keepdim=True).expand(rows, length, width))


@pytest.mark.parametrize("name", ["spatial", "temporal"])
def test_attention_of_another_form_keeps_it(block: Flat, small_config: StivConfig, name: str) -> None:
    own = Uniform(small_config.width, small_config.heads).double().requires_grad_(False)
    setattr(block.block, name, own)
    inputs = block_inputs(small_config, 2, 3, 5)
    results = [block.block.set_attention(form) and block(*inputs) for form in ("native", "fused")]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


# The model


def model_inputs(model: Stiv, frames: int = 3, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator, config = torch.Generator().manual_seed(1), model.config
    shapes = ((batch, frames, config.latent_channels, 4, 6), (batch,), (batch, 6), (batch, 5, config.text_width))
    latents, time, micro, states = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    mask = torch.ones(batch, 5, dtype=torch.int64)
    return [latents, time.sigmoid(), micro, states, mask, states.mean(1)]


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


@settings(max_examples=25)
@given(
    head_dim=st.sampled_from((4, 8, 12, 32, 72)),
    heads=st.integers(1, 3),
    frames=st.sampled_from((1, 2, 3, 5, 66)),
    temporal=st.booleans(),
)
def test_the_fused_model_is_the_native_one(head_dim: int, heads: int, frames: int, temporal: bool) -> None:
    sizes = {"width": head_dim * heads, "heads": heads, "text_width": 4, "frequency_width": 4}
    config = StivConfig(name="x", blocks=2, temporal=temporal, **sizes)
    model, generator = Stiv(config).requires_grad_(False), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.3, generator=generator)
    inputs = model_inputs(model, frames if temporal else 1, batch=1, dtype=torch.float32)
    native, fused = (model.set_attention(form)(*inputs) for form in ("native", "fused"))
    model, inputs = model.double(), [value.double() for value in inputs]
    exact, wide = (model.set_attention(form)(*inputs) for form in ("native", "fused"))
    largest = exact.abs().max().item()
    assert error(wide, exact) <= 1e-11 * max(largest, 1)
    # Both round at the same places, but sum in other orders: neither may be much worse than the other.
    assert error(fused, exact) <= 2 * error(native, exact) + 2.0**-20 * largest


def test_the_shipped_model_is_the_same(checkpoint: Path) -> None:
    from stiv_deploy.stiv_ref.checkpoint import load_model

    model = load_model(checkpoint)
    inputs = model_inputs(model, 4, dtype=torch.float32)
    native, fused = (model.set_attention(form)(*inputs) for form in ("native", "fused"))
    exact = model.set_attention("native").double()(*(value.double() for value in inputs))
    assert error(fused, exact) <= 2 * error(native, exact) + 2.0**-20 * exact.abs().max().item()


def test_the_switch_can_be_turned_back_and_touches_no_parameter(random_model: ModelFactory) -> None:
    model = random_model()
    inputs, names = model_inputs(model), list(model.state_dict())
    native = model(*inputs)
    fused = model.set_attention("fused")
    assert fused is model
    assert {module.attention for module in model.modules() if isinstance(module, SelfAttention)} == {"fused"}
    assert list(model.state_dict()) == names
    assert torch.equal(model.set_attention("native")(*inputs), native)


@pytest.mark.parametrize("name", ["", "flash", "Fused"])
def test_an_unknown_form_is_refused(random_model: ModelFactory, name: str) -> None:
    model = random_model()
    with pytest.raises(AttentionError, match=f"no attention named '{name}'; there are: native, fused"):
        model.set_attention(name)  # type: ignore[arg-type]
    assert {module.attention for module in model.modules() if isinstance(module, SelfAttention)} == {"native"}


def test_masked_training_wants_native_attention(random_model: ModelFactory) -> None:
    model = random_model(full_blocks=1).set_attention("fused")
    with pytest.raises(AttentionError, match=r"masked training needs set_attention\('native'\)"):
        model(*model_inputs(model), keep=torch.tensor([[0, 2], [1, 3]]))


def test_training_with_fused_attention_is_refused(random_model: ModelFactory) -> None:
    model = random_model().requires_grad_(True).set_attention("fused")
    with pytest.raises(AttentionError, match="no backward pass"):
        model(*model_inputs(model)).sum().backward()


def test_mixed_types_are_refused(random_model: ModelFactory) -> None:
    """As autocast makes them: it casts the linear, not the norm behind it."""
    model = random_model().float().set_attention("fused")
    inputs = model_inputs(model, dtype=torch.float32)
    wanted = pytest.raises(AttentionError, match="q_gamma is torch.float32 on cpu, it wants torch.bfloat16")
    with wanted, torch.autocast("cpu", torch.bfloat16):
        model(*inputs)


# A model on a GPU that is not there


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelFactory]:
    """Models of fake CUDA tensors, and a kernel library that is missing."""
    from stiv_deploy.stiv_ref.fused.launch import cuda_library

    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "missing.so"))
    cuda_library.cache_clear()

    def build(width: int = 160, dtype: torch.dtype = torch.float32) -> Stiv:
        with torch.device("meta"):
            model = Stiv(CONFIGS["tiny"].model_copy(update={"width": width})).requires_grad_(False)
        state = {name: torch.empty(x.shape, dtype=dtype, device="cuda") for name, x in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        return model

    with FakeTensorMode():
        yield build
    cuda_library.cache_clear()


def test_a_missing_library_is_told_when_the_form_is_chosen(on_gpu: ModelFactory) -> None:
    model = on_gpu()
    with pytest.raises(KernelError, match=r"missing.so, which is not a file; build it with `make plugins`.*by hand"):
        model.set_attention("fused")
    assert {module.attention for module in model.modules() if isinstance(module, SelfAttention)} == {"native"}


def test_a_missing_library_is_told_before_the_first_step(on_gpu: ModelFactory) -> None:
    """The model may have been moved to the GPU after its form was chosen."""
    model = on_gpu()
    for block in model.blocks:
        block.set_attention("fused")
    text = TextStates(torch.empty(1, 4, 96), torch.empty(1, 4), torch.empty(1, 96))
    noise, mask = torch.empty(1, 3, 4, 8, 8), torch.empty(1, 3, dtype=torch.bool)
    inputs = SamplingInputs(noise, noise, mask, text, text, torch.empty(1, 6))
    worked: list[nn.Module] = []
    model.text_in.register_forward_hook(lambda module, *_: worked.append(module))
    with pytest.raises(KernelError, match="make plugins"):
        sample(model, inputs, SamplingSettings(steps=2, guidance_mode=GuidanceMode.JIT))
    assert worked == []


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (160, torch.float64, "GPU kernels for float32, float16 and bfloat16, not torch.float64"),
        (200, torch.float32, "GPU kernels for head sizes 32, 48, 64, 72, 96, 128, not 40"),
    ],
)
def test_a_model_without_kernels_is_told(on_gpu: ModelFactory, width: int, dtype: torch.dtype, message: str) -> None:
    model = on_gpu(width, dtype)
    with pytest.raises(AttentionError, match=rf"{message}.*set_attention\('native'\)"):
        model.set_attention("fused")


def test_native_attention_asks_for_nothing(on_gpu: ModelFactory) -> None:
    on_gpu().set_attention("native").check_attention()
