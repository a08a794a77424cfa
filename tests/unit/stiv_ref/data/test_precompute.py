"""Pre-computed latents: what training would compute, made once, resumable, bound to their encoders."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from stiv_deploy.stiv_ref.checkpoint import load_text_encoder, load_vae
from stiv_deploy.stiv_ref.data.encoder_hash import encoder_hash
from stiv_deploy.stiv_ref.data.latents import INDEX, LatentIndex, LatentSettings
from stiv_deploy.stiv_ref.data.precompute import Encoders, load_encoders, precompute
from stiv_deploy.stiv_ref.data.tars import read_shard, shard_paths
from stiv_deploy.stiv_ref.data.videos import VideoDataset, list_videos_of
from stiv_deploy.stiv_ref.errors import CheckpointError, DataError
from stiv_deploy.stiv_ref.objective import sample_generator
from stiv_deploy.stiv_ref.progress import Progress, unheard
from stiv_deploy.stiv_ref.recipe import VideoData
from stiv_deploy.stiv_ref.text import tokenize

WriteVideo = Callable[..., Path]
SETTINGS = LatentSettings(frames=3, sizes=((16, 16), (16, 32)), strides=(1, 2), per_shard=2, seed=7)


@pytest.fixture
def folder(write_video: WriteVideo) -> Path:
    """Five videos of noise, three square and two wide, with captions of the shipped checkpoint's words."""
    random = np.random.default_rng(0)
    for number, width in enumerate([24, 40, 24, 40, 24]):
        path = write_video(f"clips/{number}.mkv", random.integers(0, 256, (8, 20, width, 3), dtype=np.uint8))
        path.with_suffix(".txt").write_text(f"digit {['one', 'two', 'three', 'four', 'five'][number]}")
    return path.parent


@pytest.fixture(scope="session")
def encoders(checkpoint: Path) -> Encoders:
    return load_encoders(checkpoint, checkpoint)


def dataset_of(folder: Path, settings: LatentSettings) -> VideoDataset:
    listing = list_videos_of(VideoData(kind="videos", path=folder))
    return VideoDataset(listing, sizes=settings.sizes, frames=settings.frames, strides=settings.strides)


def make(
    folder: Path,
    out: Path,
    encoders: Encoders,
    settings: LatentSettings = SETTINGS,
    *,
    workers: int = 0,
    progress: Progress = unheard,
) -> LatentIndex:
    return precompute(dataset_of(folder, settings), out, encoders, settings, workers=workers, progress=progress)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_stored_are_the_latents_and_text_states_that_training_would_compute(
    folder: Path, tmp_path: Path, checkpoint: Path, encoders: Encoders
) -> None:
    """Cut, encode and tokenize again by hand, in fp32; what is stored differs by the rounding to fp16 only."""
    index = make(folder, tmp_path / "out", encoders)
    assert (index.complete, index.latent_frames, index.latent_channels) == (True, 3, 4)
    vae, (text, tokenizer) = load_vae(checkpoint), load_text_encoder(checkpoint)
    dataset = dataset_of(folder, SETTINGS)
    records = [record for path in shard_paths(str(tmp_path / "out")) for record in read_shard(path)[0]]
    assert [len(read_shard(path)[0]) for path in shard_paths(str(tmp_path / "out"))] == [2, 2, 1]
    for number, record in enumerate(records):
        facts = json.loads(record.members["json"].read())
        group = 1 if number in (1, 3) else 0
        sample = dataset.load(group, number, sample_generator(7, 0, number, 0))
        assert (facts["name"], facts["size"]) == (f"{number}.mkv", list(SETTINGS.sizes[group]))
        assert facts["caption"] == (folder / f"{number}.txt").read_text()
        assert facts["micro"] == sample.micro.tolist()
        assert facts["micro"][:2] == [20, 24 + 16 * group]
        tensors = load(record.members["safetensors"].read())
        assert sample.video is not None
        with torch.no_grad():
            states = text(*tokenize(tokenizer, [facts["caption"]]))
            wanted = {
                "latents": vae.encode(sample.video[None])[0],
                "states": states.states[0],
                "pooled": states.pooled[0],
            }
        for name, tensor in wanted.items():
            assert tensors[name].dtype == torch.float16
            torch.testing.assert_close(tensors[name].float(), tensor, rtol=2**-11, atol=2**-24)
        assert torch.equal(tensors["mask"].long(), states.mask[0])


def test_several_clips_of_a_video_are_different_draws(folder: Path, tmp_path: Path, encoders: Encoders) -> None:
    settings = SETTINGS.model_copy(update={"clips_per_video": 4, "per_shard": 100})
    make(folder, tmp_path / "out", encoders, settings)
    records, _ = read_shard(tmp_path / "out" / "latents-000000.tar")
    facts = [json.loads(record.members["json"].read()) for record in records]
    assert [each["name"] for each in facts] == [f"{number}.mkv#{draw}" for number in range(5) for draw in range(4)]
    latents = [load(record.members["safetensors"].read())["latents"].numpy().tobytes() for record in records]
    # There are about 40 draws of a video, so that a few of the 6 pairs of each may be equal.
    assert len(set(latents)) > 15
    assert {each["micro"][4] for each in facts} == {1, 2}


def test_without_a_text_encoder_there_are_captions_only(folder: Path, tmp_path: Path, checkpoint: Path) -> None:
    index = make(folder, tmp_path / "out", load_encoders(checkpoint))
    assert (index.text, index.max_tokens) == (None, None)
    record = read_shard(tmp_path / "out" / "latents-000000.tar")[0][0]
    assert set(load(record.members["safetensors"].read())) == {"latents"}


def test_stopped_and_continued_makes_the_same_files(folder: Path, tmp_path: Path, encoders: Encoders) -> None:
    make(folder, tmp_path / "whole", encoders)

    def stop(_shard: str, done: int, total: int) -> None:
        assert total == 5
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(folder, tmp_path / "out", encoders, progress=stop)
    assert sorted(contents(tmp_path / "out")) == ["latents-000000.tar", INDEX]
    assert not json.loads((tmp_path / "out" / INDEX).read_text())["complete"]
    before = (tmp_path / "out" / "latents-000000.tar").stat().st_mtime_ns
    calls: list[int] = []
    make(folder, tmp_path / "out", encoders, workers=2, progress=lambda _shard, done, _total: calls.append(done))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (tmp_path / "out" / "latents-000000.tar").stat().st_mtime_ns == before
    assert calls[0] == 2  # the finished shard at once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 2}, "frames was 3, is 2"),
        ({"seed": 8}, "seed was 7, is 8"),
        ({"dtype": "float32"}, "dtype was float16, is float32"),
    ],
)
def test_other_settings_do_not_go_on_in_the_same_folder(
    folder: Path, tmp_path: Path, encoders: Encoders, change: dict[str, object], message: str
) -> None:
    make(folder, tmp_path / "out", encoders)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=f"out: was begun otherwise: .*{message}"):
        make(folder, tmp_path / "out", encoders, SETTINGS.model_copy(update=change))
    assert contents(tmp_path / "out") == before


def test_other_videos_do_not_go_on_in_the_same_folder(folder: Path, tmp_path: Path, encoders: Encoders) -> None:
    make(folder, tmp_path / "out", encoders)
    (folder / "2.txt").write_text("digit nine")
    with pytest.raises(DataError, match="was begun otherwise: videos was [0-9a-f]{12}, is"):
        make(folder, tmp_path / "out", encoders)


def test_a_folder_of_something_else_is_left_alone(folder: Path, tmp_path: Path, encoders: Encoders) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(DataError, match=f"out: is there already, without {INDEX}"):
        make(folder, tmp_path / "out", encoders)
    assert list(contents(tmp_path / "out")) == ["thesis.txt"]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_and_short_videos_are_skipped_and_listed(
    folder: Path, tmp_path: Path, encoders: Encoders, write_video: WriteVideo, workers: int
) -> None:
    (folder / "3.mkv").write_bytes(b"no video")
    write_video("clips/short.mkv", np.zeros((2, 20, 24, 3), np.uint8)).with_suffix(".txt").write_text("short")
    dataset = dataset_of(folder, SETTINGS)
    (folder / "1.mkv").write_bytes(b"damaged after the scan")
    index = precompute(dataset, tmp_path / "out", encoders, SETTINGS, workers=workers)
    assert set(index.broken) == {"1.mkv", "3.mkv"}
    assert set(dataset.left_out) == {"short.mkv"}
    records = [record for path in shard_paths(str(tmp_path / "out")) for record in read_shard(path)[0]]
    names = [json.loads(record.members["json"].read())["name"] for record in records]
    assert names == ["0.mkv", "2.mkv", "4.mkv"]


def test_nothing_to_encode_is_an_error(folder: Path, tmp_path: Path, encoders: Encoders) -> None:
    with pytest.raises(DataError, match="none of its 5 videos can be used; 0.mkv: has 8 frames; 9 frames at stride 1"):
        make(folder, tmp_path / "out", encoders, SETTINGS.model_copy(update={"frames": 9}))
    assert not (tmp_path / "out").exists()
    dataset = dataset_of(folder, SETTINGS)
    for number in range(5):
        (folder / f"{number}.mkv").write_bytes(b"damaged")
    with pytest.raises(DataError, match="no video of it can be decoded; 0.mkv: "):
        precompute(dataset, tmp_path / "out", encoders, SETTINGS, workers=0)


def test_sizes_that_do_not_fit_the_vae_are_an_error(folder: Path, tmp_path: Path, encoders: Encoders) -> None:
    with pytest.raises(DataError, match="resolution 18x16 is not a multiple of 4 pixels"):
        make(folder, tmp_path / "out", encoders, SETTINGS.model_copy(update={"sizes": ((18, 16),)}))
    assert not (tmp_path / "out").exists()


def test_values_too_large_for_the_stored_type_are_an_error(folder: Path, tmp_path: Path, checkpoint: Path) -> None:
    encoders = load_encoders(checkpoint)
    with torch.no_grad():
        encoders.vae.get_buffer("scale").mul_(1e-6)
    with pytest.raises(DataError, match=r"latents of 0.mkv are too large for float16; give --dtype bfloat16"):
        make(folder, tmp_path / "out", encoders)
    assert list(contents(tmp_path / "out")) == [INDEX]
    make(folder, tmp_path / "other", encoders, SETTINGS.model_copy(update={"dtype": "bfloat16"}))


def test_the_hash_is_of_one_part_only(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "model.safetensors").write_bytes(b"another model")
    for part in ("vae", "text"):
        assert encoder_hash(copy, part) == encoder_hash(checkpoint, part)  # type: ignore[arg-type]
    weights = bytearray((copy / "vae.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "vae.safetensors").write_bytes(weights)
    assert encoder_hash(copy, "vae") != encoder_hash(checkpoint, "vae")
    assert encoder_hash(copy, "text") == encoder_hash(checkpoint, "text")
    (copy / "tokenizer.json").write_text("{}")
    assert encoder_hash(copy, "vae") != encoder_hash(copy, "text") != encoder_hash(checkpoint, "text")


def test_pretrained_encoders(
    folder: Path, tmp_path: Path, checkpoint: Path, text_folder: Callable[[str], Path]
) -> None:
    """A T5 of transformers, whose texts are as long as asked."""
    encoders = load_encoders(checkpoint, text_folder("t5"), max_tokens=9)
    index = make(folder, tmp_path / "out", encoders)
    assert (index.max_tokens, index.text) == (9, encoder_hash(text_folder("t5"), "text"))
    record = read_shard(tmp_path / "out" / "latents-000000.tar")[0][0]
    tensors = load(record.members["safetensors"].read())
    assert tensors["states"].shape == (9, 24)
    assert tensors["mask"].shape == (9,)
    assert tensors["pooled"].shape == (24,)


def test_bad_encoder_folders_are_errors(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere/config.json: cannot be read"):
        load_encoders(tmp_path / "nowhere")
    with pytest.raises(DataError, match="its texts have 16 tokens; leave --max-tokens out"):
        load_encoders(checkpoint, checkpoint, max_tokens=8)
    with pytest.raises(DataError, match="device 'nowhere': cannot be used"):
        load_encoders(checkpoint, device="nowhere")
