"""Pictures of an index of clips: where the thresholds lie in its scores, and a frame of every clip."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stiv_deploy.stiv_ref.data.clips import Clip
from stiv_deploy.stiv_ref.data.decode import key_frames, read_frames
from stiv_deploy.stiv_ref.data.filters import Thresholds
from stiv_deploy.stiv_ref.errors import VideoError
from stiv_deploy.stiv_ref.files import replaced_file
from stiv_deploy.stiv_ref.plots import label_font, legend_below

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

KEPT, DROPPED = "#107c10", "#c50f1f"
SHOWN = 96  # clips on a sheet: each costs a seek and a frame
COLUMNS = 6
TILE = (200, 120)  # pixels: width, height
LINE = 14
TEXT = 2 * LINE + 6  # the second line of text ends above the frame around the tile


def plot_scores(clips: Sequence[Clip], thresholds: Thresholds, out: Path) -> None:
    """Draw histograms of motion, sharpness and duration, kept and dropped clips, with thresholds, to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    of = thresholds
    _histogram(left, clips, "motion", "motion (% of the shorter side per second)", (of.min_motion, of.max_motion))
    _histogram(middle, clips, "sharpness", "sharpness (variance of the Laplacian)", (of.min_sharpness,))
    _histogram(right, clips, "seconds", "duration (s)", (of.min_seconds, of.max_seconds))
    left.set_ylabel("clips")
    legend_below(figure)
    with replaced_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _histogram(
    axes: "Axes", clips: Sequence[Clip], name: str, label: str, thresholds: tuple[float | None, ...]
) -> None:
    """One score on a log scale: those differ by orders of magnitude. Zeros are at the left end."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    values = np.array([getattr(clip, name) for clip in clips], np.float64)
    kept = np.array([clip.kept for clip in clips], bool)
    lines = [each for each in thresholds if each]
    positive = np.concatenate((values[values > 0], lines))
    low, high = (positive.min() / 1.1, positive.max() * 1.1) if len(positive) else (0.1, 10.0)
    bins = np.geomspace(low, high, 31)
    shown = np.maximum(values, low)
    axes.hist(
        [shown[kept], shown[~kept]], bins=bins.tolist(), stacked=True, color=[KEPT, DROPPED], label=["kept", "dropped"]
    )
    axes.set(xscale="log", xlabel=label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    for line in lines:
        axes.axvline(line, color="black", linestyle="--", linewidth=1)


def clip_sheet(folder: Path, clips: Sequence[Clip], out: Path) -> None:
    """Write a PNG with a frame of every clip in a green frame, or in a red one with the reason why it was dropped.

    ``folder`` is that of the index. Of very many clips, evenly spaced ones are shown.
    """
    from PIL import Image, ImageDraw

    shown = [clips[at] for at in np.unique(np.linspace(0, len(clips) - 1, min(SHOWN, len(clips))).round().astype(int))]
    cell = (TILE[0] + 8, TILE[1] + TEXT + 8)
    sheet = Image.new("RGB", (COLUMNS * cell[0], max(1, -(-len(shown) // COLUMNS)) * cell[1] + 20), "white")
    draw = ImageDraw.Draw(sheet)
    draw.font = label_font()
    draw.text((4, 2), f"{len(shown)} of {len(clips)} clips; green: kept, red: dropped", fill="black")
    for number, clip in enumerate(shown):
        x, y = number % COLUMNS * cell[0] + 4, number // COLUMNS * cell[1] + 20
        colour = KEPT if clip.kept else DROPPED
        draw.text((x, y), _title(clip), fill="black")
        draw.text((x, y + LINE), ", ".join(clip.dropped)[:34] or _scores(clip), fill=colour)
        sheet.paste(_tile(folder, clip), (x, y + TEXT))
        draw.rectangle((x - 2, y + TEXT - 2, x + TILE[0] + 1, y + TEXT + TILE[1] + 1), outline=colour, width=3)
    with replaced_file(out) as temporary:
        sheet.save(temporary, format="PNG")


def _title(clip: Clip) -> str:
    name = Path(clip.file).name
    return f"{name if len(name) <= 20 else '...' + name[-17:]} {clip.start}-{clip.end}"


def _scores(clip: Clip) -> str:
    return f"{clip.seconds:.1f} s  motion {clip.motion:.3g}  sharp {clip.sharpness:.0f}"


def _tile(folder: Path, clip: Clip) -> "Image":
    """A frame near the middle, a key frame if the clip has one, fitted into a tile; grey if it cannot be read."""
    from PIL import Image, ImageOps

    middle = (clip.start + clip.end) // 2
    try:
        keys = key_frames(folder / clip.file)
        inside = keys[(keys >= clip.start) & (keys < clip.end)]
        number = int(inside[np.abs(inside - middle).argmin()]) if len(inside) else middle
        picture = Image.fromarray(read_frames(folder / clip.file, number, 1)[0])
    except VideoError:
        return Image.new("RGB", TILE, "grey")
    return ImageOps.pad(picture, TILE, color="black")
