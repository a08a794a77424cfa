"""Fused modules where there is no GPU: what :func:`fuse` swaps, tracing, and the whole model."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stiv_deploy.runtime.errors import KernelError
from stiv_deploy.runtime.plugins.library import LIBRARY_VARIABLE
from stiv_deploy.stiv_ref.block import RopeTables, SelfAttention, StivBlock
from stiv_deploy.stiv_ref.config import CONFIGS, StivConfig
from stiv_deploy.stiv_ref.errors import AttentionError
from stiv_deploy.stiv_ref.fused.modules import FusedBlock, FusedSpatial, FusedTemporal, fuse
from stiv_deploy.stiv_ref.model import Stiv

ModelFactory = Callable[..., Stiv]


def both_forms(model: Stiv) -> tuple[Stiv, Stiv]:
    """``model`` as it is, and a fused copy."""
    return model, fuse(copy.deepcopy(model))


def kinds(model: nn.Module) -> set[type]:
    """Classes of the model's blocks and their attention."""
    return {type(each) for each in model.modules() if isinstance(each, SelfAttention | StivBlock)}


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
    return Flat(fuse(random_model(blocks=1)).blocks[0])


DIMENSIONS = {name: torch.export.Dim(name, min=1) for name in ("batch", "frames", "tokens")}


def exported(module: Flat, config: StivConfig) -> torch.export.ExportedProgram:
    batch, frames, tokens = ({0: dimension} for dimension in DIMENSIONS.values())
    x = {axis: dimension for axis, dimension in enumerate(DIMENSIONS.values())}
    dynamic = (x, batch, batch, batch, batch, (tokens, tokens, frames, frames))
    return torch.export.export(module, block_inputs(config, 2, 3, 5), dynamic_shapes=dynamic, strict=False)


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("stiv.")]


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_native_trace_has_none_of_our_operators(random_model: ModelFactory, small_config: StivConfig) -> None:
    assert targets(exported(Flat(random_model(blocks=1).blocks[0]), small_config)) == []


@pytest.mark.slow
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
def test_attention_of_another_form_keeps_it(random_model: ModelFactory, small_config: StivConfig, name: str) -> None:
    model = random_model(blocks=1)
    own = Uniform(small_config.width, small_config.heads).double().requires_grad_(False)
    setattr(model.blocks[0], name, own)
    native, fused = both_forms(model)
    assert Uniform in kinds(fused)
    assert kinds(fused) & {FusedSpatial, FusedTemporal} == ({FusedSpatial} if name == "temporal" else {FusedTemporal})
    inputs = block_inputs(small_config, 2, 3, 5)
    results = [Flat(each.blocks[0])(*inputs) for each in (native, fused)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_block_of_another_form_keeps_its_layout(random_model: ModelFactory, small_config: StivConfig) -> None:
    """A subclass may have an arithmetic of its own over frames, on the layout of the plain block."""

    class Reversed(StivBlock):
        def over_frames(self, x: Tensor, rope: RopeTables) -> Tensor:
            return super().over_frames(x.flip(1), rope)

    native, fused = random_model(blocks=1), random_model(blocks=1)
    for model in (native, fused):
        model.blocks[0].__class__ = Reversed
    assert kinds(fuse(fused)) == {Reversed, FusedSpatial, SelfAttention}
    inputs = block_inputs(small_config, 2, 3, 5)
    torch.testing.assert_close(*(Flat(each.blocks[0])(*inputs) for each in (native, fused)), rtol=1e-12, atol=1e-12)


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
    native, fused = (each(*inputs) for each in both_forms(model))
    inputs = [value.double() for value in inputs]
    exact, wide = (each(*inputs) for each in both_forms(model.double()))
    largest = exact.abs().max().item()
    assert error(wide, exact) <= 1e-11 * max(largest, 1)
    # Both round at the same places, but sum in other orders: neither may be much worse than the other.
    assert error(fused, exact) <= 2 * error(native, exact) + 2.0**-20 * largest


def test_the_shipped_model_is_the_same(checkpoint: Path) -> None:
    from stiv_deploy.stiv_ref.checkpoint import load_model

    model = load_model(checkpoint)
    inputs = model_inputs(model, 4, dtype=torch.float32)
    native, fused = (each(*inputs) for each in both_forms(model))
    exact = model.double()(*(value.double() for value in inputs))
    assert error(fused, exact) <= 2 * error(native, exact) + 2.0**-20 * exact.abs().max().item()


def test_fusing_is_in_place_touches_no_parameter_and_can_be_repeated(random_model: ModelFactory) -> None:
    model = random_model()
    before, inputs = dict(model.named_parameters()), model_inputs(model)
    assert kinds(model) == {StivBlock, SelfAttention}
    assert fuse(model) is model
    assert kinds(model) == {FusedBlock, FusedSpatial, FusedTemporal}
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    once = model(*inputs)
    assert torch.equal(fuse(model)(*inputs), once)


def test_image_models_have_attention_in_space_only(random_model: ModelFactory) -> None:
    assert kinds(fuse(random_model(temporal=False))) == {StivBlock, FusedSpatial}


def test_masked_training_wants_a_model_as_it_was(random_model: ModelFactory) -> None:
    model = fuse(random_model(full_blocks=1))
    with pytest.raises(AttentionError, match=r"masked training needs a model without fuse\(\)"):
        model(*model_inputs(model), keep=torch.tensor([[0, 2], [1, 3]]))


def test_training_with_fused_attention_is_refused(random_model: ModelFactory) -> None:
    model = fuse(random_model().requires_grad_(True))
    with pytest.raises(AttentionError, match="no backward pass"):
        model(*model_inputs(model)).sum().backward()


def test_mixed_types_are_refused(random_model: ModelFactory) -> None:
    """As autocast makes them: it casts the linear, not the norm behind it."""
    model = fuse(random_model().float())
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


def test_a_missing_library_is_told_at_once(on_gpu: ModelFactory) -> None:
    model = on_gpu()
    with pytest.raises(KernelError, match=r"missing.so, which is not a file; build it with `make plugins`.*by hand"):
        fuse(model)
    assert kinds(model) == {StivBlock, SelfAttention}


def test_a_missing_library_is_told_when_a_fused_model_is_fused_again(on_gpu: ModelFactory) -> None:
    """As one does that was moved to the GPU after it was fused on the CPU."""
    model = on_gpu()
    for block in model.blocks:
        block.spatial.__class__, block.temporal.__class__, block.__class__ = FusedSpatial, FusedTemporal, FusedBlock
    with pytest.raises(KernelError, match="make plugins"):
        fuse(model)


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (160, torch.float64, "GPU kernels for float32, float16 and bfloat16, not torch.float64"),
        (200, torch.float32, "GPU kernels for head sizes 32, 48, 64, 72, 96, 128, not 40"),
    ],
)
def test_a_model_without_kernels_is_told(on_gpu: ModelFactory, width: int, dtype: torch.dtype, message: str) -> None:
    model = on_gpu(width, dtype)
    with pytest.raises(AttentionError, match=rf"{message}.*without fuse\(\)"):
        fuse(model)
