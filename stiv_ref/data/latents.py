"""Shards of pre-computed latents and text states as training data: what binds them to their encoders, and reading them.

A sample is ``key.safetensors`` (latents [T, C, h, w]; of the text, if that was encoded too, states [L, Dt], mask [L]
and pooled [Dt]) and ``key.json`` (:class:`SampleFacts`). ``shards.json`` beside the shards says how they were made.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from stiv_deploy.stiv_ref import bounds
from stiv_deploy.stiv_ref.bounds import Count, Seed, Strides
from stiv_deploy.stiv_ref.config import FrozenConfig, StoredType, read_config
from stiv_deploy.stiv_ref.data.encoder_hash import Part, encoder_hash
from stiv_deploy.stiv_ref.data.loader import DamagedSampleError, Sample
from stiv_deploy.stiv_ref.data.tars import Record, read_shard
from stiv_deploy.stiv_ref.errors import DataError
from stiv_deploy.stiv_ref.files import read_text
from stiv_deploy.stiv_ref.recipe import FrozenText, FrozenVae, Recipe, ShardData, Size, Stage
from stiv_deploy.stiv_ref.text import TextStates

INDEX = "shards.json"
TEXT_PARTS = ("states", "mask", "pooled")


class LatentSettings(FrozenConfig):
    """How clips are cut and stored: as a stage of a recipe says, ``clips_per_video`` draws of each video."""

    frames: bounds.Size
    sizes: tuple[Size, ...] = Field(min_length=1, max_length=1_000)
    strides: Strides = (1,)
    clips_per_video: Count = 1
    per_shard: Count = 256
    seed: Seed = 0
    dtype: StoredType = "float16"


class LatentIndex(FrozenConfig):
    """``shards.json``: the settings, hashes of the encoders and of the list of videos, and what came of it.

    ``latent_frames`` and ``latent_channels`` are T and C; ``broken`` has the fault of each video that was skipped, by
    name. It is ``complete`` once all shards are written.
    """

    format: Literal["stiv-latents"] = "stiv-latents"
    format_version: Literal[1] = 1
    complete: bool = False
    settings: LatentSettings
    vae: str
    text: str | None = None
    max_tokens: int | None = None
    videos: str
    latent_frames: bounds.Size
    latent_channels: bounds.Size
    broken: dict[str, str] = {}


class SampleFacts(FrozenConfig):
    """``key.json`` of a sample: name of its video and number of the draw, caption, size in pixels, micro-conditions."""

    name: str
    caption: str
    size: Size
    micro: tuple[float, float, float, float, float, float]


def is_latents(shards: Sequence[Path]) -> bool:
    """Whether these are shards of latents: whether the index beside them says so."""
    path = shards[0].parent / INDEX
    try:
        return '"stiv-latents"' in read_text(path)
    except ValueError:
        return False


def open_latents(data: ShardData, shards: Sequence[Path], recipe: Recipe, stage: Stage) -> "LatentDataset":
    """The latents in ``shards`` for ``stage``; raises :class:`DataError` saying what does not fit the recipe."""
    index = read_config(LatentIndex, shards[0].parent / INDEX)
    if {path.parent for path in shards} != {shards[0].parent}:
        raise DataError(f"{data.path}: shards of latents must be in one folder, with one {INDEX}")
    if not index.complete:
        raise DataError(f"{data.path}: the latents are not all there; give the same 'stiv data latents' again")
    _check_encoders(data.path, index, recipe)
    _check_settings(data, index, recipe, stage)
    return LatentDataset(data.path, shards, index, stage, with_text=isinstance(recipe.text, FrozenText))


def _check_encoders(title: str, index: LatentIndex, recipe: Recipe) -> None:
    if not isinstance(recipe.vae, FrozenVae):
        raise DataError(
            f"{title}: latents need the VAE that made them, frozen; the recipe trains one: give [vae] kind and path"
        )
    _check_hash(title, "vae", index.vae, recipe.vae.path)
    if index.text is None or not isinstance(recipe.text, FrozenText):
        return
    _check_hash(title, "text", index.text, recipe.text.path)
    if recipe.text.max_tokens not in (None, index.max_tokens):
        raise DataError(
            f"{title}: the texts have {index.max_tokens} tokens, [text] max_tokens is {recipe.text.max_tokens}; make "
            "them equal, or make the latents again"
        )


def _check_hash(title: str, part: Part, wanted: str, folder: Path) -> None:
    found = encoder_hash(folder, part)
    if found != wanted:
        name = {"vae": "VAE", "text": "text encoder"}[part]
        raise DataError(
            f"{title}: made by another {name} ({wanted[:12]}) than {folder} ({found[:12]}); give that one as [{part}] "
            "path, or make the latents again with 'stiv data latents'"
        )


def _check_settings(data: ShardData, index: LatentIndex, recipe: Recipe, stage: Stage) -> None:
    settings, patch_frames = index.settings, recipe.patch_of(stage)[0]
    if settings.frames != stage.frames:
        raise DataError(f"{data.path}: clips of {settings.frames} frames; stage {stage.name} takes {stage.frames}")
    if index.latent_frames % patch_frames:
        raise DataError(
            f"{data.path}: {index.latent_frames} latent frames are not a multiple of the temporal patch {patch_frames} "
            f"of stage {stage.name}"
        )
    if index.latent_channels != recipe.model.latent_channels:
        raise DataError(
            f"{data.path}: latents of {index.latent_channels} channels, model {recipe.model.name} takes "
            f"{recipe.model.latent_channels}"
        )
    if "strides" in data.model_fields_set and set(data.strides) != set(settings.strides):
        given, made = (", ".join(map(str, sorted(set(each)))) for each in (data.strides, settings.strides))
        raise DataError(f"{data.path}: strides {given} given, the latents have {made}; leave strides out")


class LatentDataset:
    """Pre-computed samples: a :class:`~stiv_deploy.stiv_ref.data.loader.ClipDataset` of latents fp32 [T, C, h, w]."""

    def __init__(
        self, title: str, shards: Sequence[Path], index: LatentIndex, stage: Stage, *, with_text: bool
    ) -> None:
        self.title, self.index, self.with_text = title, index, with_text and index.text is not None
        self.broken: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.records: list[tuple[Record, SampleFacts]] = []
        for path in shards:
            self._open(path)
        self.total = len(self.records) + len(self.broken)
        self.captions = [facts.caption for _, facts in self.records]
        self._check_sizes(stage)
        self.groups = [
            [number for number, (_, facts) in enumerate(self.records) if facts.size == size] for size in stage.sizes
        ]

    def load(self, group: int, number: int, generator: torch.Generator) -> Sample:
        """As :class:`~stiv_deploy.stiv_ref.data.loader.ClipDataset` says; nothing is drawn, all was before."""
        record, facts = self.records[number]
        try:
            tensors = load(record.members["safetensors"].read())
        except (SafetensorError, DataError) as error:
            raise DamagedSampleError(record.name, f"damaged ({error}); make its shard again") from None
        names = ("latents", *(TEXT_PARTS if self.with_text else ()))
        lacking = [name for name in names if name not in tensors]
        if lacking or tuple(tensors["latents"].shape[:2]) != (self.index.latent_frames, self.index.latent_channels):
            raise DamagedSampleError(record.name, f"does not hold what {INDEX} says; make its shard again")
        return Sample(
            name=facts.name,
            caption=facts.caption,
            latents=tensors["latents"].float(),
            text=_text(tensors) if self.with_text else None,
            micro=torch.tensor(facts.micro),
        )

    def stills(self) -> "LatentDataset":
        """There are no pixels: :class:`DataError`."""
        raise DataError(f"{self.title}: latents have no pixels to show or to train a VAE on; give the videos")

    def _open(self, path: Path) -> None:
        records, fault = read_shard(path)
        if fault:
            self.broken[path.name] = fault
        for record in records:
            try:
                facts = SampleFacts.model_validate_json(record.members["json"].read())
            except (KeyError, ValidationError, DataError):
                self.broken[record.name] = "is no sample of latents"
                continue
            if "safetensors" in record.members:
                self.records.append((record, facts))
            else:
                self.broken[record.name] = "has no latents"

    def _check_sizes(self, stage: Stage) -> None:
        found = Counter(facts.size for _, facts in self.records)
        if set(found) <= set(stage.sizes):
            return
        there = ", ".join(f"{height}x{width} ({count})" for (height, width), count in sorted(found.items()))
        asked = ", ".join(f"{height}x{width}" for height, width in stage.sizes)
        sizes = json.dumps(sorted(found))
        remedy = f"resolution = {sizes[1:-1]}" if len(found) == 1 else f"buckets = {sizes}"
        raise DataError(f"{self.title}: holds samples of {there}; stage {stage.name} has {asked}: write {remedy} in it")


def _text(tensors: dict[str, Tensor]) -> TextStates:
    return TextStates(tensors["states"].float(), tensors["mask"].long(), tensors["pooled"].float())
