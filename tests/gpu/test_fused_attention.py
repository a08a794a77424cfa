"""Fused attention on a real GPU: the operators and the model, with torch and the kernel library alone.

Wants a torch that was built for CUDA, and `make plugins`.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stiv_deploy.runtime.errors import KernelError
from stiv_deploy.stiv_ref.block import RopeTables, StivBlock
from stiv_deploy.stiv_ref.checkpoint import load_checkpoint
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.errors import AttentionError
from stiv_deploy.stiv_ref.fused.launch import cuda_library
from stiv_deploy.stiv_ref.fused.modules import fuse
from stiv_deploy.stiv_ref.fused.operators import spatial_qkv, temporal_attention
from stiv_deploy.stiv_ref.generation import sampling_inputs
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.rope import rotate
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, sample
from stiv_deploy.stiv_ref.text import TextStates

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
CONFIG = StivConfig(name="x", blocks=2, width=288, heads=4, text_width=32, frequency_width=32)  # Dh 72, no power of 2


@pytest.fixture(scope="module", autouse=True)
def _ready() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    try:
        cuda_library()
    except KernelError as error:
        pytest.skip(str(error))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # float32 is to mean float32, in what we compare with
    yield
    torch.set_float32_matmul_precision(precision)


def arguments(
    leading: tuple[int, ...], heads: int = 4, head_dim: int = 72, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, Any]:
    """Random arguments of an operator on the GPU; ``leading`` is [B, T, S] or [N, S]."""
    generator = torch.Generator().manual_seed(seed)
    angles = 6.28 * torch.rand(leading[1], head_dim // 2, generator=generator)
    tensors = {
        "qkv": torch.randn(*leading, 3 * heads * head_dim, generator=generator),
        "bias": torch.randn(3 * heads * head_dim, generator=generator),
        "q_gamma": 0.5 + torch.rand(head_dim, generator=generator),
        "k_gamma": 0.5 + torch.rand(head_dim, generator=generator),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    return {name: tensor.to(DEVICE, dtype) for name, tensor in tensors.items()} | {"heads": heads}


def widened(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}


def plain_parts(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of every row in plain torch: [B, S, H, T, Dh], or [N, H, S, Dh]."""
    x = (given["qkv"] + given["bias"]).unflatten(-1, (3, given["heads"], -1))
    parts = x.permute(3, 0, 2, 4, 1, 5) if x.dim() == 6 else x.permute(2, 0, 3, 1, 4)
    q, k, v = parts.unbind()

    def normed(y: Tensor, gamma: Tensor) -> Tensor:
        return rotate(F.rms_norm(y, gamma.shape, gamma, eps=1e-6), given["cos"], given["sin"])

    return normed(q, given["q_gamma"]), normed(k, given["k_gamma"]), v


def plain_temporal(given: dict[str, Any]) -> Tensor:
    y = F.scaled_dot_product_attention(*plain_parts(given))  # (B, S, H, T, Dh)
    return y.permute(0, 3, 1, 2, 4).flatten(3)


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


def allowed(plain: Tensor, exact: Tensor) -> float:
    """Twice what plain torch of the same type loses, and a rounding of the largest output."""
    return 2 * error(plain, exact) + (2 * ROUNDOFF[plain.dtype] + 1e-7) * exact.abs().max().item()


def check_fp8(got: Tensor, exact: Tensor, scale: Tensor, slack: float) -> None:
    """FP8 ``got`` is ``exact / scale``, saturated, within the rounding of E4M3 and ``slack``."""
    assert got.dtype == torch.float8_e4m3fn
    s = scale.double()
    clipped = exact.clamp(-448 * s, 448 * s)
    rounding = s * torch.clamp((clipped / s).abs() * 2.0**-4, min=2.0**-10) * (1 + 1e-6)
    assert ((got.double() * s - clipped).abs() <= (1 + 2.0**-4) * slack + rounding).all()


# The operators


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("head_dim", [32, 48, 64, 72, 96, 128])
@pytest.mark.parametrize("frames", [1, 7, 16, 17, 20, 33, 64])
def test_temporal_attention(dtype: torch.dtype, head_dim: int, frames: int) -> None:
    given = arguments((2, frames, 37), 5, head_dim, dtype, seed=frames)
    exact, plain = plain_temporal(widened(given)), plain_temporal(given)
    slack = allowed(plain, exact)
    assert error(temporal_attention(**given), exact) <= slack
    scale = (exact.abs().max() / 300).float()
    check_fp8(temporal_attention(**given, output_scale=scale), exact, scale, slack)


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("head_dim", [32, 48, 64, 72, 96, 128])
@pytest.mark.parametrize("tokens", [1, 37, 256])
def test_spatial_qkv(dtype: torch.dtype, head_dim: int, tokens: int) -> None:
    given = arguments((3, tokens), 5, head_dim, dtype, seed=tokens)
    exact, plain = plain_parts(widened(given)), plain_parts(given)
    scales = {f"{name}_scale": (y.abs().max() / 300).float() for name, y in zip("qkv", exact, strict=True)}
    wide, narrow = spatial_qkv(**given), spatial_qkv(**given, **scales)
    for index, scale in enumerate(scales.values()):
        slack = allowed(plain[index], exact[index])
        assert error(wide[index], exact[index]) <= slack
        check_fp8(narrow[index], exact[index], scale, slack)
    scaled = spatial_qkv(**given, query_scale=0.3)[0]
    assert error(scaled, 0.3 * exact[0]) <= 0.3 * allowed(plain[0], exact[0])


def test_without_bias() -> None:
    given = arguments((2, 20, 33))
    zero = given | {"bias": torch.zeros_like(given["bias"])}
    assert torch.equal(temporal_attention(**(given | {"bias": None})), temporal_attention(**zero))


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    temporal, spatial = arguments((2, 20, 333), dtype=dtype), arguments((40, 333), dtype=dtype)
    first, parts = temporal_attention(**temporal), spatial_qkv(**spatial)
    for _ in range(10):
        assert torch.equal(temporal_attention(**temporal), first)
        assert all(torch.equal(*pair) for pair in zip(spatial_qkv(**spatial), parts, strict=True))


def test_work_goes_to_the_current_stream() -> None:
    """The input is written by the stream that is busy; another stream would read what was there before."""
    given, stream = arguments((2, 20, 64)), torch.cuda.Stream()
    expected, values = temporal_attention(**given), given["qkv"].clone()
    given["qkv"].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
        given["qkv"].copy_(values)
        got = temporal_attention(**given)
    stream.synchronize()
    assert torch.equal(got, expected)


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    given = arguments((2, 20, 64))
    other = {name: value.to("cuda:1") if isinstance(value, Tensor) else value for name, value in given.items()}
    got = temporal_attention(**other)
    assert got.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), temporal_attention(**given).cpu())


def test_opcheck() -> None:
    scale = torch.tensor(0.01, device=DEVICE)
    for given in (arguments((2, 3, 5)), arguments((2, 3, 5)) | {"bias": None}):
        torch.library.opcheck(temporal_attention, tuple(given.values()))
        torch.library.opcheck(temporal_attention, tuple(given.values()), {"output_scale": scale})
    torch.library.opcheck(spatial_qkv, tuple(arguments((4, 5)).values()))


def replayed(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """``run`` in a CUDA graph, and what it writes to."""
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


def test_cuda_graph_of_an_operator() -> None:
    given, other = arguments((2, 20, 64)), arguments((2, 20, 64), seed=1)
    graph, output = replayed(lambda: temporal_attention(**given))
    for values in (other["qkv"], -other["qkv"]):
        given["qkv"].copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, temporal_attention(**given))


REFUSED: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: arguments((2, 20, 8), head_dim=40), "head sizes 32, 48, 64, 72, 96, 128, not 40"),
    (lambda: arguments((2, 20, 8), dtype=torch.float64), "float32, float16 and bfloat16, not torch.float64"),
    (lambda: arguments((1, 65, 2)), "up to 64 token frames"),
    (lambda: (a := arguments((2, 20, 8))) | {"cos": a["cos"].cpu()}, "cos is torch.bfloat16 on cpu, it wants .* cuda"),
    (lambda: (a := arguments((2, 20, 8))) | {"sin": a["sin"].float()}, "sin is torch.float32 on cuda"),
    (lambda: (a := arguments((2, 8, 8))) | {"qkv": a["qkv"].transpose(1, 2)}, "not contiguous"),
    (
        lambda: (
            (a := arguments((2, 20, 8)))
            | {"qkv": torch.cat((a["qkv"].new_zeros(1), a["qkv"].flatten()))[1:].view_as(a["qkv"])}
        ),
        "no multiple of 16 bytes",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_the_kernels_cannot_do_is_refused(make: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        temporal_attention(**make())
    torch.cuda.synchronize()  # and the device is as well as before
    assert temporal_attention(**arguments((1, 2, 3))).isfinite().all()


# The model


def random_model(config: StivConfig = CONFIG) -> Stiv:
    generator = torch.Generator().manual_seed(0)
    model = Stiv(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1, generator=generator)
    return model.to(DEVICE)


def model_inputs(dtype: torch.dtype, frames: int = 5, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, frames, CONFIG.latent_channels, 8, 12), (batch,), (batch, 6), (batch, 7, CONFIG.text_width))
    drawn = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    latents, time, micro, states = drawn
    return [latents, time.sigmoid(), micro, states, torch.ones(batch, 7, device=DEVICE), states.mean(1)]


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("frames", [1, 5, 20])
def test_the_fused_model_is_as_exact_as_the_native_one(dtype: torch.dtype, frames: int) -> None:
    model, inputs = random_model().to(dtype), model_inputs(dtype, frames)
    ready = fuse(copy.deepcopy(model))
    native, fused, again = (each(*inputs) for each in (model, ready, ready))
    exact = model.double()(*(value.double() for value in inputs))
    # Two blocks add the roundings of a dozen operators; each form may have the better luck with some of them.
    assert error(fused, exact) <= 2 * error(native, exact) + 8 * ROUNDOFF[dtype] * exact.abs().max().item()
    assert torch.equal(fused, again)


@pytest.fixture
def native() -> StivBlock:
    made = random_model().bfloat16().blocks[0]
    assert isinstance(made, StivBlock)
    return made


@pytest.fixture
def block(native: StivBlock) -> StivBlock:
    return fuse(copy.deepcopy(native))


def block_inputs(frames: int, tokens: int, seed: int = 0) -> tuple[Any, ...]:
    generator, half = torch.Generator().manual_seed(seed), CONFIG.head_dim // 2
    text = (2, CONFIG.heads, 7, CONFIG.head_dim)
    shapes = [(2, frames, tokens, CONFIG.width), (2, 6, CONFIG.width), text, text, (2, 1, 1, 7)]
    tables = [(tokens, half), (tokens, half), (frames, half), (frames, half)]
    drawn = [torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16) for shape in (*shapes, *tables)]
    return *drawn[:5], RopeTables(*drawn[5:])


def test_compile_sees_through(native: StivBlock, block: StivBlock) -> None:
    pytest.importorskip("triton")
    torch._dynamo.reset()
    compiled, double = torch.compile(block, fullgraph=True), native.double()
    for sizes in ((5, 24), (20, 31)):
        inputs = block_inputs(*sizes)
        wide = [value.double() for value in inputs[:5]]
        got, eager = compiled(*inputs), block(*inputs)
        exact = double(*wide, RopeTables(*(table.double() for table in inputs[5])))
        assert error(got, exact) <= 2 * error(eager, exact) + 8 * ROUNDOFF[torch.bfloat16] * exact.abs().max().item()


def test_cuda_graph_of_a_block(block: StivBlock) -> None:
    inputs, other = block_inputs(20, 24), block_inputs(20, 24, seed=1)
    graph, output = replayed(lambda: block(*inputs))
    inputs[0].copy_(other[0])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, block(*inputs))


def test_sampling_with_the_shipped_checkpoint(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    for part in (loaded.model, loaded.text_encoder, loaded.vae):
        part.to(DEVICE)
    inputs, settings = sampling_inputs(loaded, ["digit three moving left"], [0], None), SamplingSettings(steps=3)
    native, fused = (sample(each, inputs, settings) for each in (loaded.model, fuse(copy.deepcopy(loaded.model))))
    widen = lambda value: value.double() if value.is_floating_point() else value  # noqa: E731
    text, null = (TextStates(*map(widen, states)) for states in (inputs.text, inputs.null_text))
    wide = SamplingInputs(widen(inputs.noise), widen(inputs.clean), inputs.frame_mask, text, null, widen(inputs.micro))
    exact = sample(loaded.model.double(), wide, settings)
    assert error(fused, exact) <= 2 * error(native, exact) + 2.0**-20 * exact.abs().max().item()
