"""Shapes, who may look at whom, and the image model as a special case of the video model."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stiv_deploy.stiv_ref.block import CrossAttention, SelfAttention, additive_mask
from stiv_deploy.stiv_ref.config import CONFIGS, StivConfig
from stiv_deploy.stiv_ref.model import Stiv, sinusoidal
from stiv_deploy.stiv_ref.rope import temporal_table

ModelFactory = Callable[..., Stiv]
SMALL = {"name": "x", "blocks": 1, "width": 8, "heads": 1, "text_width": 4, "frequency_width": 4}


def inputs(
    model: Stiv, frames: int = 3, height: int = 4, width: int = 6, batch: int = 1, seed: int = 0
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    config = model.config
    latents = normal(batch, frames, config.latent_channels, height, width)
    mask = torch.ones(batch, 5, dtype=torch.int64)
    return [
        latents,
        torch.full((batch,), 0.3, dtype=torch.float64),
        torch.ones(batch, 6, dtype=torch.float64),
        normal(batch, 5, config.text_width),
        mask,
        normal(batch, config.text_width),
    ]


grids = {"frames": st.integers(1, 3), "rows": st.integers(1, 3), "columns": st.integers(1, 3)}


@settings(max_examples=40)
@given(pt=st.integers(1, 3), ps=st.integers(1, 3), channels=st.integers(1, 5), **grids)
def test_any_patch_and_size(pt: int, ps: int, channels: int, frames: int, rows: int, columns: int) -> None:
    model = Stiv(StivConfig(**SMALL, patch=(pt, ps), latent_channels=channels)).double().initialize()
    torch.nn.init.normal_(model.head.out.weight)
    arguments = inputs(model, pt * frames, ps * rows, ps * columns)
    tokens = model.patchify(arguments[0])
    assert tokens.shape == (1, frames, rows * columns, pt * ps * ps * channels)
    assert torch.equal(model.unpatchify(tokens, arguments[0].shape), arguments[0])
    out = model(*arguments)
    assert out.shape == arguments[0].shape
    assert out.isfinite().all()


def test_a_patch_holds_neighbours(random_model: ModelFactory) -> None:
    """Changing one latent value changes exactly the token whose patch covers it."""
    model = random_model(patch=(2, 2))
    latents = inputs(model, frames=4)[0]
    changed = latents.clone()
    changed[0, 3, 1, 2, 5] += 1  # token frame 1, token row 1, token column 2 of 3
    difference = (model.patchify(changed) != model.patchify(latents)).any(-1)[0]
    assert difference.nonzero().tolist() == [[1, 1 * 3 + 2]]


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [(3, 4, 6, "not divisible"), (4, 5, 6, "not divisible"), (4, 4, 7, "not divisible")],
)
def test_indivisible_latents_are_refused(
    random_model: ModelFactory, frames: int, height: int, width: int, message: str
) -> None:
    model = random_model(patch=(2, 2))
    with pytest.raises(ValueError, match=message):
        model(*inputs(model, frames, height, width))


def test_wrong_channels_are_refused(random_model: ModelFactory) -> None:
    model = random_model()
    arguments = inputs(model)
    arguments[0] = arguments[0][:, :, :3]
    with pytest.raises(ValueError, match="latents have 3 channels, the model wants 4"):
        model(*arguments)


def test_image_model_refuses_several_frames(random_model: ModelFactory) -> None:
    model = random_model(temporal=False)
    with pytest.raises(ValueError, match="an image model takes one frame, got 3"):
        model(*inputs(model))


def numpy_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v)


def numpy_rms_norm(x: np.ndarray, weight: Tensor) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight.detach().numpy()


@pytest.mark.parametrize("normed", [True, False])
def test_cross_attention_equals_numpy(normed: bool) -> None:
    torch.manual_seed(0)
    module, x, text = (
        CrossAttention(8, 2, normed).double(),
        torch.randn(2, 7, 8).double(),
        torch.randn(2, 5, 8).double(),
    )
    q = module.q(x).detach().numpy().reshape(2, 7, 2, 4).transpose(0, 2, 1, 3)
    kv = module.kv(text).detach().numpy().reshape(2, 5, 2, 2, 4).transpose(2, 0, 3, 1, 4)
    if normed:
        for norm in (module.q_norm, module.k_norm):
            torch.nn.init.normal_(norm.weight)
        q, kv = numpy_rms_norm(q, module.q_norm.weight), kv.copy()
        kv[0] = numpy_rms_norm(kv[0], module.k_norm.weight)
    k, v = module.text_kv(text)
    got = module(x, k, v, torch.zeros(2, 1, 1, 5).double())
    np.testing.assert_allclose(k.detach(), kv[0])
    wanted = module.out(torch.from_numpy(numpy_attention(q, *kv).transpose(0, 2, 1, 3).reshape(2, 7, 8).copy()))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_qk_norm_takes_out_the_size_of_q_and_k() -> None:
    """Q and K scaled by a hundred give the same attention: only their directions and the learned scale count."""
    torch.manual_seed(0)
    module, x = SelfAttention(8, 2).double(), torch.randn(2, 6, 8).double()
    tables = [table.double() for table in temporal_table(6, 4, 6, 100.0)]
    before = module(x, *tables)
    with torch.no_grad():
        module.qkv.weight[:16] *= 100
        module.qkv.bias[:16] *= 100
        after = module(x, *tables)
        module.q_norm.weight *= 100
    # Not bit-equal: the norm's epsilon of 1e-6 weighs less on larger values (mean squares here are about 0.1).
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert (module(x, *tables) - after).abs().max() > 1e-2


def test_qk_norm_of_cross_attention_takes_out_the_size_of_q_and_k() -> None:
    torch.manual_seed(0)
    module, x, text = CrossAttention(8, 2).double(), torch.randn(2, 6, 8).double(), torch.randn(2, 5, 8).double()
    mask = torch.zeros(2, 1, 1, 5).double()
    with torch.no_grad():
        before = module(x, *module.text_kv(text), mask)
        for part in (module.q.weight, module.q.bias, module.kv.weight[:8], module.kv.bias[:8]):
            part.mul_(100)
        # Not bit-equal: see above.
        torch.testing.assert_close(module(x, *module.text_kv(text), mask), before, rtol=0, atol=1e-4)


def test_padding_content_has_no_influence(random_model: ModelFactory) -> None:
    model = random_model()
    arguments = inputs(model)
    arguments[4][0, 3:] = 0
    before = model(*arguments)
    # Ten times the size of real states. The additive -1e4 would be outdone only by scores of that size themselves.
    arguments[3][0, 3:] = 10 * torch.randn(2, 12).double()
    assert torch.equal(model(*arguments), before)
    arguments[4][0, 3] = 1
    assert not torch.allclose(model(*arguments), before)


def test_additive_mask_is_zero_or_exactly_off_in_every_float_type() -> None:
    mask = additive_mask(torch.tensor([[1, 0]]))
    assert mask.shape == (1, 1, 1, 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        cast = mask.to(dtype)
        assert cast.isfinite().all()
        assert (cast.float().exp().flatten() == torch.tensor([1.0, 0.0])).all()


def influence(model: Stiv, frames: int = 3) -> Tensor:
    """Bool [T, S, T, S]: whether input token (t, s), third and fourth axis, changes output token (t, s)."""
    latents, *rest = inputs(model, frames)
    base = model.patchify(model(latents, *rest))
    tokens = model.patchify(latents)
    _, t_count, s_count, _ = tokens.shape
    seen = torch.zeros(t_count, s_count, t_count, s_count, dtype=torch.bool)
    for t in range(t_count):
        for s in range(s_count):
            changed = tokens.clone()
            changed[0, t, s] += torch.linspace(1, 2, tokens.shape[-1], dtype=torch.float64)
            out = model.patchify(model(model.unpatchify(changed, latents.shape), *rest))
            seen[:, :, t, s] = ((out - base).abs() > 1e-9).any(-1)[0]
    return seen


def test_spatial_attention_does_not_mix_frames(random_model: ModelFactory) -> None:
    model = random_model(blocks=1)
    model.blocks[0].temporal_gate.zero_()
    seen = influence(model)
    same_frame = torch.eye(3, dtype=torch.bool)[:, None, :, None].expand(3, 6, 3, 6)
    assert torch.equal(seen, same_frame)


def test_temporal_attention_does_not_mix_positions_and_is_not_causal(random_model: ModelFactory) -> None:
    model = random_model(blocks=1)
    # Silence the spatial branch: gate = table + modulation, so a zero modulation and a zero table entry.
    model.modulation.weight.zero_()
    model.modulation.bias.zero_()
    model.blocks[0].table[2].zero_()
    seen = influence(model)
    same_position = torch.eye(6, dtype=torch.bool)[None, :, None, :].expand(3, 6, 3, 6)
    assert torch.equal(seen, same_position)  # every frame sees every frame: the last influences the first


def test_image_model_is_the_video_model_of_one_frame_without_its_temporal_branch(random_model: ModelFactory) -> None:
    video = random_model(seed=3)
    video.frame_position.weight.zero_()
    for block in video.blocks:
        block.temporal_gate.zero_()
    image = random_model(temporal=False)
    image.load_state_dict({name: video.state_dict()[name] for name in image.state_dict()})
    arguments = inputs(video, frames=1)
    assert torch.equal(video(*arguments), image(*arguments))


def test_frames_of_equal_content_are_told_apart_by_their_position(random_model: ModelFactory) -> None:
    """RoPE alone cannot: attention over equal values gives that value whatever the weights."""
    model = random_model(seed=2)
    arguments = inputs(model)
    arguments[0] = arguments[0][:, :1].expand(-1, 3, -1, -1, -1)
    out = model(*arguments)
    assert min((out[:, a] - out[:, b]).abs().max() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-2
    model.frame_position.weight.zero_()
    out = model(*arguments)
    torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=0, atol=1e-9)


def test_places_start_as_features_of_unit_variance() -> None:
    """Not at zero: what a frame's place means could then not be learned together with what it matters for."""
    model = Stiv(CONFIGS["tiny"]).initialize(torch.Generator().manual_seed(0))
    rope = model.rope_tables((1, 8, 4, 8, 8))
    for project, cos, sin in ((model.token_position, *rope[:2]), (model.frame_position, *rope[2:])):
        places = project(torch.cat((cos, sin), dim=-1))
        assert 0.9 < places.square().mean().item() < 1.1


def test_text_kv_can_be_reused(random_model: ModelFactory) -> None:
    model = random_model()
    arguments = inputs(model, batch=2)
    assert torch.equal(model(*arguments, text_kv=model.text_kv(arguments[3])), model(*arguments))


def test_samples_do_not_influence_each_other(random_model: ModelFactory) -> None:
    model = random_model()
    arguments = inputs(model, batch=3)
    alone = model(*(value[1:2] for value in arguments))
    torch.testing.assert_close(model(*arguments)[1:2], alone, rtol=1e-12, atol=1e-12)


def test_each_condition_matters(random_model: ModelFactory) -> None:
    model = random_model()
    arguments = inputs(model)
    base = model(*arguments)
    for index in (1, 2, 3, 5):  # timestep, micro-conditions, text states, pooled text
        changed = [*arguments]
        changed[index] = changed[index] + 0.5
        assert (model(*changed) - base).abs().max() > 1e-3
    for value in range(6):
        changed = [*arguments]
        changed[2] = changed[2].clone()
        changed[2][0, value] += 8
        assert (model(*changed) - base).abs().max() > 1e-3


def test_initialized_model_has_zero_velocity_and_zero_temporal_gates(small_config: StivConfig) -> None:
    model = Stiv(small_config).initialize(torch.Generator().manual_seed(0)).double()
    assert torch.equal(model(*inputs(model)), torch.zeros(1, 3, 4, 4, 6, dtype=torch.float64))
    assert all((block.temporal_gate == 0).all() for block in model.blocks)


def test_initialization_is_seeded(small_config: StivConfig) -> None:
    first, second = (Stiv(small_config).initialize(torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_sinusoidal_features() -> None:
    values = torch.tensor([0.0, 1.0, 1000.0])
    got = sinusoidal(values, 8).double().numpy()
    angle = values.double().numpy()[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    # The angle is computed in fp32: its rounding is up to 1000 * 2^-23 and moves the cosine by as much.
    np.testing.assert_allclose(got, np.concatenate((np.cos(angle), np.sin(angle)), -1), atol=1000 * 2.0**-22)
