"""Engines over teams of devices, and what one device makes of the same clips."""

from functools import partial
from typing import Any

import numpy as np
from engine_clips import finish, make_engine, sample_of, settings_of

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.sampling.engine import StepEngine
from stiv_deploy.runtime.sampling.parallel.devices import ParallelDenoiser
from stiv_deploy.runtime.sampling.parallel.opening import open_team
from stiv_deploy.runtime.sampling.parallel.shards import group_rows, switch_bytes
from stiv_deploy.runtime.sampling.parallel.team import Team

EPS = float(np.finfo(np.float32).eps)
FRAMES, TOKENS, WIDTH, BLOCKS = 3, 16, 4, 2
CLIPS = [
    sample_of(settings_of("jit"), [0], seed=0),
    sample_of(settings_of("none", steps=3), seed=3),
    sample_of(settings_of("sit", steps=4), [1], seed=5),
]
"""Clips of 1, 2 and 3 rows, that end at different times."""


def cpus(bundle: Bundle, count: int, parallel: str | None = None, **options: Any) -> Team:
    return open_team(bundle, ["cpu"] * count, parallel=parallel, threads=1, **options)


def engine_over(team: Team | None, bundle: Bundle, slots: int = 1, **options: Any) -> StepEngine:
    if team is None:
        return make_engine(bundle, slots, **options)
    return make_engine(
        bundle, slots, backend=team.backend, model=partial(ParallelDenoiser, team, team.manifest), **options
    )


def clips_of(team: Team | None, bundle: Bundle) -> dict[int, np.ndarray]:
    """All of :data:`CLIPS` side by side, one admitted late, at changing rungs."""
    engine = engine_over(team, bundle, 3, rungs=(1, 2, 4, 6))
    engine.admit(CLIPS[0])
    engine.tick()
    for clip in CLIPS[1:]:
        engine.admit(clip)
    return finish(engine)


def assert_same(found: np.ndarray, right: np.ndarray) -> None:
    """Equal but for the order in which a mean is summed, which libraries choose by a shape.

    A mean of at most 16 terms is off by 16 units of its size, and enters by a tenth: four of them an evaluation, whose
    velocity is weighed by at most 7 in sum. Steps add up to a time of 1, and the toy's slope carries errors on below 1.
    """
    units = 4 * 1.6 * 7
    np.testing.assert_allclose(found, right, rtol=0, atol=units * EPS * max(1.0, float(np.abs(right).max())))


def evaluation_bytes(rows: int, guidance: int, sequence: int) -> int:
    """Bytes that move between devices in one evaluation of toy clips in fp32, by the formula."""
    counts = [group_rows(rows, guidance, group) for group in range(guidance)]
    switches = sum(2 * BLOCKS * switch_bytes(sequence, count, FRAMES, TOKENS, 4 * WIDTH) for count in counts)
    latents = FRAMES * WIDTH * TOKENS * 4
    first = -(-FRAMES // sequence) * WIDTH * TOKENS * 4  # the leader's own frames of its rows
    ends = 2 * (rows * latents - counts[0] * first)
    times = 4 * (sum(count * sequence for count in counts) - counts[0])
    return switches + ends + times
