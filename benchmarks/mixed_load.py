"""Eight clips of different steps and guidance through one engine, against one after another.

    python benchmarks/mixed_load.py BUNDLE --out benchmarks/results/NAME.json

Both ways make the same clips, from the same noise, with the same graphs, and run by turns; the ratio is the median over
repeats of the time of one after another by the time of the engine, after a warm-up. Alone, a clip has exactly the rows
that its guidance needs; in the engine, clips join as soon as slots and rows are free and leave when they are done.
``rows_filled`` is the share of the rows computed by the engine that were some clip's.
"""

import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from command import run

from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import dimensions
from stiv_deploy.runtime.pipeline.tokenization import PromptTokenizer
from stiv_deploy.runtime.sampling.conditioning import frame_mask, micro_conditions
from stiv_deploy.runtime.sampling.engine import StepEngine
from stiv_deploy.runtime.sampling.guidance import GuidanceMode
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.text_stage import TextStage, Tokens

PROMPTS = (
    "a red star moving left",
    "a cyan ring moving down",
    "a green square moving right",
    "a magenta triangle moving up",
)
LOAD = (
    SamplingSettings(steps=10),
    SamplingSettings(steps=6, guidance_scale=4.0, renorm=False),
    SamplingSettings(steps=8, guidance_mode=GuidanceMode.SIT),
    SamplingSettings(steps=12, guidance_mode=GuidanceMode.NONE),
    SamplingSettings(steps=5, solver=Solver.HEUN),
    SamplingSettings(steps=14, time_shift=3.0),
    SamplingSettings(steps=7, guidance_mode=GuidanceMode.SIT, guidance_scale=3.0, solver=Solver.HEUN),
    SamplingSettings(steps=9, guidance_mode=GuidanceMode.NONE, time_shift=2.0),
)
"""Steps, guidance, solver and shift of the eight clips; every second one is given its first frame."""


class Load:
    """The clips, and engines to make them with; text is encoded before the first measurement and kept."""

    def __init__(self, bundle: Bundle, backend: Backend, slots: int, rungs: tuple[int, ...]) -> None:
        self.backend, self.manifest = backend, bundle.manifest
        self.text = TextStage(backend, bundle.manifest)
        self.samples = [self._sample(bundle, index) for index in range(len(LOAD))]
        self.together = self._engine(slots, rungs)
        counts = {len(sample.settings.rows()) for sample in self.samples}
        self.alone = {rows: self._engine(1, (rows,)) for rows in counts}

    def _dims(self, slots: int, rows: int) -> dict[str, int]:
        model, size = self.manifest.model, self.manifest.sampling
        return dimensions(
            model,
            batch=slots,
            model_batch=rows,
            video_frames=size.frames,
            height=size.height,
            width=size.width,
            text_tokens=model.max_text_tokens,
        )

    def _engine(self, slots: int, rungs: tuple[int, ...]) -> StepEngine:
        return StepEngine(self.backend, self.manifest, self._dims(slots, rungs[-1]), self.text, rungs=rungs)

    def _sample(self, bundle: Bundle, index: int) -> Sample:
        dims, size = self._dims(1, 1), self.manifest.sampling
        shape = (dims["frames"], self.manifest.model.latent_channels, dims["latent_height"], dims["latent_width"])
        draw = np.random.default_rng(index).standard_normal
        ids, mask = PromptTokenizer(bundle)([PROMPTS[index % len(PROMPTS)], ""])
        return Sample(
            noise=draw(shape, dtype=np.float32),
            clean=draw(shape, dtype=np.float32),
            frame_mask=frame_mask(shape[0], [0] * (index % 2)),
            micro=micro_conditions(size.height, size.width, 1, size.frames),
            text=Tokens(ids[0], mask[0]),
            negative=Tokens(ids[1], mask[1]),
            settings=LOAD[index],
        )

    def one_after_another(self) -> list[np.ndarray]:
        """Latents of every clip, made alone."""
        return [_drain(self.alone[len(sample.settings.rows())], [sample], [])[0] for sample in self.samples]

    def through_the_engine(self, rows: list[int] | None = None) -> list[np.ndarray]:
        """Latents of every clip, made together; the rows in use at every tick are appended to ``rows``."""
        return _drain(self.together, self.samples, [] if rows is None else rows)

    def rows_filled(self) -> float:
        """Share of the rows computed by the engine that were some clip's."""
        rows: list[int] = []
        self.through_the_engine(rows)
        return sum(rows) / sum(next(rung for rung in self.together.rungs if rung >= used) for used in rows)


def _drain(engine: StepEngine, samples: list[Sample], rows: list[int]) -> list[np.ndarray]:
    """Make ``samples`` in ``engine``, each admitted as soon as it fits; latents in their order."""
    waiting, places, made = list(enumerate(samples)), {}, {}
    while waiting or engine.running:
        while waiting and engine.fits(waiting[0][1]):
            number, sample = waiting.pop(0)
            places[engine.admit(sample)] = number
        rows.append(engine.used_rows)
        tick = engine.tick()
        assert not tick.failed
        made |= {places[slot]: latents for slot, latents in tick.finished.items()}
    return [made[number] for number in range(len(samples))]


def measure(load: Load, repeats: int) -> dict[str, Any]:
    """Seconds of both ways by turns, their ratio, and the largest difference between what they made."""
    ways = {"one_after_another": load.one_after_another, "through_the_engine": load.through_the_engine}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    made = {name: way() for name, way in ways.items()}  # warm-up
    for repeat in range(repeats):
        for name in list(ways)[:: 1 if repeat % 2 else -1]:
            started = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started)
    pairs = zip(*(made[name] for name in ways), strict=True)
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    return {
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "rel_l2_between": max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs),
        "rows_filled": round(load.rows_filled(), 3),
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
    backend: Annotated[str, typer.Option(help="Backend.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs of each way.")] = 9,
    slots: Annotated[int, typer.Option(min=1, help="Clips in the engine at a time.")] = 4,
    rungs: Annotated[str, typer.Option(help="Numbers of rows that calls of the model have.")] = "1,2,4,8",
) -> None:
    """Measure a mixed load both ways, print the result, and write it as JSON."""
    ladder = tuple(int(text) for text in rungs.split(","))
    opened = Bundle.open(bundle)
    with open_backend(backend, opened, threads) as running:
        result = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": "python benchmarks/mixed_load.py BUNDLE"
            f" --backend {backend} --threads {threads} --repeats {repeats} --slots {slots} --rungs {rungs}",
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {running.device}",
            "backend": running.name,
            **measure(Load(opened, running, slots, ladder), repeats),
        }
    typer.echo(json.dumps(result, indent=2))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
