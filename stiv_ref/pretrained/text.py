"""Pretrained text encoders of transformers, frozen, called like :class:`~stiv_deploy.stiv_ref.text.TextEncoder`.

STIV takes token states of a pretrained encoder and pools the last text token (arXiv 2412.07730, section 2.2). T5 (arXiv
1910.10683), CLIP (2103.00020) and BERT (1810.04805; MiniLM and other sentence encoders are of its form) are read from a
local folder of config.json, safetensors and tokenizer.json, as their ``save_pretrained`` writes it. Nothing is fetched,
no code of the folder is run.
"""

import copy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from stiv_deploy.stiv_ref.block import additive_mask
from stiv_deploy.stiv_ref.bounds import Size, Tokens, Vocabulary
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.pretrained.folders import CONFIG, check_weights, read_config, silenced
from stiv_deploy.stiv_ref.text import Pooling, TextConfig, TextStates, load_tokenizer, pool
from stiv_deploy.stiv_ref.weights import check_finite, save_tensors

Architecture = Literal["t5", "clip", "bert"]
DEFAULT_MAX_TOKENS = 128
"""Longest prompt of an encoder whose tokenizer names no length: every prompt is padded to it."""
WEIGHTS = "model.safetensors"


class Kind(NamedTuple):
    """A supported architecture: its class in transformers and that class's own arguments, and how to pool its states.

    T5 and CLIP end a text with a token of their own, the text's summary by CLIP's training; sentence encoders of
    BERT's form are trained on the mean.
    """

    class_name: str
    arguments: dict[str, object]
    pooling: Pooling


KINDS: dict[Architecture, Kind] = {
    "t5": Kind("T5EncoderModel", {}, "last"),
    "clip": Kind("CLIPTextModel", {}, "last"),
    "bert": Kind("BertModel", {"add_pooling_layer": False}, "mean"),
}
MODEL_TYPES: dict[str, Architecture] = {"t5": "t5", "clip": "clip", "clip_text_model": "clip", "bert": "bert"}
"""Architecture by the ``model_type`` of a transformers config.json."""


class PretrainedTextConfig(FrozenConfig):
    """What STIV must know of a pretrained encoder; the rest is in the encoder's own config.json.

    ``pooling`` says what the pooled vector is: the state of the last real token, or the mean of all real tokens.
    """

    kind: Literal["pretrained"] = "pretrained"
    architecture: Architecture
    vocabulary: Vocabulary
    width: Size
    max_tokens: Tokens
    pooling: Pooling


def text_dtype(config: TextConfig | PretrainedTextConfig, dtype: torch.dtype) -> torch.dtype:
    """The type that the text encoder of a model of type ``dtype`` computes in: float32 for T5 beside float16.

    T5 was trained in bfloat16, and values inside its FFN exceed what float16 can hold.
    """
    wide = isinstance(config, PretrainedTextConfig) and config.architecture == "t5" and dtype == torch.float16
    return torch.float32 if wide else dtype


class TabledBias(nn.Embedding):
    """T5's relative position bias with the bucket of every distance looked up instead of computed.

    T5 rounds ``log(distance)`` to a bucket, and distances that are powers of two fall on the edge between two: a
    logarithm that is off by one rounding, in another library or on another device, would choose the other one.
    """

    buckets: Tensor

    def __init__(self, bias: nn.Embedding, buckets: Tensor) -> None:
        super().__init__(bias.num_embeddings, bias.embedding_dim, _weight=bias.weight)
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Bias [L, L, H]; of ``input`` [L, L] only the shape counts."""
        return super().forward(self.buckets[: input.shape[0], : input.shape[1]])


class PretrainedTextEncoder(nn.Module):
    """A frozen T5, CLIP or BERT; always in evaluation mode."""

    def __init__(self, config: PretrainedTextConfig, model: Any) -> None:
        super().__init__()
        self.config = config
        self.model: Any = model
        if config.architecture == "t5":
            attention = model.encoder.block[0].layer[0].SelfAttention
            attention.relative_attention_bias = _tabled(attention, config.max_tokens)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "PretrainedTextEncoder":
        """Stay in evaluation mode: the encoder is frozen, its dropout too."""
        return super().train(False)

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> TextStates:
        """Encode int64 ``token_ids`` [B, L], padded on the right as ``token_mask`` [B, L] says; L <= max_tokens."""
        dtype = next(self.model.parameters()).dtype
        mask = additive_mask(token_mask).to(dtype)  # (B, 1, 1, L); transformers takes a 4D mask as it is
        if self.config.architecture == "clip":
            position = torch.arange(token_ids.shape[1], device=token_ids.device)
            seen = (position[:, None] >= position[None, :]).to(torch.int64)
            mask = mask + additive_mask(seen).to(dtype).transpose(0, 2)  # (B, 1, L, L)
        types = {"token_type_ids": torch.zeros_like(token_ids)} if self.config.architecture == "bert" else {}
        states = self.model(input_ids=token_ids, attention_mask=mask, **types).last_hidden_state
        return TextStates(states, token_mask, pool(states, token_mask, self.config.pooling))

    def save(self, folder: Path) -> None:
        """Write config.json and safetensors to the new folder ``folder``, in the type that the weights came in."""
        folder.mkdir()
        config: Any = copy.deepcopy(self.model.config)
        config._name_or_path = ""
        config.architectures = [KINDS[self.config.architecture].class_name]
        config.save_pretrained(folder)
        tensors, seen = {}, set()
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() not in seen:  # T5 has its embedding under two names
                seen.add(tensor.data_ptr())
                tensors[name] = tensor.to(config.dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})


def _tabled(attention: Any, max_tokens: int) -> TabledBias:
    position = torch.arange(max_tokens)
    buckets = attention._relative_position_bucket(
        position[None, :] - position[:, None],
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return TabledBias(attention.relative_attention_bias, buckets)


def load_pretrained_text(
    folder: Path, max_tokens: int | None = None, pooling: Pooling | None = None
) -> tuple[PretrainedTextEncoder, Tokenizer]:
    """The frozen encoder of a transformers folder in fp32, and its tokenizer, cutting and padding to ``max_tokens``.

    ``max_tokens`` counts special tokens; by default it is the tokenizer's own length, else 128, at most the encoder's
    positions. ``pooling`` is by default what the architecture was trained for. Raises :class:`CheckpointError` for a
    missing folder, weights or tokenizer, an unknown architecture, or without the transformers library.
    """
    architecture = _architecture(folder)
    tokenizer = _read_tokenizer(folder)
    model = _read_model(folder, architecture)
    config = PretrainedTextConfig(
        architecture=architecture,
        vocabulary=model.config.vocab_size,
        width=model.config.hidden_size,
        max_tokens=_length(folder, max_tokens, tokenizer, model.config),
        pooling=pooling or KINDS[architecture].pooling,
    )
    _set_length(tokenizer, config, model.config.pad_token_id or 0)
    _check_tokenizer(folder, tokenizer, config)
    return PretrainedTextEncoder(config, model), tokenizer


def read_text_encoder(folder: Path, config: PretrainedTextConfig) -> PretrainedTextEncoder:
    """The encoder that :meth:`PretrainedTextEncoder.save` wrote; raises :class:`CheckpointError` if it is another."""
    architecture = _architecture(folder)
    if architecture != config.architecture:
        raise CheckpointError(
            f"{folder} is a {architecture} encoder, the checkpoint's config.json says {config.architecture}"
        )
    model = _read_model(folder, architecture)
    for what, found, wanted in (
        ("width", model.config.hidden_size, config.width),
        ("vocabulary", model.config.vocab_size, config.vocabulary),
    ):
        if found != wanted:
            raise CheckpointError(f"{folder} has {what} {found}, the checkpoint's config.json says {wanted}")
    _check_positions(folder, config.max_tokens, model.config)
    return PretrainedTextEncoder(config, model)


def _architecture(folder: Path) -> Architecture:
    """The architecture of a folder that has a config.json and safetensors."""
    found = read_config(folder, "text encoder", "transformers").get("model_type")
    if found not in MODEL_TYPES:
        raise CheckpointError(
            f"{folder / CONFIG}: model_type {found!r} is not supported; there are: {', '.join(MODEL_TYPES)}"
        )
    check_weights(folder, (WEIGHTS, f"{WEIGHTS}.index.json"))
    return MODEL_TYPES[found]


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        make = f"AutoTokenizer.from_pretrained({folder.name!r}).save_pretrained({folder.name!r})"
        raise CheckpointError(f"{path}: missing; make it with {make} of transformers")
    return load_tokenizer(path)


def _length(folder: Path, asked: int | None, tokenizer: Tokenizer, config: Any) -> int:
    """Tokens of a prompt, by default the tokenizer's own length as far as the encoder's positions reach."""
    if asked is None:
        own: int = (tokenizer.truncation or {}).get("max_length", DEFAULT_MAX_TOKENS)
        return min(own, _positions(config) or own)
    _check_positions(folder, asked, config)
    return asked


def _positions(config: Any) -> int | None:
    """Positions that an encoder has embeddings for; None for T5, whose positions are relative."""
    return getattr(config, "max_position_embeddings", None)


def _check_positions(folder: Path, max_tokens: int, config: Any) -> None:
    positions = _positions(config)
    if positions is not None and max_tokens > positions:
        raise CheckpointError(
            f"{folder}: max_tokens {max_tokens} given, this encoder has {positions} positions; give at most that"
        )


def _set_length(tokenizer: Tokenizer, config: PretrainedTextConfig, default_pad: int) -> None:
    """Cut and pad on the right. Which token pads is no matter, it is masked; it must only be one that there is."""
    pad = (tokenizer.padding or {}).get("pad_id", default_pad)
    pad = pad if tokenizer.id_to_token(pad) is not None else 0
    tokenizer.enable_truncation(config.max_tokens)
    tokenizer.enable_padding(length=config.max_tokens, pad_id=pad, pad_token=tokenizer.id_to_token(pad))


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, config: PretrainedTextConfig) -> None:
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= config.vocabulary:
        raise CheckpointError(
            f"{folder}: tokenizer.json gives token {largest}, the encoder has {config.vocabulary}; use the tokenizer "
            "that it was trained with"
        )
    if not any(tokenizer.encode("").attention_mask):
        raise CheckpointError(
            f"{folder}: tokenizer.json gives the empty prompt no token at all, and the unconditional prompt is empty; "
            "use a tokenizer that adds its start or end token"
        )


def _read_model(folder: Path, architecture: Architecture) -> Any:
    """The transformers model in fp32; its ``config.dtype`` stays the type that the weights are stored in.

    Its attention is written out ("eager"), with no choice of a kernel by length that a traced graph would keep.
    """
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            f"{folder}: a pretrained text encoder needs the transformers library; install stiv-deploy[encoders]"
        ) from None
    kind = KINDS[architecture]
    try:
        with silenced(transformers.utils.logging):
            model, report = getattr(transformers, kind.class_name).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype="auto",
                attn_implementation="eager",
                output_loading_info=True,
                **kind.arguments,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, TypeError, KeyError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{folder}: not a readable {architecture} encoder ({line})") from None
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"{folder}: its weights lack {', '.join(missing[:3])}{more}")
    check_finite(model.state_dict(), folder)
    return model.float()
