"""What does a VAE in 16 bits cost a picture? Decoded clips of each precision against those in float32, on a CPU.

    python benchmarks/vae_precisions.py --json benchmarks/results/vae-precisions-DATE.json

Clips of moving digits are encoded by the reference in float32. The exported decoder decodes them: its float32 form by
ONNX Runtime, its forms in 16 bits as they are emulated for the export's own check (each operator in float32, its result
rounded), and TF32 by PyTorch, the operands of convolutions and linears rounded to 10 bits. Nothing is timed.
"""

import json
import platform
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer
from torch import Tensor, nn

from stiv_deploy.export.graphs.reduced_check import psnr, reduced_session
from stiv_deploy.export.graphs.writer import GraphWriter
from stiv_deploy.runtime.bundle.contract import Reduced
from stiv_deploy.runtime.pipeline.images import frames_from_video
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, open_checkpoint
from stiv_deploy.stiv_ref.data.moving_digits import MovingDigits

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"
TF32_MASK = ~((1 << 13) - 1)
"""Keeps 10 of the 23 bits of a float32 mantissa."""


def as_tf32(values: Tensor) -> Tensor:
    """``values`` rounded to 10 bits of mantissa, away from zero where two are as near, as tensor cores take them."""
    return ((values.view(torch.int32) + (1 << 12)) & TF32_MASK).view(torch.float32)


class InTf32:
    """``module`` whose convolutions and linears take TF32 operands; leave it and it is as it was."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = [each for each in module.modules() if isinstance(each, nn.Conv2d | nn.Conv3d | nn.Linear)]

    def __enter__(self) -> None:
        self._weights = [layer.weight.data for layer in self._layers]
        for layer in self._layers:
            layer.weight.data = as_tf32(layer.weight.data)
        self._hooks = [
            layer.register_forward_pre_hook(lambda _, args: (as_tf32(args[0].contiguous()),)) for layer in self._layers
        ]

    def __exit__(self, *_: object) -> None:
        for layer, weight, hook in zip(self._layers, self._weights, self._hooks, strict=True):
            layer.weight.data = weight
            hook.remove()


@torch.no_grad()
def latents_of(checkpoint: Checkpoint, clips: int) -> Tensor:
    """Latents [B, T, C, h, w] of clips that the VAE was not trained on."""
    sampling = checkpoint.config.sampling
    digits = MovingDigits("test", sampling.height)
    video = digits.draw(clips, sampling.frames, torch.Generator().manual_seed(0)).video
    latents: Tensor = checkpoint.vae.encode(video)
    return latents


def decodes(checkpoint: Checkpoint, latents: Tensor, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The decoded video of each precision, float32 first."""
    import onnxruntime

    feed = {"latents": latents.numpy()}
    for reduced in get_args(Reduced):
        writer = GraphWriter(checkpoint, folder, "float16", vae_precision=reduced)
        writer.write("decoder")
        if reduced == get_args(Reduced)[0]:
            yield "float32", onnxruntime.InferenceSession(folder / "decoder.onnx").run(None, feed)[0]
            with InTf32(checkpoint.vae), torch.no_grad():
                yield "float32 by TF32", checkpoint.vae.decode(latents).numpy()
        yield reduced, reduced_session(folder / f"decoder.{reduced}.onnx", reduced).run(None, feed)[0]


def row(name: str, video: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """How far ``video`` is from ``truth``, and its frames of 8 bits from those of ``truth``."""
    got, wanted = (frames_from_video(each).astype(np.int16) for each in (video, truth))
    levels = np.abs(got - wanted)
    return {
        "precision": name,
        "psnr_db": round(psnr(video, truth), 1),
        "largest_difference": float(f"{np.abs(video - truth).max():.3g}"),
        "largest_levels": int(levels.max()),
        "equal_values_percent": round(100 * float((levels == 0).mean()), 2),
        "within_one_level_percent": round(100 * float((levels <= 1).mean()), 3),
        "frames_within_one_level_percent": round(100 * float((levels.max(axis=(2, 3, 4)) <= 1).mean()), 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = (
        "| decoder | PSNR, dB | largest difference of 2 | in levels of 255 | values equal, % | within 1 level, % "
        "| frames within 1 level, % |"
    )
    lines = [f"| {' | '.join(str(cell) for cell in each.values())} |" for each in rows]
    return "\n".join([head, "|---|---|---|---|---|---|---|", *lines])


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")] = CHECKPOINT,
    clips: Annotated[int, typer.Option(min=1, help="Clips to decode.")] = 32,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure what the precisions of a VAE's decoder lose."""
    opened = open_checkpoint(checkpoint).load()
    with tempfile.TemporaryDirectory() as folder:
        (_, truth), *others = decodes(opened, latents_of(opened, clips), Path(folder))
    rows = [row(name, video, truth) for name, video in others]
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/vae_precisions.py --clips {clips}",
        "checkpoint": checkpoint.name,
        "video": list(truth.shape),
        "versions": {"python": platform.python_version()} | {tool: version(tool) for tool in ("torch", "onnxruntime")},
        "rows": rows,
    }
    typer.echo(table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from command import run

    run(main)
