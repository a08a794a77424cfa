"""Faults of the runtime's own code, to be planted for a while: masks, steps, branches, tables, copies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from stiv_deploy.runtime.sampling import denoiser, engine, settings, solvers, text_stage
from stiv_deploy.runtime.sampling.denoiser import Denoiser
from stiv_deploy.runtime.sampling.engine import StepEngine
from stiv_deploy.runtime.sampling.guidance import BRANCHES, Branch, GuidanceMode
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.settings import SamplingSettings
from stiv_deploy.runtime.sampling.solvers import Evaluation
from stiv_deploy.runtime.sampling.step_inputs import StepInputs
from stiv_deploy.runtime.sampling.text_stage import TextStage

Instead = Callable[[Callable[..., Any]], Callable[..., Any]]
"""From a right function to a wrong one."""
Place = tuple[object, str]


def _changed(place: Place, instead: Instead) -> Callable[[], Any]:
    """Plants a fault: the function at ``place`` is another one."""
    owner, name = place
    return lambda: patch.object(owner, name, instead(getattr(owner, name)))


def _evaluations(change: Callable[[Evaluation], Evaluation]) -> Callable[[], Any]:
    return _changed((engine, "evaluations"), lambda right: lambda chosen: tuple(map(change, right(chosen))))


def _branches(change: Callable[[tuple[Branch, ...]], tuple[Branch, ...]]) -> Callable[[], Any]:
    return lambda: patch.dict(BRANCHES, {mode: change(BRANCHES[mode]) for mode in GuidanceMode})


def _nothing(_right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *_, **__: None


def _property(name: str, value: Callable[[Any], Any]) -> Callable[[], Any]:
    return lambda: patch.object(SamplingSettings, name, property(value))


FAULTS: dict[str, Callable[[], Any]] = {
    "mask polarity: rows get what is not given": _changed(
        (engine, "row_mask"), lambda right: lambda branch, mask: right(branch, ~mask)
    ),
    "mask polarity: the branches that do not see the image": _changed(
        (engine, "row_mask"), lambda right: lambda branch, mask: right(branch._replace(image=not branch.image), mask)
    ),
    "mask polarity: frames that the step keeps": _changed(
        (StepInputs, "guide"),
        lambda right: lambda self, slot, mask, rows, *, renorm: right(self, slot, ~mask, rows, renorm=renorm),
    ),
    "mask polarity: text": _changed((text_stage, "additive_mask"), lambda right: lambda mask: right(1 - mask)),
    "step: each at the time of the next": _evaluations(lambda each: each._replace(timestep=each.next_timestep)),
    "step: the next input at this time": _evaluations(lambda each: each._replace(next_timestep=each.timestep)),
    "step: one evaluation late": _changed(
        (engine, "evaluations"), lambda right: lambda chosen: (right(chosen)[0], *right(chosen)[:-1])
    ),
    "step: times from 1 to 0": _evaluations(lambda each: each._replace(timestep=1 - each.timestep)),
    "step: 1 % too long": _evaluations(lambda each: each._replace(dt=1.01 * each.dt)),
    "step: the predictor moves the clip": _evaluations(lambda each: each._replace(hold=False)),
    "step: velocities weighed the wrong way round": _evaluations(
        lambda each: each._replace(weights=(each.weights[1], each.weights[0])) if each.weights[1] else each
    ),
    "step: time shift ignored": _changed((settings, "schedule"), lambda right: lambda steps, shift: right(steps, 1.0)),
    "step: both sides are one": _changed(
        (StepInputs, "both_ways"), lambda right: lambda self, rows: (right(self, rows)[0],) * 2
    ),
    "branches: in reverse": _branches(lambda order: order[::-1]),
    "branches: the first two swapped": _branches(lambda order: (*order[1::-1], *order[2:])),
    "branches: text where none should be": _branches(lambda order: tuple(Branch(True, each.image) for each in order)),
    "branches: weights in reverse": _changed(
        (settings, "branch_weights"), lambda right: lambda *values: right(*values)[::-1]
    ),
    "branches: scales swapped": _changed(
        (settings, "branch_weights"), lambda right: lambda mode, text, image: right(mode, image, text)
    ),
    "branches: renormalized against the request": _property("renormalizes", lambda self: not self.renorm),
    "branches: guided everywhere": _changed((SamplingSettings, "guides"), lambda _: lambda self, time: True),
    "branches: guided outside the interval": _changed(
        (SamplingSettings, "guides"), lambda right: lambda self, time: not right(self, time)
    ),
    "frames: clean where they are to be on the path": _changed(
        (Sample, "between"), lambda _: lambda self, time: self.clean
    ),
    "frames: the path run backwards": _changed(
        (Sample, "between"), lambda right: lambda self, time: right(self, 1 - time)
    ),
    "frames: not zero where they are to be": _changed((StepEngine, "_zero"), _nothing),
    "frames: zero where they are to be noised": _changed(
        (Sample, "zeroed"), lambda _: lambda self, branch: self.frame_mask & (not branch.image)
    ),
    "frames: the given one is the next": _changed(
        (Sample, "start"), lambda right: lambda self, mask: right(self, np.roll(mask, 1))
    ),
    "rows: all have one text": _changed(
        (TextStage, "__call__"),
        lambda right: lambda self, tokens: next(iter(self._kept.values()), None) or right(self, tokens),
    ),
    "rows: text stays when one moves": _changed((Denoiser, "move_row"), _nothing),
    "rows: what is said stays when one moves": _changed((StepInputs, "move_row"), _nothing),
    "rows: not gathered anew": _changed((StepInputs, "gather"), lambda right: _only_once_by_slot(right)),
    "rows: no micro-conditions": _changed(
        (Denoiser, "set_row"), lambda right: lambda self, row, text, micro: right(self, row, text, 0 * micro)
    ),
    "tables: rows and columns swapped": _changed(
        (denoiser, "rope_tables"),
        lambda right: (
            lambda model, dims: right(
                model, dims | {"latent_height": dims["latent_width"], "latent_width": dims["latent_height"]}
            )
        ),
    ),
    "tables: sine for cosine": _changed(
        (denoiser, "rope_tables"),
        lambda right: lambda model, dims: _swapped(right(model, dims)),
    ),
    "blocks: in reverse": _changed((denoiser, "block_names"), lambda right: lambda count: right(count)[::-1]),
    "blocks: the first again for the last": _changed(
        (denoiser, "block_names"), lambda right: lambda count: [*right(count)[:-1], right(count)[0]]
    ),
}
"""Faults by what is wrong: each gives a context in which it is there."""


def _swapped(tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    other = {"cos": "sin", "sin": "cos"}
    return {name: tables[f"{name[:-3]}{other[name[-3:]]}"] for name in tables}


def _only_once_by_slot(right: Callable[..., Any]) -> Callable[..., Any]:
    done: set[tuple[int, int]] = set()

    def wrong(self: Any, slot: int, rows: list[int]) -> None:
        if (id(self), slot) not in done:
            done.add((id(self), slot))
            right(self, slot, rows)

    return wrong


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """A context in which the runtime has ``fault``."""
    solvers.evaluations.cache_clear()
    try:
        with FAULTS[fault]():
            yield
    finally:
        solvers.evaluations.cache_clear()
