"""Would a kernel of its own pay for the guidance step? Its time in PyTorch against the bytes that it must move.

The step is what the ``step`` graph does after each model call, in the usual setting: JIT-CFG with CFG-Renorm, Euler
update, frame replacement, and the next input of both branches. Latents are fp32, 8 pixels to a latent.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timing import Timing, Work, buffer_sets, interleaved
from torch import Tensor

from kernels.contenders import COMPILED, COPY, EAGER, Bench
from kernels.outcome import Outcome, Save, table
from stiv_deploy.stiv_ref.conditioning import noise_frames, replace_frames
from stiv_deploy.stiv_ref.guidance import cfg_renorm, jit_cfg

LATENT, CHANNELS, FRAMES, BATCH = 8, 4, 20, 2
SCALE, STEP = 7.5, 0.02
ROUNDS, REPLAYS = 15, 50
BYTES = 4
TENSORS = 8
"""Read: two branches' velocities, latents, clean, noise; written: next latents and both branches' next input."""


@dataclass(frozen=True)
class State:
    """Tensors of one step: ``velocity`` [2, B, T, C, h, w], the others [B, T, C, h, w]; ``frame_mask`` bool [B, T]."""

    velocity: Tensor
    latents: Tensor
    clean: Tensor
    noise: Tensor
    frame_mask: Tensor
    next_time: Tensor


def new_state(generator: torch.Generator, pixels: int) -> State:
    """Random numbers; the first frame of each clip is given."""
    shape = (BATCH, FRAMES, CHANNELS, pixels // LATENT, pixels // LATENT)

    def normal(*leading: int) -> Tensor:
        return torch.randn((*leading, *shape), generator=generator, device=generator.device)

    mask = torch.zeros(BATCH, FRAMES, dtype=torch.bool, device=generator.device)
    mask[:, 0] = True
    return State(normal(2), normal(), normal(), normal(), mask, torch.full((BATCH,), 0.5, device=generator.device))


def guided_step(state: State) -> tuple[Tensor, Tensor]:
    """Next latents, and the next input of both branches, the unconditional one with its given frames noised."""
    conditional, unconditional = state.velocity
    guided = cfg_renorm(jit_cfg(conditional, unconditional, SCALE), conditional, state.frame_mask)
    latents = replace_frames(state.latents + STEP * guided, state.clean, state.frame_mask)
    hidden = noise_frames(latents, state.clean, state.noise, state.next_time, state.frame_mask)
    return latents, torch.stack((latents, hidden))


@dataclass
class Row:
    """One size: bytes that must be moved, and times."""

    pixels: int
    nbytes: int
    times: dict[str, Timing] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def least_us(self) -> float:
        """Time of a copy of as many bytes: what no kernel beats."""
        return self.times[COPY].median_us

    @property
    def best(self) -> float:
        """Fastest PyTorch has."""
        return min(timing.median_us for name, timing in self.times.items() if name != COPY)

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        times = {name: asdict(timing) for name, timing in self.times.items()}
        return {"pixels": self.pixels, "bytes": self.nbytes, "times": times, "absent": self.absent}


def measure_step(bench: Bench, sizes: tuple[int, ...], save: Save) -> Outcome:
    """Time the step at ``sizes`` pixels."""
    started, rows = time.monotonic(), []
    for pixels in sizes:
        rows.append(_time(bench, pixels))
        outcome = report(rows, time.monotonic() - started)
        save(outcome)
    return outcome


def _time(bench: Bench, pixels: int) -> Row:
    nbytes = TENSORS * BYTES * BATCH * FRAMES * CHANNELS * (pixels // LATENT) ** 2
    row, generator = Row(pixels, nbytes), torch.Generator(bench.device).manual_seed(0)
    sets = [new_state(generator, pixels) for _ in range(buffer_sets(nbytes, bench.device))]
    works: dict[str, Work] = {
        COPY: _copies(bench, nbytes, len(sets)),
        EAGER: lambda number: guided_step(sets[number % len(sets)]),
    }
    try:
        compiled = _compiled(bench)
        compiled(sets[0])
        works[COMPILED] = lambda number: compiled(sets[number % len(sets)])
    except Exception as error:  # whatever a compiler raises: it is told, and the others are timed
        row.absent[COMPILED] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    rounds, replays = (ROUNDS, REPLAYS) if bench.on_gpu else (3, 2)
    row.times = interleaved(works, rounds, replays, bench.device)
    return row


def _compiled(bench: Bench) -> Callable[[State], object]:
    torch.compiler.reset()
    return bench.compiled(guided_step)  # type: ignore[arg-type, return-value]


def _copies(bench: Bench, nbytes: int, count: int) -> Work:
    half = nbytes // 2
    pairs = [torch.randint(0, 256, (2, half), dtype=torch.uint8, device=bench.device) for _ in range(count)]

    def work(number: int) -> None:
        pair = pairs[number % count]
        pair[1].copy_(pair[0])

    return work


def report(rows: list[Row], seconds: float) -> Outcome:
    """A table; what a kernel could save at most is the fastest time less that of the copy."""
    head = ("pixels", "MB", "copy of as many bytes, us", "eager, us", "compile, us", "a kernel saves at most, us")
    cells = [
        [
            f"{row.pixels}",
            f"{row.nbytes / 1e6:.1f}",
            *(f"{row.times[name].median_us:.1f}" if name in row.times else "-" for name in (COPY, EAGER, COMPILED)),
            f"{row.best - row.least_us:.1f}",
        ]
        for row in rows
    ]
    text = table(head, cells)
    gaps = [f"- {row.pixels} px, {name}: {why}" for row in rows for name, why in row.absent.items()]
    markdown = "\n\n".join((text, *(["Not measured:\n\n" + "\n".join(gaps)] if gaps else [])))
    return Outcome("step", "measured", "", markdown, {"rows": [row.to_json() for row in rows]}, seconds)


def verdict(step: dict[str, Any], blocks: list[dict[str, Any]]) -> list[str]:
    """What a kernel for the step could save of a sampling step, where a block of that size was timed.

    ``step`` is the part's data, ``blocks`` the rows of the block baselines; XL has 28 blocks, M 46.
    """
    lines = []
    for row in step.get("rows", []):
        times = {name: timing["median_us"] for name, timing in row["times"].items()}
        saved = min(value for name, value in times.items() if name != COPY) - times[COPY]
        for model, count in (("XL", 28), ("M", 46)):
            timed = [
                each["timing"]["median_us"]
                for each in blocks
                if each["case"]["model"] == model and each["case"]["pixels"] == row["pixels"] and each.get("timing")
            ]
            if timed:
                share = saved / (count * min(timed) + times[COPY] + saved)
                lines.append(
                    f"- {model}, {row['pixels']} px: at most {saved:.1f} us, {share:.3%} of a step of {count} blocks "
                    f"of {min(timed):,.0f} us."
                )
    return lines
