"""One picture of a bundle, its LoRAs, and the bundle again, which must be what it was: docs/lora.png.

    python benchmarks/lora_sheet.py BUNDLE --lora A.safetensors --lora B.safetensors --out lora.png --json lora.json

A bundle in 8 bits takes no LoRA at load: ``--merged``, in the place of ``--lora``, names bundles that it was merged
into for good. How uneven a background is, is the standard deviation, over places in the outer ring of a frame, of the
brightness there without the object: its middle over the frames.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from command import run

from stiv_deploy.runtime.errors import MeasurementError
from stiv_deploy.runtime.files import replaced_file, write_text
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.stiv_ref.plots import Row, contact_sheet

PROMPTS = (
    "a big red star moving left",
    "the green circle is going up",
    "a white square moving right",
    "yellow triangle moving down",
)
SHOWN = (0, 7, 15)
"""Frames of a strip."""
RING = 12
"""Pixels from the edge."""


def clips(bundle: Path, loras: list[str], seed: int) -> np.ndarray:
    """Clips of all prompts, uint8 [N, F, H, W, 3]."""
    with StivPipeline.from_bundle(bundle, backend="onnxruntime", loras=loras) as pipe:
        return np.concatenate([np.asarray(pipe(prompt, seed=seed).frames) for prompt in PROMPTS])


def unevenness(made: np.ndarray) -> float:
    """Mean over clips uint8 [N, F, H, W, 3] of how uneven the background is, in levels of 255."""
    still = np.median(made.astype(np.float64).mean(-1), axis=1)  # (N, H, W)
    ring = np.ones(still.shape[1:], bool)
    ring[RING:-RING, RING:-RING] = False
    return float(still[:, ring].std(axis=1).mean())


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle of the shipped checkpoint.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    lora: Annotated[list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="LoRA; repeat it.")] = None,
    merged: Annotated[list[Path] | None, typer.Option(help="Bundle with a LoRA merged for good; repeat it.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Numbers, as JSON.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every clip.")] = 1,
) -> None:
    """Make the clips, compare the first with the last, and write them as one picture."""
    ways = [
        (bundle, []),
        *((bundle, [each]) for each in lora or ()),
        *((each, []) for each in merged or ()),
        (bundle, []),
    ]
    names = ["base", *(chr(ord("A") + number) for number in range(len(ways) - 2)), "base again"]
    made = [clips(where, loras, seed) for where, loras in ways]
    if not np.array_equal(made[0], made[-1]):
        raise MeasurementError("the bundle made other clips after its LoRAs than before")
    cells = [
        Row(video=clip[number][list(SHOWN)].transpose(0, 3, 1, 2) / 127.5 - 1, caption=f"{name}: {prompt}")
        for number, prompt in enumerate(PROMPTS)
        for name, clip in zip(names, made, strict=True)
    ]
    with replaced_file(out) as temporary:
        contact_sheet(cells, temporary, columns=len(ways), zoom=1)
    values = {name: round(unevenness(each), 2) for name, each in zip(names, made, strict=True)}
    text = json.dumps({"bundle": str(bundle.name), "seed": seed, "bit_equal": True, "unevenness": values}, indent=1)
    typer.echo(text)
    if json_file is not None:
        write_text(json_file, text + "\n")


if __name__ == "__main__":
    run(main)
