"""Pictures of a training run: its curves from ``log.jsonl`` and contact sheets of clips."""

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.errors import StivRefError
from stiv_deploy.stiv_ref.files import INDEX_LIMIT, parse_json, read_text, replaced_file

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.ImageFont import FreeTypeFont, ImageFont

MARKS = {"right": "#107c10", "wrong": "#c50f1f", None: "#222222"}
SMOOTHING = 50  # steps of the running mean
STRIP_GAP = 2  # pixels between the frames of a film strip
LEAST_CELL = 150  # pixels of a sheet's cell, so that short strips have room for their captions


@dataclass(frozen=True, kw_only=True)
class Row:
    """One clip of a contact sheet: video fp32 [F, 3, H, W] in [-1, 1], its caption and, if judged, the verdict."""

    video: NDArray[np.float32]
    caption: str
    mark: Literal["right", "wrong"] | None = None


@dataclass(frozen=True, kw_only=True)
class StageLog:
    """What ``log.jsonl`` says of one stage: its number, name and task, and its lines by ascending step, each once."""

    stage: int
    name: str
    task: str
    entries: list[dict[str, Any]]

    def values(self, key: str) -> NDArray[np.float64]:
        """``key`` over the steps, fp64 [N], NaN where a line has none."""
        return np.array([entry.get(key, math.nan) for entry in self.entries], np.float64)

    def bands(self) -> dict[str, NDArray[np.float64]]:
        """Loss by tenth of the timestep over the steps, fp64 [N] each, NaN where there was no sample."""
        by_step = [entry.get("loss_by_t", {}) for entry in self.entries]
        names = sorted({name for each in by_step for name in each})
        return {name: np.array([each.get(name, math.nan) for each in by_step], np.float64) for name in names}


def _step_of(line: str) -> dict[str, Any] | None:
    """The line of a step as a dictionary; None for a torn or foreign one."""
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"stage", "task", "step", "loss"} <= entry.keys() else None


def read_stages(path: Path) -> list[StageLog]:
    """All stages of a log in order; a repeated step keeps its last line, torn lines are left out.

    A run that was killed and resumed logs the steps since its last save twice. :class:`StivRefError` if the file
    cannot be read.
    """
    try:
        lines = read_text(path, INDEX_LIMIT).splitlines()
    except ValueError as error:
        raise StivRefError(f"{path}: cannot read the training log ({error})") from None
    stages: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for line in lines:
        if (entry := _step_of(line)) is not None:
            stages.setdefault((entry["stage"], entry["task"]), {})[entry["step"]] = entry
    return [
        StageLog(
            stage=stage,
            name=next(iter(steps.values())).get("name", task),
            task=task,
            entries=[entry for _, entry in sorted(steps.items())],
        )
        for (stage, task), steps in sorted(stages.items())
    ]


def smooth(values: NDArray[np.float64], window: int = SMOOTHING) -> NDArray[np.float64]:
    """Trailing mean [N] of ``values`` [N] over ``window`` steps; NaN and what is before the start do not count."""
    there = np.isfinite(values)
    totals = np.cumsum(np.concatenate(([0.0], np.where(there, values, 0.0))))
    counts = np.cumsum(np.concatenate(([0], there)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    count = counts[ends] - counts[starts]
    return np.where(count > 0, (totals[ends] - totals[starts]) / np.maximum(count, 1), math.nan)


def legend_below(figure: "Figure", columns: int = 6) -> None:
    """What all curves of ``figure`` are, each label once, in rows under the panels: over none of them lies data.

    ``figure`` has the layout "constrained", which makes room.
    """
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=min(columns, len(entries)),
            fontsize=8,
        )


def _save(figure: "Figure", out: Path) -> None:
    """Write ``figure`` as a PNG, whole or not at all."""
    with replaced_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _places(stages: Sequence[StageLog]) -> list[NDArray[np.float64]]:
    """Places of the steps of every stage on one common axis, stage after stage."""
    places, start = [], 0.0
    for stage in stages:
        places.append(start + stage.values("step"))
        start = places[-1][-1] + 1
    return places


def _draw_curve(axes: "Axes", stages: Sequence[StageLog], key: str) -> None:
    """``key`` of all stages, raw and smoothed (a schedule as it is); the VAE in grey, its loss is another quantity."""
    for stage, place in zip(stages, _places(stages), strict=True):
        values = stage.values(key)
        raw, dark = ("#cccccc", "#777777") if stage.stage == 0 else ("#9db4d6", "#1f4e9c")
        axes.plot(place, values, color=raw, linewidth=0.5)
        axes.plot(place, values if key == "learning_rate" else smooth(values), color=dark, linewidth=1.3)


def _draw_bands(axes: "Axes", stages: Sequence[StageLog]) -> None:
    """Smoothed loss of every tenth of the timestep, from dark (noise, t = 0) to light (data, t = 1); legend beside."""
    from matplotlib import colormaps

    for stage, place in zip(stages, _places(stages), strict=True):
        for name, values in stage.bands().items():
            label = f"{name}-{float(name) + 0.1:.1f}"
            known = label in axes.get_legend_handles_labels()[1]
            colour = colormaps["viridis"](float(name))
            axes.plot(place, smooth(values), color=colour, linewidth=1, label=None if known else label)
    axes.legend(title="t", fontsize=7, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0.3)


def _mark_stages(axes: "Axes", stages: Sequence[StageLog], *, named: bool) -> None:
    """A line where every stage begins, and its name above."""
    for stage, place in zip(stages, _places(stages), strict=True):
        axes.axvline(place[0], color="#444444", linewidth=0.7, linestyle=":")
        if named:
            # Down and up by turns, so that the names of short stages do not lie on each other.
            text = stage.name if stage.name.startswith(f"{stage.stage}") else f"{stage.stage} {stage.name}"
            axes.annotate(
                text,
                (place[0], 1),
                xycoords=("data", "axes fraction"),
                xytext=(1, 2 + 9 * (stage.stage % 2)),
                textcoords="offset points",
                fontsize=8,
            )


PANELS = {
    "loss": ("loss", "log"),
    "loss_by_t": ("loss by t", "log"),
    "gradient_norm": ("gradient norm", "log"),
    "learning_rate": ("learning rate", "linear"),
    "tokens_per_second": ("tokens / s", "linear"),
}
"""Curves of :func:`plot_training`: key in the log -> label and scale; those that no line has are left out."""


def plot_training(run: Path, out: Path) -> None:
    """Draw all curves of the run in the folder ``run`` over its steps to the PNG file ``out``.

    Raises :class:`StivRefError` if there is no log or nothing in it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = read_stages(run / "log.jsonl")
    if not stages:
        raise StivRefError(f"{run / 'log.jsonl'}: the training log is empty, there is nothing to plot")
    keys = {key for stage in stages for entry in stage.entries for key in entry}
    panels = {key: look for key, look in PANELS.items() if key in keys}
    figure = Figure(figsize=(9, 0.6 + 2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
    for row, (axes, (key, (label, scale))) in enumerate(zip(rows, panels.items(), strict=True)):
        if key == "loss_by_t":
            _draw_bands(axes, stages)
        else:
            _draw_curve(axes, stages, key)
        axes.set(ylabel=label, yscale=scale)
        axes.grid(True, which="both", linewidth=0.3)
        _mark_stages(axes, stages, named=row == 0)
    rows[-1].set_xlabel(f"step, stage after stage (dark: mean of {SMOOTHING} steps)")
    _save(figure, out)


def label_font() -> "FreeTypeFont | ImageFont":
    """Pillow's own font in 12 pixels; in the 10 that it takes by default it runs words together."""
    from PIL import ImageFont

    return ImageFont.load_default(12)


def fitted(captions: Sequence[str], width: float) -> list[str]:
    """``captions``, those that are wider than ``width`` pixels shortened, with an ellipsis at the end."""
    font = label_font()

    def short(caption: str) -> str:
        if font.getlength(caption) <= width:
            return caption
        ends = range(len(caption))
        kept = bisect_right(ends, width, key=lambda end: font.getlength(f"{caption[:end]}...")) - 1
        return f"{caption[: max(kept, 0)].rstrip()}..."

    return [short(caption) for caption in captions]


def contact_sheet(
    rows: Sequence[Row],
    out: Path,
    *,
    columns: int = 2,
    zoom: int = 2,
    heading: str = "",
    about: Mapping[str, object] | None = None,
) -> None:
    """Write one PNG with every clip as a captioned film strip, ``columns`` strips a line; judged ones green or red.

    Cells are as wide as their captions, up to two strips; a caption that is longer still ends in an ellipsis.

    The PNG's text chunk ``stiv`` holds ``about`` as JSON, with ``captions``, the size of a ``frame`` and the corners of
    the ``strips``, so that pictures can be made of sheets (``training/pictures.py``).
    """
    from PIL import Image, ImageDraw, PngImagePlugin

    frames, _, height, width = rows[0].video.shape
    strip, caption_height, gap = (frames * (width * zoom + STRIP_GAP), height * zoom), 18, 6
    captions = fitted([row.caption for row in rows], 2 * max(strip[0], LEAST_CELL))
    widest = max(math.ceil(label_font().getlength(caption)) for caption in captions)
    cell = (max(strip[0], LEAST_CELL, widest) + gap, strip[1] + caption_height + gap)
    top = 20 if heading else 0
    sheet = Image.new("RGB", (cell[0] * columns + gap, cell[1] * -(-len(rows) // columns) + top + gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.font = label_font()
    draw.text((gap, 3), heading, fill="black")
    strips = []
    for index, row in enumerate(rows):
        x, y = gap + index % columns * cell[0], top + gap + index // columns * cell[1]
        strips.append((x, y + caption_height))
        draw.text((x, y), captions[index], fill=MARKS[row.mark])
        for frame, picture in enumerate(np.asarray(row.video)):
            pixels = ((np.clip(picture, -1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
            image = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(image, (x + frame * (width * zoom + STRIP_GAP), y + caption_height))
        if row.mark is not None:
            box = (x - 2, y + caption_height - 2, x + strip[0], y + caption_height + strip[1] + 1)
            draw.rectangle(box, outline=MARKS[row.mark], width=2)
    told = {"captions": [row.caption for row in rows], "frame": (width * zoom, height * zoom, frames), "strips": strips}
    info = PngImagePlugin.PngInfo()
    info.add_text("stiv", json.dumps({**(about or {}), **told}))
    with replaced_file(out) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=info)
