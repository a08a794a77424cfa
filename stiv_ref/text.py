"""Text: the interface every encoder fills, and a small trainable encoder over real tokens.

STIV takes token states for cross-attention, a mask, and one pooled vector, the state of the last text token
(arXiv 2412.07730, section 2.2). The unconditional prompt is the empty string.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from stiv_deploy.stiv_ref.block import additive_mask, stateless_norm
from stiv_deploy.stiv_ref.bounds import Layers, Size, Tokens, Vocabulary
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.errors import CheckpointError

PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[EOS]"
Pooling = Literal["last", "mean"]
"""What the pooled vector is: the state of the last real token, or the mean of all real tokens."""


class TextStates(NamedTuple):
    """What an encoder gives: states [B, L, Dt], token mask int64 [B, L] (1 for real tokens), pooled [B, Dt]."""

    states: Tensor
    mask: Tensor
    pooled: Tensor


class TextConfig(FrozenConfig):
    """Architecture of the small text encoder; ``max_tokens`` counts the end token, longer prompts are cut."""

    vocabulary: Vocabulary
    width: Size = 96
    heads: Size = 3
    layers: Layers = 2
    max_tokens: Tokens = 16
    pooling: Pooling = "last"


def pool(states: Tensor, token_mask: Tensor, pooling: Pooling) -> Tensor:
    """Pooled [B, Dt] of ``states`` [B, L, Dt].

    ``token_mask`` is int64 0/1 [B, L], padded on the right, at least one token in every row.
    """
    if pooling == "mean":
        weight = token_mask / token_mask.sum(dim=1, keepdim=True)
        return (states * weight.unsqueeze(-1).to(states.dtype)).sum(1)
    last = (token_mask.sum(dim=1) - 1)[:, None, None].expand(-1, 1, states.shape[2])
    return states.gather(1, last).squeeze(1)


class TextLayer(nn.Module):
    """Transformer layer with padding mask and norms on both sides of attention and FFN, as in the video blocks.

    The norms behind keep every layer's contribution at unit size. Without them the layers outgrow the embeddings while
    they learn the words of the first stage, and words that appear in a later stage no longer make a difference.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Run on ``x`` [B, L, Dt] under the additive mask [B, 1, 1, L]."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = (part.squeeze(0) for part in qkv.permute(2, 0, 3, 1, 4).chunk(3))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, L, Dh)
        x = x + stateless_norm(self.out(y.transpose(1, 2).reshape(batch, length, width)))
        return x + stateless_norm(self.down(F.gelu(self.up(self.ffn_norm(x)), approximate="tanh")))


class TextEncoder(nn.Module):
    """Small trainable text encoder; T5 or CLIP fill the same call.

    It pools the state of the last token, as the paper does, or the mean of the states, as in the checkpoint of moving
    digits: attention trained on the still captions of its first stage looked at their one informative word only, and
    the words of motion of later stages did not reach the last state. (The mean came in one change with the absolute
    places of tokens; what each of them does alone was not measured.)
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Parameter(torch.empty(config.max_tokens, config.width))
        self.layers = nn.ModuleList(TextLayer(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def initialize(self, generator: torch.Generator | None = None) -> "TextEncoder":
        """Initialize for training: embeddings of unit size, so that every word is heard from the start."""
        nn.init.normal_(self.tokens.weight, generator=generator)
        nn.init.normal_(self.positions, std=0.5, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
                nn.init.zeros_(module.bias)
        return self

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> TextStates:
        """Encode int64 ``token_ids`` [B, L], padded on the right as ``token_mask`` [B, L] says; L <= max_tokens."""
        x = self.tokens(token_ids) + self.positions[: token_ids.shape[1]]
        mask = additive_mask(token_mask).to(x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        states = self.norm(x)
        return TextStates(states, token_mask, pool(states, token_mask, self.config.pooling))


def word_tokenizer(words: Sequence[str], max_tokens: int) -> Tokenizer:
    """A word-level tokenizer over ``words``: lower case, split at white space and punctuation, ends with ``[EOS]``."""
    vocabulary = {word: index for index, word in enumerate([PAD, UNKNOWN, END, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding(length=max_tokens, pad_id=vocabulary[PAD], pad_token=PAD)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a ``tokenizer.json``; raise :class:`CheckpointError` if it cannot be read."""
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: not a readable tokenizer ({error})") from None


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and 0/1 mask, both int64 [B, L], of ``prompts``."""
    encodings = tokenizer.encode_batch(list(prompts))
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    return ids, mask
