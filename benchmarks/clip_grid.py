"""The README's picture: one clip of every digit from a bundle, side by side, enlarged and labelled, as an animated GIF.

    python benchmarks/clip_grid.py BUNDLE --out docs/clips.gif

Seeds count up from ``--seed``; nothing is chosen.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from command import run
from PIL import Image, ImageDraw, ImageFont

from stiv_deploy.runtime.files import replaced_file
from stiv_deploy.runtime.pipeline.media import enlarge
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline

PROMPTS = (
    "digit zero moving up",
    "digit one moving right",
    "digit two moving left",
    "digit three moving down",
    "digit four moving up",
    "digit five moving left",
    "digit six moving right",
    "digit seven moving down",
    "digit eight moving left",
    "digit nine moving right",
)
COLUMNS = 5
GAP, LABEL = 12, 26
"""Pixels between clips, and of the line under each."""
BACKGROUND, INK = (24, 24, 27), (228, 228, 231)
COLORS = 64
HOLD_MS = 700
"""How long the last frame stays."""


def grid(clips: Sequence[np.ndarray], labels: Sequence[str], columns: int, upscale: int) -> list[Image.Image]:
    """The frames of a picture of ``clips``, uint8 [F, H, W, 3] of one size each, in rows of ``columns``."""
    large = [enlarge(clip, upscale) for clip in clips]
    frames, height, width, _ = large[0].shape
    rows = -(-len(large) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + LABEL + GAP) + GAP), BACKGROUND)
    font = ImageFont.load_default(LABEL - 12)
    places = [
        (GAP + index % columns * (width + GAP), GAP + index // columns * (height + LABEL + GAP))
        for index in range(len(large))
    ]
    for (left, top), label in zip(places, labels, strict=True):
        ImageDraw.Draw(sheet).text((left + width / 2, top + height + LABEL / 2), label, INK, font, anchor="mm")
    pictures = [sheet.copy() for _ in range(frames)]
    for place, clip in zip(places, large, strict=True):
        for picture, frame in zip(pictures, clip, strict=True):
            picture.paste(Image.fromarray(frame), place)
    return pictures


def write_gif(path: Path, pictures: Sequence[Image.Image], fps: float) -> None:
    """Write an endless animation in few colors, the same for all frames; raises :class:`OutputError`."""
    palette = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures])).quantize(COLORS)
    first, *rest = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [round(1000 / fps)] * len(rest) + [HOLD_MS]
    with replaced_file(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle of the shipped checkpoint.")],
    out: Annotated[Path, typer.Option(help="The GIF to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the first clip.")] = 0,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.0,
    upscale: Annotated[int, typer.Option(help="Enlarge each pixel this many times.")] = 5,
) -> None:
    """Generate the clips and write them as one picture."""
    with StivPipeline.from_bundle(bundle) as pipe:
        clips = pipe(list(PROMPTS), seed=seed, guidance_scale=guidance).frames
        fps = pipe.bundle.manifest.sampling.frames_per_second
    write_gif(out, grid(list(clips), PROMPTS, COLUMNS, upscale), fps)


if __name__ == "__main__":
    run(main)
