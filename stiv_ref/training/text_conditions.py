"""The text of a training batch: encoded by the small trained encoder, by a frozen one, or pre-computed states."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from stiv_deploy.stiv_ref.checkpoint import AnyTextEncoder, load_text_encoder
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.data.source import Batch
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.objective import drop_text
from stiv_deploy.stiv_ref.pretrained.text import load_pretrained_text
from stiv_deploy.stiv_ref.recipe import FrozenText, Recipe, WordText
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, TextStates, tokenize, word_tokenizer


class TextConditions:
    """A text encoder with its tokenizer; ``trained`` with the model, or frozen."""

    def __init__(self, encoder: AnyTextEncoder, tokenizer: Tokenizer, *, trained: bool) -> None:
        self.encoder, self.tokenizer, self.trained = encoder, tokenizer, trained
        self._null: TextStates | None = None

    def states(self, batch: Batch, dropped: Tensor, device: torch.device) -> TextStates:
        """Text states of ``batch``; the samples of ``dropped`` (bool [B]) have the empty prompt."""
        if self.trained:
            if batch.text is not None:
                raise ConfigError(
                    "the data has pre-computed text states: name the frozen encoder they are from in [text]"
                )
            return self._encode(
                ["" if drop else text for text, drop in zip(batch.captions, dropped.tolist(), strict=True)], device
            )
        with torch.no_grad():
            text = self._encode(batch.captions, device) if batch.text is None else _moved(batch.text, device)
            if self._null is None:
                self._null = self._encode([""], device)
            _check_same(text, self._null)
            return drop_text(text, self._null, dropped.to(device))

    def null(self, count: int, device: torch.device) -> TextStates:
        """States of the empty prompt, ``count`` times."""
        with torch.no_grad():
            return self._encode([""] * count, device)

    def _encode(self, captions: Sequence[str], device: torch.device) -> TextStates:
        ids, mask = tokenize(self.tokenizer, captions)
        states: TextStates = self.encoder(ids.to(device), mask.to(device))
        return states


def _moved(text: TextStates, device: torch.device) -> TextStates:
    return TextStates(text.states.to(device).float(), text.mask.to(device), text.pooled.to(device).float())


def _check_same(text: TextStates, null: TextStates) -> None:
    if text.states.shape[1:] != null.states.shape[1:]:
        raise ConfigError(
            f"pre-computed text states are {tuple(text.states.shape[1:])} (tokens, width), the encoder in [text] gives "
            f"{tuple(null.states.shape[1:])}; name the encoder and max_tokens that they were made with"
        )


def word_encoder(settings: WordText, model: StivConfig, tokenizer: Tokenizer, seed: int) -> TextEncoder:
    """The small encoder for the words of ``tokenizer``, initialized from ``seed``."""
    config = TextConfig(
        vocabulary=tokenizer.get_vocab_size(),
        width=model.text_width,
        layers=settings.layers,
        heads=settings.heads,
        max_tokens=settings.max_tokens,
        pooling=settings.pooling,
    )
    return TextEncoder(config).initialize(torch.Generator().manual_seed(seed))


def frozen_text(settings: FrozenText) -> tuple[AnyTextEncoder, Tokenizer]:
    """The frozen encoder that the recipe names, and its tokenizer.

    Raises :class:`~stiv_deploy.stiv_ref.errors.CheckpointError` if it cannot be read.
    """
    if settings.kind == "pretrained":
        return load_pretrained_text(settings.path, settings.max_tokens)
    encoder, tokenizer = load_text_encoder(settings.path)
    if settings.max_tokens not in (None, encoder.config.max_tokens):
        raise ConfigError(
            f"text.max_tokens is {settings.max_tokens}, the encoder of {settings.path} has "
            f"{encoder.config.max_tokens}; leave it out"
        )
    return encoder, tokenizer


def make_text(
    recipe: Recipe, words: Sequence[str], tokenizer: Tokenizer | None, device: torch.device
) -> TextConditions:
    """The text part of a run, the trained encoder initialized from the recipe's seed.

    A new tokenizer knows ``words``; that of a resumed run is given. Raises :class:`ConfigError` if a frozen encoder
    does not fit the model.
    """
    if isinstance(recipe.text, WordText):
        tokenizer = tokenizer or word_tokenizer(words, recipe.text.max_tokens)
        encoder = word_encoder(recipe.text, recipe.model, tokenizer, recipe.seed)
        return TextConditions(encoder, tokenizer, trained=True)
    frozen, tokenizer = frozen_text(recipe.text)
    if frozen.config.width != recipe.model.text_width:
        raise ConfigError(
            f"the text encoder of {recipe.text.path} has width {frozen.config.width}, the model takes text_width "
            f"{recipe.model.text_width}; set text_width = {frozen.config.width} in [model]"
        )
    return TextConditions(frozen.to(device).eval().requires_grad_(False), tokenizer, trained=False)
