"""Prompts to token ids, by the bundle's own tokenizer."""

from collections.abc import Sequence

import numpy as np

from stiv_deploy.runtime.bundle.bundle import AGAIN, Bundle
from stiv_deploy.runtime.errors import BundleError


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
