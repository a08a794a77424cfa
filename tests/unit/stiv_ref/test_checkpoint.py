"""Checkpoints: exact round trip, half-size storage, and one clear line for every damage."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stiv_deploy.stiv_ref import checkpoint as module
from stiv_deploy.stiv_ref import weights
from stiv_deploy.stiv_ref.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    SamplingDefaults,
    checkpoint_files,
    checkpoint_hash,
    load_checkpoint,
    load_text_encoder,
    load_vae,
    open_checkpoint,
    read_checkpoint_config,
    save_checkpoint,
)
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.errors import CheckpointError, OutputError, StivRefError
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.pretrained.text import PretrainedTextEncoder, load_pretrained_text
from stiv_deploy.stiv_ref.sampler import Solver
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, word_tokenizer
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig


@pytest.fixture
def original(small_config: StivConfig) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    tokenizer = word_tokenizer(("digit", "three"), 8)
    text = TextConfig(vocabulary=tokenizer.get_vocab_size(), width=12, heads=3, layers=1, max_tokens=8)
    vae = VaeConfig(channels=(4,))
    sampling = SamplingDefaults(frames=4, steps=7, solver=Solver.AB2)
    model = Stiv(small_config).initialize(generator)
    torch.nn.init.normal_(model.head.out.weight, generator=generator)
    return Checkpoint(
        config=CheckpointConfig(model=small_config, text=text, vae=vae, sampling=sampling),
        model=model,
        text_encoder=TextEncoder(text).initialize(generator),
        vae=Vae(vae),
        tokenizer=tokenizer,
    )


@pytest.fixture
def saved(original: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint", original)
    return tmp_path / "checkpoint"


MODULES = ("model", "text_encoder", "vae")


def test_round_trip_is_exact(original: Checkpoint, saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert loaded.config == original.config
    assert loaded.tokenizer.to_str() == original.tokenizer.to_str()
    for name in MODULES:
        wanted, got = getattr(original, name).state_dict(), getattr(loaded, name).state_dict()
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[key], got[key]) for key in wanted)


def test_loaded_modules_are_for_evaluation(saved: Path) -> None:
    loaded = load_checkpoint(saved)
    for name in MODULES:
        assert not getattr(loaded, name).training
        assert not any(parameter.requires_grad for parameter in getattr(loaded, name).parameters())


def test_half_storage_halves_the_file_and_loads_as_fp32(original: Checkpoint, saved: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "half", original, torch.float16)
    sizes = [
        sum(t.numel() * t.element_size() for t in load_file(p / "model.safetensors").values())
        for p in (tmp_path / "half", saved)
    ]
    assert sizes[0] * 2 == sizes[1]
    for name, tensor in load_checkpoint(tmp_path / "half").model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, original.model.state_dict()[name].half().float())


def test_saving_again_replaces_the_folder(original: Checkpoint, saved: Path) -> None:
    (saved / "stale.txt").write_text("old")
    save_checkpoint(saved, original)
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "text_encoder.safetensors",
        "tokenizer.json",
        "vae.safetensors",
    ]


@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_save_leaves_nothing_half_written(
    original: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    target = tmp_path / "deep" / "checkpoint"
    if existing:
        save_checkpoint(target, original)

    def failing(tensors: dict[str, torch.Tensor], path: Path, metadata: object) -> None:
        if path.name == "vae.safetensors":
            raise OSError("disk full")
        save_file(tensors, path)

    monkeypatch.setattr(weights, "save_file", failing)
    with pytest.raises(OutputError, match=r"deep/checkpoint: cannot be written \(disk full\); free some space"):
        save_checkpoint(target, original)
    assert [path.name for path in target.parent.iterdir()] == (["checkpoint"] if existing else [])
    if existing:
        load_checkpoint(target)


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, torch.float32), (70_000.0, torch.float16)])
def test_weights_that_are_not_finite_are_never_saved(
    original: Checkpoint, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    with torch.no_grad():
        original.model.head.out.weight[0, 0] = value
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"^model as {kind}: NaN or infinity in head\.out\.weight; it has div"):
        save_checkpoint(tmp_path / "checkpoint", original, dtype)
    assert not list(tmp_path.iterdir())


def edit_config(section: str, key: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        target = config[section] if section else config
        target[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


DAMAGES = {
    "no config": (lambda p: (p / "config.json").unlink(), "no checkpoint here"),
    "config not json": (lambda p: (p / "config.json").write_text("{"), "cannot be read as JSON"),
    "unknown key": (edit_config("model", "colour", 1), "model.colour: Extra inputs"),
    "other format": (edit_config("", "format", "other"), "format: Input should be 'stiv-checkpoint'"),
    "future version": (edit_config("", "format_version", 2), "format_version"),
    "a solver that is none": (
        edit_config("sampling", "solver", "rk4"),
        "sampling.solver: Input should be 'euler', 'heun' or 'ab2' (got 'rk4')",
    ),
    "a width that no memory holds": (edit_config("model", "width", 2**16), "does not fit its config.json"),
    "steps": (edit_config("sampling", "steps", 10**20), "sampling.steps: Input should be less than or equal to 10000"),
    "rate": (edit_config("sampling", "frames_per_second", 10**30), "frames_per_second: Input should be less than"),
    "guidance": (edit_config("sampling", "guidance_scale", 1e300), "guidance_scale: Input should be less than"),
    "tokens": (edit_config("text", "max_tokens", 10**9), "text.own.max_tokens: Input should be less than"),
    "channels": (edit_config("vae", "channels", [2] * 1000), "vae.own.channels: Tuple should have at most 10"),
    "other width": (edit_config("model", "width", 32), "does not fit its config.json"),
    "more blocks": (edit_config("model", "blocks", 3), "missing blocks.2."),
    "text width": (edit_config("model", "text_width", 13), "text width or latent channels differ"),
    "latent channels": (edit_config("vae", "latent_channels", 5), "text width or latent channels differ"),
    "vae": (edit_config("vae", "channels", [5]), "vae.safetensors does not fit"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "not a readable safetensors file"),
    "truncated": (lambda p: (p / "vae.safetensors").write_bytes(b"\x10\0\0\0"), "not a readable safetensors file"),
    "missing tensor": (edit_tensors(lambda t: t.pop("patch.weight")), "missing patch.weight"),
    "unexpected tensor": (edit_tensors(lambda t: t.update(extra=torch.zeros(1))), "unexpected extra"),
    "whole numbers": (
        edit_tensors(lambda t: t.update({"patch.weight": t["patch.weight"].int()})),
        "patch.weight is of type int32, weights are of one of float32, float16, bfloat16, float64",
    ),
    "nan": (
        edit_tensors(lambda t: t["patch.weight"].view(-1)[3:4].fill_(torch.nan)),
        "NaN or infinity in patch.weight",
    ),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "not a readable tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_one_clear_line(saved: Path, damage: str) -> None:
    break_it, message = DAMAGES[damage]
    break_it(saved)
    with pytest.raises(StivRefError) as caught:
        load_checkpoint(saved)
    text = str(caught.value)
    assert message in text
    assert str(saved) in text
    assert "\n" not in text
    assert caught.value.exit_code == 2


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here .* train one with 'stiv train'"):
        load_checkpoint(tmp_path / "nothing")


def test_many_misfits_are_summed_up(saved: Path) -> None:
    edit_config("model", "width", 32)(saved)
    with pytest.raises(CheckpointError, match=r"the config wants .* and \d+ more"):
        load_checkpoint(saved)


FILES = ["config.json", "model.safetensors", "text_encoder.safetensors", "vae.safetensors", "tokenizer.json"]


def hash_of(folder: Path, names: list[str]) -> str:
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()} {name}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_hash_is_over_these_files_in_this_order(saved: Path) -> None:
    """Scale files name the checkpoint by it: for checkpoints of these five files it must never change."""
    assert checkpoint_files(saved) == FILES
    assert checkpoint_hash(saved) == hash_of(saved, FILES)


def test_an_opened_checkpoint_is_hashed_once_and_loads_what_it_says(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_checkpoint(saved)
    assert opened.config == load_checkpoint(saved).config
    wanted, calls = checkpoint_hash(saved), []
    monkeypatch.setattr(module, "checkpoint_hash", lambda path: calls.append(path) or wanted)
    loaded = opened.load()
    assert (loaded.path, loaded.sha256, opened.sha256) == (saved, wanted, wanted)
    assert calls == [saved]


def test_opening_reads_no_weights_and_a_hash_needs_all(saved: Path) -> None:
    (saved / "vae.safetensors").unlink()
    opened = open_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"vae.safetensors: cannot be read .*; give a whole checkpoint$"):
        _ = opened.sha256
    with pytest.raises(CheckpointError, match=r"vae.safetensors: not a readable safetensors file"):
        opened.load()


def test_a_checkpoint_in_memory_has_no_path(original: Checkpoint) -> None:
    with pytest.raises(AssertionError, match="never on disk"):
        _ = original.path


def test_a_small_config_is_written_without_a_kind(saved: Path) -> None:
    """So that checkpoints of before there were pretrained encoders are read, and new ones are the same bytes."""
    config = json.loads((saved / "config.json").read_text())
    assert set(config["text"]) == {"vocabulary", "width", "heads", "layers", "max_tokens", "pooling"}
    assert set(config["vae"]) == {"latent_channels", "channels"}


def without(folder: Path, section: str, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[section][key]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("section", "key", "before"), [("model", "cross_qk_norm", "false"), ("text", "pooling", '"mean"')]
)
def test_what_older_checkpoints_do_not_say_is_not_guessed(saved: Path, section: str, key: str, before: str) -> None:
    """Today's default would be another model on the same weights, and not always of other shapes."""
    without(saved, section, key)
    message = (
        f'config.json does not say {section}.{key}; in checkpoints older than this key it is {before}: add "{key}": '
    )
    with pytest.raises(CheckpointError, match=re.escape(f"{saved}: {message}")):
        read_checkpoint_config(saved)


def test_norms_that_the_weights_do_not_have_are_refused(saved: Path) -> None:
    names = [f"blocks.{index}.cross.{part}_norm.weight" for index in (0, 1) for part in "qk"]
    edit_tensors(lambda tensors: [tensors.pop(name) for name in names])(saved)
    with pytest.raises(CheckpointError, match=r"missing blocks\.0\.cross\.q_norm\.weight"):
        load_checkpoint(saved)
    edit_config("model", "cross_qk_norm", False)(saved)
    assert isinstance(load_checkpoint(saved).model.blocks[0].cross.q_norm, torch.nn.Identity)


def test_the_shipped_checkpoint_says_both(root: Path) -> None:
    config = read_checkpoint_config(root / "checkpoints" / "tiny")
    assert (config.model.cross_qk_norm, config.text.pooling) == (False, "mean")


def test_parts_are_loaded_alone(original: Checkpoint, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    encoder, tokenizer = load_text_encoder(saved)
    assert tokenizer.to_str() == original.tokenizer.to_str()
    for found, wanted in ((encoder, original.text_encoder), (load_vae(saved), original.vae)):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))
        assert not any(parameter.requires_grad for parameter in found.parameters())


@pytest.fixture
def with_t5(original: Checkpoint, text_folder: Callable[[str], Path], tmp_path: Path) -> tuple[Checkpoint, Path]:
    """A checkpoint with a pretrained text encoder, in memory and on disk."""
    encoder, tokenizer = load_pretrained_text(text_folder("t5"), 16)
    model = Stiv(original.config.model.model_copy(update={"text_width": 24})).initialize(torch.Generator())
    config = original.config.model_copy(update={"model": model.config, "text": encoder.config})
    checkpoint = Checkpoint(config=config, model=model, text_encoder=encoder, vae=original.vae, tokenizer=tokenizer)
    save_checkpoint(tmp_path / "pretrained", checkpoint, torch.float16)
    return checkpoint, tmp_path / "pretrained"


def test_a_pretrained_text_encoder_round_trips(with_t5: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    """Bit by bit whatever the stored type of the trained weights, from the checkpoint's folder alone."""
    checkpoint, folder = with_t5
    moved = shutil.move(folder, tmp_path / "elsewhere")
    loaded = load_checkpoint(moved)
    assert isinstance(loaded.text_encoder, PretrainedTextEncoder)
    assert loaded.config == checkpoint.config
    assert loaded.tokenizer.to_str() == checkpoint.tokenizer.to_str()
    wanted, found = checkpoint.text_encoder.state_dict(), loaded.text_encoder.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    encoder, _ = load_text_encoder(moved)
    assert all(torch.equal(wanted[key], value) for key, value in encoder.state_dict().items())


def test_the_hash_covers_a_pretrained_encoder(with_t5: tuple[Checkpoint, Path]) -> None:
    _, folder = with_t5
    files = ["config.json", "model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors"]
    files += ["vae.safetensors", "tokenizer.json"]
    assert checkpoint_files(folder) == files
    assert checkpoint_hash(folder) == hash_of(folder, files)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: (p / "text_encoder" / "model.safetensors").unlink(), "no model.safetensors here"),
        (lambda p: shutil.rmtree(p / "text_encoder"), "no text encoder here"),
        (lambda p: (p / "tokenizer.json").unlink(), "not a readable tokenizer"),
        (edit_config("text", "architecture", "gpt"), "text.pretrained.architecture: Input should be 't5', 'clip' or"),
        (edit_config("text", "vocabulary", 100), "has vocabulary 44, the checkpoint's config.json says 100"),
        (edit_config("text", "kind", "own"), "text.own."),
    ],
)
def test_damage_of_a_pretrained_encoder_is_one_clear_line(
    with_t5: tuple[Checkpoint, Path], break_it: Callable[[Path], None], message: str
) -> None:
    _, folder = with_t5
    break_it(folder)
    with pytest.raises(StivRefError) as caught:
        load_checkpoint(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
