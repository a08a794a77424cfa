"""The data of a stage of a recipe, from everything that it can be: digits, videos, shards, latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stiv_deploy.stiv_ref.commands.data import data as cli
from stiv_deploy.stiv_ref.config import parse_config
from stiv_deploy.stiv_ref.data.open_source import open_source
from stiv_deploy.stiv_ref.data.source import DigitsSource
from stiv_deploy.stiv_ref.errors import DataError, StivRefError
from stiv_deploy.stiv_ref.objective import sample_generator
from stiv_deploy.stiv_ref.recipe import Recipe

WriteVideo = Callable[..., Path]


@pytest.fixture
def folder(write_video: WriteVideo) -> Path:
    """Four videos of noise, three square and one wide."""
    random = np.random.default_rng(0)
    for number, width in enumerate([16, 16, 16, 32]):
        path = write_video(f"clips/{number}.mkv", random.integers(0, 256, (6, 16, width, 3), dtype=np.uint8))
        path.with_suffix(".txt").write_text(f"digit {['one', 'two', 'three', 'four'][number]}")
    return path.parent


@pytest.fixture
def recipe_of(checkpoint: Path) -> Callable[..., Recipe]:
    """A recipe of one stage on ``data``, with what differs from the frozen parts of the shipped checkpoint."""

    def make(data: dict[str, Any], *, model: dict[str, Any] | None = None, **changes: Any) -> Recipe:
        stage = {"task": "t2v", "steps": 4, "batch": 4, "frames": 2, "learning_rate": 1e-3, "resolution": [16, 16]}
        stage |= changes.pop("stage", {})
        values: dict[str, Any] = {"name": "x", "model": {"base": "tiny", **(model or {})}, "seed": 3}
        values |= {
            "vae": {"kind": "checkpoint", "path": checkpoint},
            "text": {"kind": "checkpoint", "path": checkpoint},
        }
        return parse_config(Recipe, values | {"data": {"d": data}, "stages": [stage]} | changes, "recipe")

    return make


RecipeOf = Callable[..., Recipe]


def batches_of(recipe: Recipe, steps: range = range(4), number: int = 1) -> list[Any]:
    source = open_source(recipe, recipe.stages[0], number)
    return [batch for (batch,) in source.batches(steps, [range(4)])]


def run(*arguments: object) -> None:
    """Run ``stiv data``; errors come through."""
    CliRunner().invoke(cli, [str(each) for each in arguments], catch_exceptions=False, standalone_mode=False)


def latents(folder: Path, out: Path, checkpoint: Path, *more: object) -> dict[str, Any]:
    """Make latents of ``folder`` with the command; the [data] that reads them."""
    arguments = ("--vae", checkpoint, "--text", checkpoint, "--frames", 2, "--resolution", "16x16", "--quiet", *more)
    run("latents", folder, out, *arguments)
    return {"kind": "shards", "path": f"{out}/*.tar"}


def test_digits() -> None:
    values = {"name": "x", "model": "tiny", "vae": {"steps": 1, "batch": 1, "learning_rate": 1.0}, "seed": 3}
    stage = {"task": "t2v", "steps": 1, "batch": 4, "frames": 3, "learning_rate": 1.0}
    recipe = parse_config(Recipe, values | {"stages": [stage]}, "recipe")
    source = open_source(recipe, recipe.stages[0], 2)
    assert isinstance(source, DigitsSource)
    ((batch,),) = source.batches(range(1), [range(4)])
    wanted = source.digits.draw(1, 3, sample_generator(4, 2, 0, 1))
    assert batch.video is not None
    assert torch.equal(batch.video[1:2], wanted.video)


def test_what_the_recipe_says_is_what_is_drawn(folder: Path, recipe_of: RecipeOf) -> None:
    stage = {"buckets": [[16, 16], [8, 16]], "resolution": None, "frames": 2}
    recipe = recipe_of({"kind": "videos", "path": folder, "strides": [2, 3]}, stage=stage)
    batches = batches_of(recipe, range(8))
    sizes = [tuple(batch.video.shape) for batch in batches]
    assert sizes.count((4, 2, 3, 16, 16)) == 6
    assert sizes.count((4, 2, 3, 8, 16)) == 2
    assert {stride for batch in batches for stride in batch.micro[:, 4].tolist()} == {2, 3}
    first, other = (batches_of(recipe, number=number)[0] for number in (1, 2))
    assert first.names != other.names or not torch.equal(first.video, other.video)
    again = batches_of(recipe, range(8))
    assert all(torch.equal(one.video, two.video) for one, two in zip(batches, again, strict=True))


def test_workers_and_max_broken_come_from_the_recipe(folder: Path, recipe_of: RecipeOf) -> None:
    recipe = recipe_of({"kind": "videos", "path": folder, "max_broken": 0.0}, efficiency={"workers": 1})
    assert open_source(recipe, recipe.stages[0], 1).workers == 1  # type: ignore[attr-defined]
    (folder / "0.mkv").write_bytes(b"damaged")
    with pytest.raises(DataError, match="max_broken = 0 allows"):
        open_source(recipe, recipe.stages[0], 1)


def test_packed_videos_are_the_same_training_data(folder: Path, tmp_path: Path, recipe_of: RecipeOf) -> None:
    run("shards", folder, tmp_path / "shards", "--per-shard", 3, "--quiet")
    one = batches_of(recipe_of({"kind": "videos", "path": folder}))
    other = batches_of(recipe_of({"kind": "shards", "path": f"{tmp_path}/shards/*.tar"}))
    assert all(torch.equal(a.video, b.video) and a.captions == b.captions for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_of_one_draw_are_the_videos_through_the_encoders(
    folder: Path, tmp_path: Path, checkpoint: Path, recipe_of: RecipeOf, workers: int
) -> None:
    from stiv_deploy.stiv_ref.checkpoint import load_text_encoder
    from stiv_deploy.stiv_ref.text import tokenize

    data = latents(folder, tmp_path / "out", checkpoint, "--dtype", "float32")
    recipe = recipe_of(data, efficiency={"workers": workers})
    batches = batches_of(recipe)
    encoder, tokenizer = load_text_encoder(checkpoint)
    for batch in batches:
        assert batch.video is None
        assert batch.latents.shape == (4, 2, 4, 4, 4)
        assert batch.latents.dtype == torch.float32
        with torch.no_grad():
            wanted = encoder(*tokenize(tokenizer, batch.captions))
        assert torch.equal(batch.text.mask, wanted.mask)
        # One caption at a time and four at a time are summed in another order: 2**-23 times some hundred terms.
        torch.testing.assert_close(batch.text.states, wanted.states, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch.text.pooled, wanted.pooled, rtol=1e-4, atol=1e-4)
        assert batch.micro[:, 5].tolist() == [2.0] * 4
    # Every video once an epoch, and the same latents for it in each.
    names = [sorted(batch.names) for batch in batches]
    assert names == [["0.mkv", "1.mkv", "2.mkv", "3.mkv"]] * 4
    first = dict(zip(batches[0].names, batches[0].latents, strict=True))
    assert all(torch.equal(first[name], row) for name, row in zip(batches[1].names, batches[1].latents, strict=True))
    split = [
        batch
        for parts in open_source(recipe, recipe.stages[0], 1).batches(range(2, 4), [range(1), range(1, 4)])
        for batch in parts
    ]
    assert torch.equal(
        torch.cat([batch.latents for batch in split]), torch.cat([batch.latents for batch in batches[2:]])
    )


def test_words_of_latents_and_of_videos_are_the_same(
    folder: Path, tmp_path: Path, checkpoint: Path, recipe_of: RecipeOf
) -> None:
    data = latents(folder, tmp_path / "out", checkpoint)
    recipes = [recipe_of(each) for each in (data, {"kind": "videos", "path": folder})]
    one, other = (open_source(recipe, recipe.stages[0], 1).words() for recipe in recipes)
    assert one == other == ["digit", "four", "one", "three", "two"]


def test_a_text_encoder_that_is_trained_gets_captions(
    folder: Path, tmp_path: Path, checkpoint: Path, recipe_of: RecipeOf
) -> None:
    batch = batches_of(recipe_of(latents(folder, tmp_path / "out", checkpoint), text={"kind": "words"}))[0]
    assert batch.text is None
    assert all(caption.startswith("digit ") for caption in batch.captions)


def test_latents_of_mixed_resolutions_need_buckets(
    folder: Path, tmp_path: Path, checkpoint: Path, recipe_of: RecipeOf
) -> None:
    data = latents(folder, tmp_path / "out", checkpoint, "--resolution", "16x32")
    wanted = (
        r"holds samples of 16x16 \(3\), 16x32 \(1\); stage 1-t2v has 16x16: write buckets = \[\[16, 16\], \[16, 32\]\]"
    )
    with pytest.raises(DataError, match=wanted):
        batches_of(recipe_of(data))
    stage = {"buckets": [[16, 32], [16, 16], [32, 16]], "resolution": None}
    shapes = [tuple(batch.latents.shape[-2:]) for batch in batches_of(recipe_of(data, stage=stage), range(8))]
    assert sorted(shapes) == [(4, 4)] * 6 + [(4, 8)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": {"frames": 4}}, "clips of 2 frames; stage 1-t2v takes 4"),
        ({"stage": {"resolution": [32, 32]}}, r"holds samples of 16x16 \(4\); .* 32x32: write resolution = \[16, 16\]"),
        ({"vae": {"steps": 1, "batch": 1, "learning_rate": 1.0}}, "need the VAE that made them, frozen"),
        ({"model": {"latent_channels": 8}}, "latents of 4 channels, model tiny takes 8"),
        ({"model": {"patch": (4, 2)}}, "2 latent frames are not a multiple of the temporal patch 4"),
    ],
)
def test_latents_that_do_not_fit_the_recipe(
    folder: Path, tmp_path: Path, checkpoint: Path, recipe_of: RecipeOf, changes: dict[str, Any], message: str
) -> None:
    recipe = recipe_of(latents(folder, tmp_path / "out", checkpoint), **changes)
    with pytest.raises(StivRefError, match=message):
        open_source(recipe, recipe.stages[0], 1)


@pytest.mark.parametrize(("part", "name"), [("vae", "VAE"), ("text", "text encoder")])
def test_latents_of_another_encoder(
    folder: Path, tmp_path: Path, checkpoint: Path, recipe_of: RecipeOf, part: str, name: str
) -> None:
    import shutil

    data = latents(folder, tmp_path / "out", checkpoint)
    shutil.copytree(checkpoint, tmp_path / "other")
    assert batches_of(
        recipe_of(data, **{part: {"kind": "checkpoint", "path": tmp_path / "other"}})
    )  # a copy is the same
    weights = tmp_path / "other" / f"{'vae' if part == 'vae' else 'text_encoder'}.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(DataError, match=rf"made by another {name} \([0-9a-f]{{12}}\) than .*other \([0-9a-f]{{12}}\)"):
        batches_of(recipe_of(data, **{part: {"kind": "checkpoint", "path": tmp_path / "other"}}))


def test_texts_of_another_length_and_other_strides(
    folder: Path, tmp_path: Path, checkpoint: Path, recipe_of: RecipeOf
) -> None:
    data = latents(folder, tmp_path / "out", checkpoint)
    with pytest.raises(DataError, match=r"the texts have 16 tokens, \[text\] max_tokens is 8"):
        batches_of(recipe_of(data, text={"kind": "checkpoint", "path": checkpoint, "max_tokens": 8}))
    with pytest.raises(DataError, match="strides 1, 2 given, the latents have 1; leave strides out"):
        batches_of(recipe_of({**data, "strides": [1, 2]}))
    assert batches_of(recipe_of({**data, "strides": [1]}))


def test_unfinished_latents_are_an_error(folder: Path, tmp_path: Path, checkpoint: Path, recipe_of: RecipeOf) -> None:
    data = latents(folder, tmp_path / "out", checkpoint)
    index = tmp_path / "out" / "shards.json"
    index.write_text(index.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(DataError, match="not all there; give the same 'stiv data latents' again"):
        batches_of(recipe_of(data))


def test_latents_without_their_index_are_an_error(
    folder: Path, tmp_path: Path, checkpoint: Path, recipe_of: RecipeOf
) -> None:
    data = latents(folder, tmp_path / "out", checkpoint)
    (tmp_path / "out" / "shards.json").unlink()
    with pytest.raises(DataError, match="these are shards of latents, not of videos, or their shards.json is missing"):
        batches_of(recipe_of(data))


def test_a_damaged_sample_of_latents_is_replaced(
    folder: Path, tmp_path: Path, checkpoint: Path, recipe_of: RecipeOf
) -> None:
    from stiv_deploy.stiv_ref.data.tars import read_shard

    data = latents(folder, tmp_path / "out", checkpoint)
    (path,) = (tmp_path / "out").glob("*.tar")
    member = read_shard(path)[0][1].members["safetensors"]
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(member.offset)
        file.write(b"\xff" * 64)
    recipe = recipe_of(data)
    source = open_source(recipe, recipe.stages[0], 1)
    names = {name for (batch,) in source.batches(range(4), [range(4)]) for name in batch.names}
    assert names == {"0.mkv", "2.mkv", "3.mkv"}
    (line,) = source.broken()
    assert line.startswith("latents-000000.tar/latents-000000-000001: damaged")


def test_latents_have_no_stills(folder: Path, tmp_path: Path, checkpoint: Path, recipe_of: RecipeOf) -> None:
    recipe = recipe_of(latents(folder, tmp_path / "out", checkpoint))
    with pytest.raises(DataError, match="latents have no pixels"):
        open_source(recipe, recipe.stages[0], 1).stills(4)


def test_commands_say_what_they_did(folder: Path, tmp_path: Path, checkpoint: Path) -> None:
    (folder / "2.mkv").write_bytes(b"damaged")
    packed = CliRunner().invoke(cli, ["shards", str(folder), str(tmp_path / "s"), "--per-shard", "2", "--quiet"])
    assert packed.exit_code == 0
    assert "skipped 2.mkv: " in packed.output
    assert f"3 videos in 2 shards in {tmp_path / 's'}" in packed.output
    arguments = ["latents", str(tmp_path / "s"), str(tmp_path / "l"), "--vae", str(checkpoint), "--frames", "2"]
    made = CliRunner().invoke(cli, [*arguments, "--resolution", "16x16"])
    assert made.exit_code == 0
    assert f"latents float16 [2, 4, h, w] in {tmp_path / 'l'}" in made.output


@pytest.mark.parametrize("size", ["16", "16x", "x16", "16x16x16", "0x0", "axb"])
def test_a_resolution_that_is_none_is_an_error(folder: Path, tmp_path: Path, checkpoint: Path, size: str) -> None:
    arguments = ["--vae", str(checkpoint), "--frames", "2", "--resolution", size]
    result = CliRunner().invoke(cli, ["latents", str(folder), str(tmp_path / "l"), *arguments])
    assert result.exit_code == 2 or getattr(result.exception, "exit_code", None) == 2
    assert not (tmp_path / "l").exists()


def test_captions_are_not_given_for_shards(folder: Path, tmp_path: Path, checkpoint: Path) -> None:
    run("shards", folder, tmp_path / "shards", "--quiet")
    with pytest.raises(DataError, match="shards have their captions inside"):
        latents(tmp_path / "shards", tmp_path / "out", checkpoint, "--captions", tmp_path / "x.jsonl")
