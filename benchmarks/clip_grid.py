"""The README's picture: ten clips of the world from a bundle, side by side, enlarged and labelled, as a moving WebP.

    python benchmarks/clip_grid.py BUNDLE --out docs/clips.webp

Seeds count up from ``--seed``; nothing is chosen.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from command import run
from PIL import Image

from stiv_deploy.runtime.files import replaced_file
from stiv_deploy.runtime.pipeline.grid import grid
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline

PROMPTS = (
    "a big red star moving left",
    "the green circle is going up",
    "blue square moving right",
    "yellow triangle moving down",
    "the cyan ring stands still",
    "a magenta cross moving up",
    "an orange star moving right",
    "the white circle is going down",
    "a green triangle moving left",
    "blue ring moving up",
)
COLUMNS = 5
QUALITY = 80
HOLD_MS = 700
"""How long the last frame stays."""


def write_webp(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 [F, H, W, 3] as an endless animation.

    Raises :class:`OutputError`.
    """
    first, *rest = [Image.fromarray(frame) for frame in frames]
    durations = [round(1000 / fps)] * len(rest) + [HOLD_MS]
    with replaced_file(path) as temporary:
        first.save(
            temporary, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, quality=QUALITY, method=6
        )


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle of the shipped checkpoint.")],
    out: Annotated[Path, typer.Option(help="The WebP to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the first clip.")] = 0,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.0,
    upscale: Annotated[int, typer.Option(help="Enlarge each pixel this many times.")] = 3,
) -> None:
    """Generate the clips and write them as one picture."""
    with StivPipeline.from_bundle(bundle) as pipe:
        clips = pipe(list(PROMPTS), seed=seed, guidance_scale=guidance).frames
        fps = pipe.bundle.manifest.sampling.frames_per_second
    write_webp(out, grid(list(clips), PROMPTS, upscale, COLUMNS), fps)


if __name__ == "__main__":
    run(main)
