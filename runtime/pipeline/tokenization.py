"""Prompts to token ids, by the bundle's own tokenizer, and what of a prompt is lost on the way."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stiv_deploy.runtime.bundle.bundle import AGAIN, Bundle
from stiv_deploy.runtime.errors import BundleError, briefly, few

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


class PromptTokenizer:
    """The tokenizer of ``bundle``, cutting and padding every prompt to the model's text length L.

    Raises :class:`BundleError` if ``tokenizer.json`` is damaged.
    """

    def __init__(self, bundle: Bundle) -> None:
        from tokenizers import Tokenizer

        path, length = bundle.tokenizer_file(), bundle.manifest.model.max_text_tokens
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path}: not a readable tokenizer ({error}); {AGAIN}") from None
        self._unknown = _unknown_id(path, self._tokenizer)
        padding = self._tokenizer.padding or {}
        kept = {key: padding[key] for key in ("pad_id", "pad_type_id", "pad_token") if key in padding}
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, **kept)

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and 0/1 mask of ``prompts``, both int64 [N, L]; unknown words become the unknown token."""
        encodings = self._tokenizer.encode_batch(list(prompts))
        ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
        return ids, mask

    def lost(self, prompts: Iterable[str]) -> dict[str, str]:
        """What the model will not hear of ``prompts``, in words, by prompt; those that it hears whole are left out."""
        each = list(dict.fromkeys(prompts))
        found = zip(each, self._tokenizer.encode_batch(each), strict=True)
        return {prompt: " and ".join(lost) for prompt, encoding in found if (lost := self._lost(prompt, encoding))}

    def _lost(self, prompt: str, encoding: "Encoding") -> list[str]:
        unknown = [prompt[start:end] for token, start, end in _own(encoding) if token == self._unknown]
        words = [repr(word) for word in dict.fromkeys(unknown)]
        cut = [each for part in encoding.overflowing for each in _own(part)]
        lost = [f"the vocabulary does not know {few(words)}"] if words else []
        if cut:
            count, start = len(_own(encoding)) + len(cut), prompt[cut[0][1] :].strip()
            lost.append(f"{len(cut)} of {count} tokens are cut, from {briefly(start, 40)} on")
        return lost


def lost_line(lost: dict[str, str]) -> str:
    """One line for a log about the prompts of :meth:`PromptTokenizer.lost`."""
    prompt, words = next(iter(lost.items()))
    more = f"; {len(lost) - 1} more lose something, see the records of the clips" if len(lost) > 1 else ""
    return f"the prompt {briefly(prompt, 60)}: {words}{more}"


def _own(encoding: "Encoding") -> list[tuple[int, int, int]]:
    """Token id, start and end in the prompt of all tokens but the special ones around it."""
    each = zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
    return [(token, start, end) for token, (start, end), special in each if not special]


def _unknown_id(path: Path, tokenizer: "Tokenizer") -> int | None:
    """The id that stands for what the vocabulary does not know; None where there is none, as with bytes."""
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else tokenizer.token_to_id(token)
