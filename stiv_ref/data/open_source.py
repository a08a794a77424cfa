"""Opens the training data that a stage of a recipe asks for."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stiv_deploy.stiv_ref.config import read_config
from stiv_deploy.stiv_ref.data.drawn import DrawnSource, Part, mixed_source
from stiv_deploy.stiv_ref.data.latents import INDEX, LatentIndex, is_latents, open_latents
from stiv_deploy.stiv_ref.data.loader import ClipDataset, DatasetSource
from stiv_deploy.stiv_ref.data.shards import list_video_shards
from stiv_deploy.stiv_ref.data.source import DigitsSource, Source
from stiv_deploy.stiv_ref.data.tars import shard_paths
from stiv_deploy.stiv_ref.data.videos import Listing, VideoDataset, list_videos_of
from stiv_deploy.stiv_ref.data.views.source import views_source
from stiv_deploy.stiv_ref.data.world.source import world_source
from stiv_deploy.stiv_ref.errors import DataError
from stiv_deploy.stiv_ref.recipe import Data, DigitsData, MixedData, Recipe, ShardData, Stage, VideoData
from stiv_deploy.stiv_ref.world_settings import ViewsData, WorldData


def open_source(recipe: Recipe, stage: Stage, number: int) -> Source:
    """The data of ``stage``, which is number ``number`` of ``recipe``, counted from 1 (it seeds the draws).

    Everything is looked into here, so that nothing can be missing later: raises a
    :class:`~stiv_deploy.stiv_ref.errors.StivRefError` that says what is wrong with the data or does not fit the recipe.
    Reading needs no library beyond those of the reference.
    """
    data = recipe.data[stage.data]
    if isinstance(data, DigitsData):
        return DigitsSource(seed=recipe.seed, stage=number, frames=stage.frames, size=stage.sizes[0][0])
    if isinstance(data, WorldData):
        return world_source(data, seed=recipe.seed, stage=number, frames=stage.frames, side=stage.sizes[0][0])
    if isinstance(data, ViewsData):
        return views_source(data, seed=recipe.seed, stage=number, frames=stage.frames, side=stage.sizes[0][0])
    if isinstance(data, MixedData):
        parts = [_part(recipe, stage, number, name, share) for name, share in data.shares.items()]
        return mixed_source(parts, seed=recipe.seed, stage=number)
    return DatasetSource(
        _open_dataset(recipe, stage, data),
        seed=recipe.seed,
        stage=number,
        batch=stage.batch,
        workers=recipe.efficiency.workers,
        max_broken=data.max_broken,
    )


def _part(recipe: Recipe, stage: Stage, number: int, name: str, share: float) -> Part:
    """Data called ``name`` of what a stage mixes; views among clips are for their own task, where frames are given."""
    source = open_source(recipe, stage.model_copy(update={"data": name}), number)
    assert isinstance(source, DrawnSource)
    own = stage.kind.conditioned and isinstance(recipe.data[name], ViewsData)
    return Part(source=source, share=share, task="views" if own else None)


def strides_of(data: Data) -> Sequence[int]:
    """Frame strides that clips of ``data`` have: latents, if they are at hand, tell; digits and views have 1."""
    if isinstance(data, ShardData):
        with suppress(DataError):
            shards = shard_paths(data.path)
            if is_latents(shards):
                return read_config(LatentIndex, shards[0].parent / INDEX).settings.strides
    strides: Sequence[int] = getattr(data, "strides", (1,))
    return strides


def list_source(path: Path, captions: Path | None = None) -> Listing:
    """The videos of a folder, of an index of clips, or of shards: a .tar, a folder of them, or a pattern with ``*``."""
    if path.suffix == ".tar" or "*" in path.name or (path.is_dir() and any(path.glob("*.tar"))):
        if captions is not None:
            raise DataError(f"{path}: shards have their captions inside; leave --captions out")
        return list_video_shards(str(path), shard_paths(str(path)))
    return list_videos_of(VideoData(kind="videos", path=path, captions=captions))


def _open_dataset(recipe: Recipe, stage: Stage, data: VideoData | ShardData) -> ClipDataset:
    if isinstance(data, VideoData):
        listing = list_videos_of(data)
    else:
        shards = shard_paths(data.path)
        if is_latents(shards):
            return open_latents(data, shards, recipe, stage)
        listing = list_video_shards(data.path, shards)
    return VideoDataset(listing, sizes=stage.sizes, frames=stage.frames, strides=data.strides)
