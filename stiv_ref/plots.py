"""Pictures of a training run: the loss curve from ``log.jsonl`` and contact sheets of clips."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.errors import StivRefError

MARKS = {"right": "#107c10", "wrong": "#c50f1f", None: "#222222"}
SMOOTHING = 50  # steps of the running mean


@dataclass(frozen=True, kw_only=True)
class Row:
    """One clip of a contact sheet: video fp32 [F, 3, H, W] in [-1, 1], its caption and, if judged, the verdict."""

    video: NDArray[np.float32]
    caption: str
    mark: Literal["right", "wrong"] | None = None


def read_log(path: Path) -> dict[tuple[int, str], NDArray[np.float64]]:
    """Losses by (stage number, task) in order, each fp64 [N, 2] of (step, loss); a repeated step keeps its last loss.

    A run that was killed and resumed logs the steps since its last save twice. A torn last line is left out.
    """
    losses: dict[tuple[int, str], dict[int, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StivRefError(f"{path}: cannot read the training log ({error.strerror})") from None
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        losses.setdefault((entry["stage"], entry["task"]), {})[entry["step"]] = entry["loss"]
    return {key: np.array(sorted(steps.items())) for key, steps in sorted(losses.items())}


def smooth(values: NDArray[np.float64], window: int = SMOOTHING) -> NDArray[np.float64]:
    """Trailing mean [N] of ``values`` [N] over ``window`` steps; the first ones average what there is."""
    total = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def plot_loss(log: Path, out: Path) -> None:
    """Draw the loss of every stage in ``log``, raw and smoothed, on a log scale, to the PNG file ``out``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = read_log(log)
    if not stages:
        raise StivRefError(f"{log}: the training log is empty, there is no loss to plot")
    figure = Figure(figsize=(4 * len(stages), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, ((stage, task), curve) in zip(
        np.atleast_1d(figure.subplots(1, len(stages))), stages.items(), strict=True
    ):
        axes.semilogy(curve[:, 0], curve[:, 1], color="#9db4d6", linewidth=0.5)
        axes.semilogy(curve[:, 0], smooth(curve[:, 1]), color="#1f4e9c", linewidth=1.5)
        axes.set(title=f"{stage} {task}", xlabel="step")
        axes.grid(True, which="both", linewidth=0.3)
    figure.axes[0].set_ylabel(f"loss (dark: mean of {SMOOTHING} steps)")
    temporary = out.with_name(f".{out.name}.partial")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.rename(out)


def contact_sheet(rows: Sequence[Row], out: Path, *, columns: int = 2, zoom: int = 2, heading: str = "") -> None:
    """Write one PNG with every clip as a captioned film strip, ``columns`` strips a line; judged ones green or red."""
    from PIL import Image, ImageDraw

    frames, _, height, width = rows[0].video.shape
    strip, caption_height, gap = (frames * (width * zoom + 2), height * zoom), 14, 6
    cell = (max(strip[0], 150) + gap, strip[1] + caption_height + gap)
    top = 18 if heading else 0
    sheet = Image.new("RGB", (cell[0] * columns + gap, cell[1] * -(-len(rows) // columns) + top + gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 3), heading, fill="black")
    for index, row in enumerate(rows):
        x, y = gap + index % columns * cell[0], top + gap + index // columns * cell[1]
        draw.text((x, y), row.caption, fill=MARKS[row.mark])
        for frame, picture in enumerate(np.asarray(row.video)):
            pixels = ((np.clip(picture, -1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
            image = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(image, (x + frame * (width * zoom + 2), y + caption_height))
        if row.mark is not None:
            box = (x - 2, y + caption_height - 2, x + strip[0], y + caption_height + strip[1] + 1)
            draw.rectangle(box, outline=MARKS[row.mark], width=2)
    temporary = out.with_name(f".{out.name}.partial")
    sheet.save(temporary, format="PNG")
    temporary.rename(out)
