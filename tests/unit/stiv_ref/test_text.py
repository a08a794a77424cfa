"""Tokenizer and text encoder."""

from pathlib import Path

import pytest
import torch

from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.text import Pooling, TextConfig, TextEncoder, load_tokenizer, tokenize, word_tokenizer

WORDS = ("digit", "three", "moving")
PAD, UNK, END = 0, 1, 2


def test_words_end_token_and_padding() -> None:
    ids, mask = tokenize(word_tokenizer(WORDS, 6), ["digit three", ""])
    assert ids.tolist() == [[3, 4, END, PAD, PAD, PAD], [END, PAD, PAD, PAD, PAD, PAD]]
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_unknown_words_case_and_punctuation() -> None:
    ids, _ = tokenize(word_tokenizer(WORDS, 6), ["Digit,  zebra THREE"])
    assert ids.tolist() == [[3, UNK, UNK, 4, END, PAD]]


def test_long_prompts_are_cut_and_still_end() -> None:
    ids, mask = tokenize(word_tokenizer(WORDS, 4), ["digit three moving moving moving"])
    assert ids.tolist() == [[3, 4, 5, END]]
    assert mask.tolist() == [[1, 1, 1, 1]]


def test_tokenizer_file_round_trip(tmp_path: Path) -> None:
    tokenizer, path = word_tokenizer(WORDS, 6), tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    prompts = ["digit three", "x", ""]
    assert torch.equal(tokenize(load_tokenizer(path), prompts)[0], tokenize(tokenizer, prompts)[0])


@pytest.mark.parametrize("content", [None, "", "{}", "not json", b"\xff\xfe"])
def test_unreadable_tokenizer_is_one_line(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match="not a readable tokenizer") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def encoder() -> TextEncoder:
    config = TextConfig(vocabulary=6, width=12, heads=3, layers=2, max_tokens=6)
    return TextEncoder(config).initialize(torch.Generator().manual_seed(0)).double().requires_grad_(False)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooled_is_the_last_state_or_the_mean_of_the_real_tokens(encoder: TextEncoder, pooling: Pooling) -> None:
    assert encoder.config.pooling == "last"  # as in the paper
    encoder.config = encoder.config.model_copy(update={"pooling": pooling})
    ids, mask = tokenize(word_tokenizer(WORDS, 6), ["digit three", "", "digit three moving digit three"])
    out = encoder(ids, mask)
    assert out.states.shape == (3, 6, 12)
    assert torch.equal(out.mask, mask)
    for sample, length in enumerate((3, 1, 6)):
        states = [out.states[sample, token] for token in range(length)]
        wanted = states[-1] if pooling == "last" else torch.stack(states).mean(0)
        torch.testing.assert_close(out.pooled[sample], wanted, rtol=1e-6, atol=1e-6)  # fp32 weights


def test_padding_has_no_influence(encoder: TextEncoder) -> None:
    ids, mask = tokenize(word_tokenizer(WORDS, 6), ["digit three"])
    padded, cut = encoder(ids, mask), encoder(ids[:, :3], mask[:, :3])
    torch.testing.assert_close(padded.states[:, :3], cut.states, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded.pooled, cut.pooled, rtol=1e-12, atol=1e-12)
    ids[0, 3:] = 4
    torch.testing.assert_close(encoder(ids, mask).pooled, cut.pooled, rtol=1e-12, atol=1e-12)


def test_order_matters(encoder: TextEncoder) -> None:
    ids, mask = tokenize(word_tokenizer(WORDS, 6), ["digit three", "three digit"])
    first, second = encoder(ids, mask).pooled
    assert (first - second).abs().max() > 1e-3


def norm(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_layer_equals_its_formula(encoder: TextEncoder) -> None:
    """One layer against explicit softmax over the real tokens only, head by head; every branch ends in a norm."""
    layer = encoder.layers[0]
    x = torch.randn(1, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([0, 0, 0, -1e4, -1e4], dtype=torch.float64).reshape(1, 1, 1, 5)
    q, k, v = torch.nn.functional.linear(layer.norm(x), layer.qkv.weight, layer.qkv.bias)[0].split(12, dim=-1)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (q[:, part] @ k[:3, part].T / 2).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ v[:3, part])
    y = x + norm(layer.out(torch.cat(heads, -1)))
    hidden = layer.up(layer.ffn_norm(y))
    gelu = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(layer(x, mask), y + norm(layer.down(gelu)), rtol=1e-9, atol=1e-9)


def test_large_layers_do_not_drown_a_word(encoder: TextEncoder) -> None:
    """A layer that grew, saying the same for every word, leaves a word heard (without norms it is lost 1000-fold)."""
    ids, mask = tokenize(word_tokenizer(WORDS, 6), ["digit three moving", "digit three digit"])

    def distance() -> float:
        states = encoder(ids, mask).states
        return (states[0, 2] - states[1, 2]).norm().item() / states[0, 2].norm().item()

    before = distance()
    for layer in encoder.layers:
        layer.down.bias.add_(1000 * torch.linspace(-1, 1, 12) ** 3)
    assert distance() > 0.3 * before > 0.01


def test_words_start_at_unit_size_and_seeded(encoder: TextEncoder) -> None:
    again = TextEncoder(encoder.config).initialize(torch.Generator().manual_seed(0)).double()
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    large = TextEncoder(TextConfig(vocabulary=500, width=96)).initialize(torch.Generator().manual_seed(0))
    assert abs(large.tokens.weight.std().item() - 1) < 0.02  # 48000 draws: five standard deviations of their spread
