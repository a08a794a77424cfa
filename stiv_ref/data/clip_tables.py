"""An index of clips in words: how its scores are spread, and what was dropped for what."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from stiv_deploy.stiv_ref.data.clips import Clip
from stiv_deploy.stiv_ref.data.video_files import VideoFiles

if TYPE_CHECKING:
    from stiv_deploy.stiv_ref.data.clip_engine import Report

QUANTILES = {"least": 0, "10 %": 10, "median": 50, "90 %": 90, "most": 100}
SCORES = {
    "duration (s)": "seconds",
    "shorter side (px)": "side",
    "motion (% of it per s)": "motion",
    "sharpness": "sharpness",
}
LISTED = 10  # broken videos; the others are in the report


def clip_table(clips: Sequence[Clip]) -> Table:
    """Quantiles of every score over all ``clips``: what thresholds are chosen by."""
    table = Table(title="all clips")
    table.add_column("score")
    for name in QUANTILES:
        table.add_column(name, justify="right")
    for title, name in SCORES.items():
        values = [min(clip.width, clip.height) if name == "side" else getattr(clip, name) for clip in clips]
        table.add_row(title, *(f"{value:.4g}" for value in np.percentile(values, list(QUANTILES.values()))))
    return table


def lines_of(clips: Sequence[Clip], report: "Report | None") -> Iterator[str]:
    """The counts, one line each; ``report`` adds the broken videos and the files that are none."""
    kept = [clip for clip in clips if clip.kept]
    seconds, all_seconds = (sum(clip.seconds for clip in each) for each in (kept, clips))
    videos = len({clip.file for clip in clips})
    yield f"{videos} videos, {len(clips)} clips ({all_seconds:.1f} s), kept {len(kept)} ({seconds:.1f} s)"
    for reason, count in Counter(reason for clip in clips for reason in clip.dropped).most_common():
        yield f"dropped {count}: {reason}"
    if uncaptioned := sum(clip.caption is None for clip in kept):
        yield f"{uncaptioned} of the kept clips have no caption"
    for mark in ("interlaced", "hdr"):
        if marked := len({clip.file for clip in clips if getattr(clip, mark)}):
            yield f"{marked} videos are {mark.replace('hdr', 'HDR')}"
    for names, reason in VideoFiles((), report.left_out if report else ()).left_out().items():
        yield f"{names}: {reason}"
    broken = report.broken if report else ()
    if broken:
        yield f"{len(broken)} broken videos skipped:"
        yield from (f"  {each.error}" for each in broken[:LISTED])
        if len(broken) > LISTED:
            yield f"  ... and {len(broken) - LISTED} more, in report.json"
