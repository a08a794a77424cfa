"""The model against a second implementation, written from the specification in fp64 numpy, loops over everything.

Nothing below uses torch's attention, norms or reshapes. The model runs in fp64 too; only its RoPE tables and its
sinusoidal features are fp32 (about 6e-8 of 1), so agreement to 1e-5 of the output's size is what rounding allows after
two blocks, and any mistake in a formula shows as 1e-2 or more.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.model import Stiv

ModelFactory = Callable[..., Stiv]
Array = NDArray[np.float64]
Weights = dict[str, Array]
TOLERANCE = 1e-5


def weights(module: torch.nn.Module) -> Weights:
    return {name: tensor.numpy().astype(np.float64) for name, tensor in module.state_dict().items()}


def part(values: Weights, prefix: str) -> Weights:
    return {name[len(prefix) + 1 :]: value for name, value in values.items() if name.startswith(f"{prefix}.")}


def linear(values: Weights, name: str, x: Array) -> Array:
    return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]


def layer_norm(x: Array) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def rms_norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def turn(x: Array, angles: Array) -> Array:
    """Complex rotation of the pairs (i, i + half) of ``x`` [N, Dh] by ``angles`` [N, Dh / 2]."""
    half = x.shape[-1] // 2
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate((z.real, z.imag), -1)


def angles_1d(size: int, base: int, pairs: int, theta: float) -> Array:
    return np.outer(np.arange(size) * min(1, base / size), theta ** (-np.arange(pairs) / pairs))


def angles_2d(grid: tuple[int, int], base: tuple[int, int], pairs: int, theta: float) -> Array:
    rows, columns = (angles_1d(n, b, pairs // 2, theta) for n, b in zip(grid, base, strict=True))
    return np.array([np.concatenate((rows[r], columns[c])) for r in range(grid[0]) for c in range(grid[1])])


def self_attention(values: Weights, heads: int, x: Array, angles: Array) -> Array:
    """One sequence ``x`` [N, D], head by head."""
    width = x.shape[-1]
    size = width // heads
    q, k, v = np.split(linear(values, "qkv", x), 3, axis=-1)
    outputs = []
    for head in range(heads):
        chosen = slice(head * size, (head + 1) * size)
        qh = turn(rms_norm(q[:, chosen], values["q_norm.weight"]), angles)
        kh = turn(rms_norm(k[:, chosen], values["k_norm.weight"]), angles)
        outputs.append(softmax(qh @ kh.T / np.sqrt(size)) @ v[:, chosen])
    return linear(values, "out", np.concatenate(outputs, -1))


def cross_attention(values: Weights, heads: int, x: Array, text: Array) -> Array:
    """Tokens ``x`` [N, D] to the *real* text tokens ``text`` [L', D]: padding is cut off, not masked."""
    size = x.shape[-1] // heads
    q = linear(values, "q", x)
    k, v = np.split(linear(values, "kv", text), 2, axis=-1)
    outputs = []
    for head in range(heads):
        chosen = slice(head * size, (head + 1) * size)
        qh, kh = q[:, chosen], k[:, chosen]
        if "q_norm.weight" in values:  # config.cross_qk_norm
            qh, kh = rms_norm(qh, values["q_norm.weight"]), rms_norm(kh, values["k_norm.weight"])
        outputs.append(softmax(qh @ kh.T / np.sqrt(size)) @ v[:, chosen])
    return linear(values, "out", np.concatenate(outputs, -1))


def block(values: Weights, heads: int, x: Array, modulation: Array, text: Array, space: Array, time: Array) -> Array:
    """One sample ``x`` [T, S, D]: the paper's order, every branch a sandwich x + gate * LN(f(modulated LN(x)))."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation + values["table"]
    frames, tokens, _ = x.shape
    y = layer_norm(x) * (1 + scale) + shift
    y = np.stack([self_attention(part(values, "spatial"), heads, y[t], space) for t in range(frames)])
    x = x + gate * layer_norm(y)
    if "temporal_gate" in values:
        y = layer_norm(x)
        y = np.stack([self_attention(part(values, "temporal"), heads, y[:, s], time) for s in range(tokens)], axis=1)
        x = x + values["temporal_gate"] * layer_norm(y)
    y = layer_norm(x)
    x = x + layer_norm(np.stack([cross_attention(part(values, "cross"), heads, y[t], text) for t in range(frames)]))
    y = layer_norm(x) * (1 + ffn_scale) + ffn_shift
    y = linear(part(values, "ffn"), "down", gelu(linear(part(values, "ffn"), "up", y)))
    return x + ffn_gate * layer_norm(y)


def scalar_embedding(values: Weights, numbers: Array, width: int) -> Array:
    half = width // 2
    frequency = 10_000.0 ** (-np.arange(half) / half)
    features = np.concatenate([np.concatenate((np.cos(n * frequency), np.sin(n * frequency))) for n in numbers])
    return layer_norm(linear(values, "outer", silu(linear(values, "inner", features))))


def patchify(latents: Array, pt: int, ps: int) -> Array:
    """[T, C, h, w] -> [T / pt, S, pt * ps * ps * C], a token's values in the order (frame, row, column, channel)."""
    frames, _, height, width = latents.shape
    return np.array(
        [
            [
                latents[t : t + pt, :, r : r + ps, c : c + ps].transpose(0, 2, 3, 1).ravel()
                for r in range(0, height, ps)
                for c in range(0, width, ps)
            ]
            for t in range(0, frames, pt)
        ]
    )


def unpatchify(patches: Array, shape: tuple[int, ...], pt: int, ps: int) -> Array:
    out = np.empty(shape)
    columns = shape[3] // ps
    for t, frame in enumerate(patches):
        for s, patch in enumerate(frame):
            r, c = divmod(s, columns)
            values = patch.reshape(pt, ps, ps, shape[1]).transpose(0, 3, 1, 2)
            out[t * pt : (t + 1) * pt, :, r * ps : (r + 1) * ps, c * ps : (c + 1) * ps] = values
    return out


def forward(
    model: torch.nn.Module,
    latents: Array,
    timestep: float,
    micro: Array,
    text: Array,
    pooled: Array,
    keep: list[int] | None = None,
) -> Array:
    """The whole model on one sample: latents [T, C, h, w], micro [6], real text states [L', Dt], pooled [Dt].

    With ``keep``, the main blocks see only these tokens of each frame; mask tokens stand for the others afterwards.
    """
    config, values = model.config, weights(model)
    pt, ps = config.patch
    singleton = part(values, "singleton")
    condition = scalar_embedding(part(singleton, "timestep"), np.array([1000 * timestep]), config.frequency_width)
    condition = condition + layer_norm(linear(singleton, "pooled", pooled))
    for name, chosen in {
        "resolution": micro[:2],
        "crop": micro[2:4],
        "stride": micro[4:5],
        "frames": micro[5:],
    }.items():
        condition = condition + scalar_embedding(part(singleton, f"micro.{name}"), chosen, config.frequency_width)
    modulation = linear(values, "modulation", silu(condition)).reshape(6, config.width)
    states = linear(values, "text_out", gelu(linear(values, "text_in", text)))
    x = linear(values, "patch", patchify(latents, pt, ps))
    grid = (latents.shape[2] // ps, latents.shape[3] // ps)
    pairs = config.width // config.heads // 2
    space = angles_2d(grid, config.base_grid, pairs, config.rope_theta)
    time = angles_1d(len(x), config.base_frames, pairs, config.rope_theta)
    # absolute places: projections of the tables' cosines and sines
    places = np.zeros_like(x) + np.concatenate((np.cos(space), np.sin(space)), -1) @ values["token_position.weight"].T
    if config.temporal:
        places += (np.concatenate((np.cos(time), np.sin(time)), -1) @ values["frame_position.weight"].T)[:, None]
    x = x + places
    for index in range(config.blocks):
        own = space
        if keep is not None and index == 0:
            x = x[:, keep]
        if keep is not None and index < config.blocks - config.full_blocks:
            own = space[keep]
        elif keep is not None and index == config.blocks - config.full_blocks:
            whole = values["mask_token"] + places
            for position, token in enumerate(keep):
                whole[:, token] = x[:, position]
            x = whole
        x = block(part(values, f"blocks.{index}"), config.heads, x, modulation, states, own, time)
    shift, scale = condition + values["head.table"]
    patches = linear(part(values, "head"), "out", layer_norm(x) * (1 + scale) + shift)
    return unpatchify(patches, latents.shape, pt, ps)


def assert_equal_to_rounding(got: torch.Tensor, wanted: Array) -> None:
    error = np.linalg.norm(got.numpy() - wanted) / np.linalg.norm(wanted)
    assert error < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        *({"patch": patch} for patch in ((1, 2), (2, 1), (1, 1), (2, 2))),
        *({"patch": patch, "temporal": False} for patch in ((1, 2), (1, 1))),
        {"cross_qk_norm": False},
    ],
)
def test_whole_model(random_model: ModelFactory, changes: dict[str, Any]) -> None:
    model, temporal = random_model(**changes), changes.get("temporal", True)
    rng = np.random.default_rng(3)
    frames = 6 if temporal else 1  # more than base_frames, so that positions are interpolated
    latents = rng.standard_normal((2, frames, 4, 8, 6))
    timestep, lengths = np.array([0.001, 0.003]), [3, 5]  # small: the fp32 angle 1000 t must not round noticeably
    micro = rng.integers(0, 3, (2, 6)).astype(np.float64)
    text, pooled = rng.standard_normal((2, 5, 12)), rng.standard_normal((2, 12))
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = [torch.from_numpy(value) for value in (latents, timestep, micro, text, mask, pooled)]
    got = model(*inputs)
    for sample, length in enumerate(lengths):
        wanted = forward(model, latents[sample], timestep[sample], micro[sample], text[sample, :length], pooled[sample])
        assert_equal_to_rounding(got[sample], wanted)


@pytest.mark.parametrize("temporal", [True, False])
def test_whole_model_with_masked_tokens(random_model: ModelFactory, temporal: bool) -> None:
    """MaskDiT: every sample keeps tokens of its own, the last two of three blocks see all."""
    model = random_model(blocks=3, full_blocks=2, temporal=temporal)
    rng = np.random.default_rng(5)
    frames = 3 if temporal else 1
    latents, timestep = rng.standard_normal((2, frames, 4, 8, 6)), np.array([0.001, 0.003])
    micro, text, pooled = np.ones((2, 6)), rng.standard_normal((2, 5, 12)), rng.standard_normal((2, 12))
    mask = np.ones((2, 5), dtype=np.int64)
    keep = [[0, 3, 4, 7, 8, 11], [1, 2, 5, 6, 9, 10]]
    inputs = [torch.from_numpy(value) for value in (latents, timestep, micro, text, mask, pooled)]
    got = model(*inputs, keep=torch.tensor(keep))
    for sample, kept in enumerate(keep):
        wanted = forward(
            model, latents[sample], timestep[sample], micro[sample], text[sample], pooled[sample], keep=kept
        )
        assert_equal_to_rounding(got[sample], wanted)


def test_block_alone(random_model: ModelFactory) -> None:
    model = random_model(seed=5)
    rng = np.random.default_rng(4)
    x, modulation, text = (
        rng.standard_normal((1, 3, 6, 16)),
        rng.standard_normal((1, 6, 16)),
        rng.standard_normal((4, 16)),
    )
    reference = model.blocks[1]
    rope = model.rope_tables((1, 3, 4, 4, 6))
    k, v = reference.cross.text_kv(torch.from_numpy(text)[None])
    mask = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    got = reference(torch.from_numpy(x), torch.from_numpy(modulation), k, v, mask, rope)
    config = model.config
    space = angles_2d((2, 3), config.base_grid, 4, config.rope_theta)
    time = angles_1d(3, config.base_frames, 4, config.rope_theta)
    wanted = block(weights(reference), 2, x[0], modulation[0], text, space, time)
    assert_equal_to_rounding(got[0], wanted)
