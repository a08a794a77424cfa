"""What a run tells while it trains: its progress, a JSON line per step in ``log.jsonl``, TensorBoard if asked for.

A line has ``stage`` (its number, 0 is the VAE), ``name``, ``task``, ``step``, what the trainer measured (``loss``,
``gradient_norm``, ``learning_rate``), ``seconds`` of the whole run up to here, resumed or not, ``samples`` whose losses
were seen, ``tokens_per_second`` of the step alone (no saving, no sampling), and ``loss_by_t``: the mean loss of the
samples in each tenth of the timestep, by its lower end, where there were any. ``plots.read_stages`` reads it.
"""

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stiv_deploy.stiv_ref.errors import StivRefError
from stiv_deploy.stiv_ref.files import parse_json
from stiv_deploy.stiv_ref.progress import Progress, unheard
from stiv_deploy.stiv_ref.recipe import Logging

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE = "log.jsonl"
EVENTS = "tensorboard"
"""Folder of the TensorBoard events in the run's folder; every stage is a run of its own in it."""
BANDS = 10
"""Tenths of the timestep."""
TAIL = 1 << 16
"""Bytes at the end of a log that surely hold a whole line."""
MEMORY = 0.98
"""Weight of the past in the running loss of the progress."""


def loss_by_t(timesteps: Tensor, losses: Tensor) -> dict[str, float]:
    """Mean of ``losses`` [N] over the samples with ``timesteps`` [N] in each tenth of [0, 1], by its lower end.

    Tenths without a sample are absent; t = 1 belongs to the last one.
    """
    bands = (timesteps.detach().float() * BANDS).long().clamp(0, BANDS - 1).tolist()
    found: dict[int, list[float]] = {}
    for band, loss in zip(bands, losses.detach().float().tolist(), strict=True):
        found.setdefault(band, []).append(loss)
    return {f"{band / BANDS:.1f}": sum(each) / len(each) for band, each in sorted(found.items())}


def _tail(path: Path) -> bytes:
    """The end of the file, enough for many lines; empty if there is no file."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return file.read()


def resumed_seconds(tail: bytes) -> float:
    """Seconds that a run has trained so far: those of the last whole line of its log; 0 without one."""
    for line in reversed(tail.splitlines()):
        try:
            seconds = float(parse_json(line)["seconds"])
        except (ValueError, KeyError, TypeError):
            continue  # a torn line
        if math.isfinite(seconds):
            return seconds
    return 0.0


def _event_writer() -> "type[SummaryWriter]":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise StivRefError(
            "logging.tensorboard is on, but tensorboard is not installed; run: pip install 'stiv-deploy[tensorboard]', "
            "or take it out of the recipe: log.jsonl holds the same"
        ) from None
    return SummaryWriter


class Log:
    """The log of the run in ``folder``, as a context manager; ``progress`` hears of steps, with loss and throughput.

    Not ``enabled``, as on all ranks but the first, it does nothing at all. Raises :class:`StivRefError` if TensorBoard
    is asked for and not installed.
    """

    def __init__(self, folder: Path, logging: Logging, progress: Progress = unheard, enabled: bool = True) -> None:
        self.folder, self.enabled = folder, enabled
        self._progress = progress if enabled else unheard
        self._writer_kind = _event_writer() if enabled and logging.tensorboard else None
        self._writers: dict[str, SummaryWriter] = {}
        self._average = math.nan
        self._rate = ""

    def __enter__(self) -> "Log":
        now = time.monotonic()
        self._begun = now
        if self.enabled:
            tail = _tail(self.folder / FILE)
            self._started = now - resumed_seconds(tail)
            self._file = (self.folder / FILE).open("a", encoding="utf-8")
            if tail and not tail.endswith(b"\n"):
                self._file.write("\n")  # or the first new line would be lost with the torn one
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()
        if self.enabled:
            self._file.close()

    def steps(self, name: str, steps: range) -> Iterable[int]:
        """Iterate over ``steps``, with progress that counts from 0 to the end of the range."""
        self._average, self._rate = math.nan, ""
        self._progress(name, steps.start, steps.stop)
        for step in steps:
            self._begun = time.monotonic()
            yield step
            self._progress(f"{name}  loss {self._average:.4f}  {self._rate}".rstrip(), step + 1, steps.stop)

    def step(
        self,
        stage: int,
        name: str,
        task: str,
        step: int,
        values: dict[str, float],
        *,
        timesteps: Tensor | None = None,
        losses: Tensor | None = None,
        tokens: int = 0,
    ) -> None:
        """Record one step: ``values`` with ``loss`` among them, its samples' ``timesteps`` and ``losses`` [N].

        ``tokens`` of all processes together went through the model; the time is that since the loop came to this step,
        so call it before anything else is done.
        """
        if not self.enabled:
            return
        now = time.monotonic()
        extra: dict[str, Any] = {}
        if losses is not None:
            extra["samples"] = losses.numel()
        if tokens:
            extra["tokens_per_second"] = round(tokens / max(now - self._begun, 1e-9), 1)
            self._rate = f"{extra['tokens_per_second']:,.0f} tokens/s"
        if timesteps is not None and losses is not None:
            extra["loss_by_t"] = loss_by_t(timesteps, losses)
        place = {"stage": stage, "name": name, "task": task, "step": step}
        self._file.write(json.dumps({**place, **values, **extra, "seconds": round(now - self._started, 2)}) + "\n")
        self._file.flush()
        self._begun = now
        loss = values["loss"]
        self._average = loss if math.isnan(self._average) else MEMORY * self._average + (1 - MEMORY) * loss
        if self._writer_kind is not None:
            self._scalars(f"{stage}-{name}", step, {**values, **extra})

    def _writer(self, run: str, step: int) -> "SummaryWriter":
        """The events of one stage; what an earlier, killed run wrote of ``step`` and later steps is hidden."""
        assert self._writer_kind is not None
        if run not in self._writers:
            self._writers[run] = self._writer_kind(str(self.folder / EVENTS / run), purge_step=step)
        return self._writers[run]

    def _scalars(self, run: str, step: int, values: dict[str, Any]) -> None:
        writer = self._writer(run, step)
        bands = {f"loss_by_t/{band}": loss for band, loss in values.pop("loss_by_t", {}).items()}
        for name, value in {**values, **bands}.items():
            writer.add_scalar(name, value, step)

    def picture(self, stage: int, name: str, step: int, path: Path) -> None:
        """Show the PNG at ``path`` in TensorBoard too, if that is on."""
        if self._writer_kind is None:
            return
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer(f"{stage}-{name}", step).add_image("samples", pixels, step, dataformats="HWC")
