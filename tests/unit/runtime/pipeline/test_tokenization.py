"""What of a prompt the model does not hear is said: words that the vocabulary lacks, tokens beyond the limit."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from stiv_deploy.runtime import StivPipeline
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.pipeline.tokenization import PromptTokenizer, lost_line

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "digit", "##s")
IDS = {token: index for index, token in enumerate(WORDS)}


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(IDS, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    return tokenizer


def t5() -> Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁red", -1.0), ("▁digit", -1.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁", -9.0)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def of(tokenizer: Tokenizer, folder: Path, limit: int) -> PromptTokenizer:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    model = SimpleNamespace(max_text_tokens=limit)
    bundle: Any = SimpleNamespace(tokenizer_file=lambda: path, manifest=SimpleNamespace(model=model))
    return PromptTokenizer(cast(Bundle, bundle))


@pytest.mark.parametrize("make", [words, bert, t5])
def test_unknown_words_and_cut_tokens_are_named(make: Any, tmp_path: Path) -> None:
    tokenizer = of(make(), tmp_path, 4)
    lost = tokenizer.lost(["a red digit", "", "a Piano red", "a red digit a red"])
    assert set(lost) == {"a Piano red", "a red digit a red"}
    assert lost["a red digit a red"] == "2 of 5 tokens are cut, from 'a red' on"
    assert "the vocabulary does not know" in lost["a Piano red"]
    assert "iano" in lost["a Piano red"]


def test_unknown_words_are_said_once_each_and_shortened(tmp_path: Path) -> None:
    lost = of(words(), tmp_path, 64).lost(["x x y a z w", "v"])
    assert lost["x x y a z w"] == "the vocabulary does not know 'x', 'y', 'z' and 1 more"
    assert lost_line(lost).endswith("1 more; 1 more lose something, see the records of the clips")


def test_the_line_is_short_whatever_the_prompts(tmp_path: Path) -> None:
    tokenizer = of(words(), tmp_path, 8)
    line = lost_line(tokenizer.lost([f"{letter * 500}\n" * 40 for letter in "xyz"]))
    assert len(line) < 500
    assert "\n" not in line


def test_one_warning_and_the_record_say_what_was_lost(
    bundle_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with StivPipeline.from_bundle(bundle_path, "onnxruntime", threads=1) as pipe, caplog.at_level(logging.WARNING):
        output = pipe(["digit three", "digit piano"], num_inference_steps=1, seed=0)
        (message,) = [each.getMessage() for each in caplog.records]
    assert message == "the prompt 'digit piano': the vocabulary does not know 'piano'"
    assert output.records[0].lost == {}
    assert json.loads(output.records[1].embedded())["lost"] == {"digit piano": "the vocabulary does not know 'piano'"}
