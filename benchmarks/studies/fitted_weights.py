"""AB2's weights fitted to a model: what they gain, and what guessed evaluations still add to that. Sampling only.

    python benchmarks/studies/fitted_weights.py [CHECKPOINT] [--smallest] [--ground world] [--seeds 0,1,2,3,4,5,6,7]

``stiv tune`` fits the weights of AB2's two velocities to a model (:mod:`stiv_deploy.runtime.sampling.fitting`). Here
they are fitted to as many clips as there are seeds, with the numbers that follow theirs, and judged by the clips of the
seeds: relative L2 of the final latents against the exact flow of the same checkpoint. With fitted weights on both sides
it is then asked again what skipping the blocks of some steps gains over fewer steps (``residual_skip.py`` asks it with
AB2's own), and what taking the guidance's difference from the step before does.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import above  # noqa: F401  # isort: split
import command
import torch
import typer
from grounds import DIGITS, Stand, ground_of
from records import WORK, seeds_of
from report import Comparison, Out, Report, Seeds, Smallest, Work, default_out, save, table
from residual_skip import typical
from skips import skippable
from trials import Grid, How, Run, Trials, Weights, named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is tried: grids with AB2's own and fitted weights (``grids``), and what the other questions take.

    ``subsets`` are of the clips that are fitted to, for the grid ``few``. Steps that skip, or reuse, are slices
    of those that may be skipped.
    """

    exact: int = 60
    exact_shift: float = 2.0
    grids: tuple[Grid, ...] = (
        *((steps, 2.0, 3.0) for steps in (6, 8, 10, 15)),
        *((steps, 1.4, 6.0) for steps in (6, 8, 10, 15)),
        *((steps, 1.0, 10.0) for steps in (6, 8, 10, 15)),
        (10, 4.0, 1.0),
    )
    along: tuple[Grid, ...] = ((10, 2.0, 3.0),)
    few: Grid = (10, 2.0, 3.0)
    subsets: tuple[tuple[int, ...], ...] = ((0,), (1,), (0, 1), (0, 1, 2, 3))
    skips: tuple[tuple[Grid, slice], ...] = (
        ((12, 2.0, 3.0), slice(0, None, 2)),
        ((12, 2.0, 3.0), slice(1, None, 3)),
        ((16, 2.0, 3.0), slice(0, None, 2)),
        ((16, 2.0, 3.0), slice(1, None, 3)),
        ((16, 4.0, 1.0), slice(0, None, 2)),
        ((12, 1.0, 10.0), slice(0, None, 2)),
    )
    reuses: tuple[tuple[Grid, slice], ...] = (
        ((12, 2.0, 3.0), slice(0, None, 2)),
        ((12, 1.0, 10.0), slice(0, None, 2)),
    )
    more: tuple[Grid, ...] = tuple((steps, 1.0, 10.0) for steps in (9, 11, 12))
    """Grids with fitted weights that skips and reuses are compared with, besides ``grids``."""


SMALLEST_GRID = (4, 1.0, 1.0)
SMALLEST = Plan(
    exact=4,
    grids=((2, 1.0, 1.0), SMALLEST_GRID),
    along=(SMALLEST_GRID,),
    few=SMALLEST_GRID,
    subsets=((0,),),
    skips=((SMALLEST_GRID, slice(0, None, 2)),),
    reuses=((SMALLEST_GRID, slice(0, None, 2)),),
    more=(),
)


class Against(NamedTuple):
    """A comparison of the ``run`` with the ``other``; ``what`` says which question it answers."""

    what: str
    run: Run
    other: Run


def compared(trials: Trials, plan: Plan) -> Iterator[Against]:
    """All comparisons, question by question."""
    for grid in plan.grids:
        yield Against("fitted by AB2's own", Run(grid=grid), Run(grid=grid, weights=Weights.OWN))
    for grid in plan.along:
        along, own = (Run(grid=grid, weights=weights) for weights in (Weights.ALONG, Weights.OWN))
        yield Against("fitted along the exact flow by AB2's own", along, own)
    for clips in plan.subsets:
        yield Against("fitted to fewer clips by fitted to all", Run(grid=plan.few, clips=clips), Run(grid=plan.few))
    skips, reuses = guessing(plan.skips, How.SKIPPED), guessing(plan.reuses, How.REUSED)
    fewer = [Run(grid=grid) for grid in (*plan.grids, *plan.more)] + [replace(run, how=How.LEFT_OUT) for run in skips]
    for run in skips:
        yield from _skipped(trials, run, fewer)
    for run in reuses:
        yield from _reused(trials, run, fewer)


def guessing(grids: Sequence[tuple[Grid, slice]], how: How) -> list[Run]:
    """Runs over ``grids`` that guess in those of their steps that may be skipped, by the slice."""
    return [Run(grid=grid, chosen=tuple(skippable(*grid)[which]), how=how) for grid, which in grids]


def _skipped(trials: Trials, run: Run, fewer: Sequence[Run]) -> Iterator[Against]:
    """A run that skips, beside runs of as many evaluations."""
    left_out, nearest = replace(run, how=How.LEFT_OUT), best(trials, run, fewer, lambda each: each.evaluations)
    yield Against("blocks skipped by the same times left out", run, left_out)
    if nearest != left_out:
        yield Against("blocks skipped by the best of fewer steps", run, nearest)


def _reused(trials: Trials, run: Run, fewer: Sequence[Run]) -> Iterator[Against]:
    """A run that reuses differences, beside runs of as many rows."""
    same_times = [each for each in fewer if each.grid[1:] == run.grid[1:]]
    alike, nearest = (best(trials, run, some, lambda each: each.rows) for some in (same_times, fewer))
    yield Against("difference reused by fewer steps of the same times", run, alike)
    if nearest != alike:
        yield Against("difference reused by the best of fewer steps", run, nearest)


def best(trials: Trials, run: Run, fewer: Sequence[Run], cost: Callable[[Run], int]) -> Run:
    """The one of ``fewer`` nearest to the exact flow that costs no more than ``run``; the cheapest if all cost more."""
    allowed = [each for each in fewer if cost(each) <= cost(run)] or [min(fewer, key=cost)]
    return min(allowed, key=trials.error)


HEAD = ("question", "run", "evaluations", "rows", "error", "by", "rows", "error", "ratio")


def lines(trials: Trials, found: Sequence[Against]) -> list[list[str]]:
    """Table rows."""
    return [
        [
            each.what,
            told(each.run),
            f"{each.run.evaluations}",
            f"{each.run.rows}",
            f"{trials.error(each.run):.4f}",
            told(each.other),
            f"{each.other.rows}",
            f"{trials.error(each.other):.4f}",
            f"{trials.error(each.run) / trials.error(each.other):.2f}",
        ]
        for each in found
    ]


def told(run: Run) -> str:
    """A run in words for a table; the JSON file has the numbers of its steps."""
    clips = f" to {len(run.clips)} ({', '.join(map(str, run.clips))})" if run.clips else ""
    chosen = f", {run.how} ({len(run.chosen)} steps)" if run.chosen else ""
    return f"{named(run.grid)}, {run.weights}{clips}{chosen}"


def comparisons(trials: Trials, found: Sequence[Against]) -> list[Comparison]:
    """Every comparison clip by clip, in logarithms of the error."""
    return [
        Comparison(
            what=f"{each.what}: {told(each.run)}",
            first=[100 * math.log(error) for error in trials.errors(each.run)],
            second=[100 * math.log(error) for error in trials.errors(each.other)],
            unit="% (logarithm)",
        )
        for each in found
    ]


def runs(trials: Trials, found: Sequence[Against]) -> list[Result]:
    """All runs with what was measured and fitted."""
    every = dict.fromkeys(run for each in found for run in (each.run, each.other))
    return [
        {"run": run.name, "evaluations": run.evaluations, "rows": run.rows, "error": trials.error(run)}
        | trials.measured(run)
        for run in every
    ]


def draw(figure: "Figure", trials: Trials, found: Sequence[Against]) -> None:
    """Error over rows of the model, by the kind of run."""
    every = dict.fromkeys(run for each in found for run in (each.run, each.other) if not run.clips)
    kinds = (
        ("AB2's own weights", "o", lambda run: run.weights is Weights.OWN),
        ("fitted weights", "s", lambda run: run.weights is Weights.FITTED and not run.chosen),
        ("fitted along the exact flow", "d", lambda run: run.weights is Weights.ALONG),
        *((f"fitted, {how}", mark, _chosen(how)) for how, mark in zip(How, "v+x", strict=True)),
    )
    axes = figure.subplots()
    for name, mark, belongs in kinds:
        own = [run for run in every if belongs(run)]
        axes.semilogy([run.rows for run in own], [trials.error(run) for run in own], mark, label=name)
    axes.set(xlabel="rows of the model for a clip", ylabel="relative L2 error of latents")
    axes.grid(True, which="both", linewidth=0.3)


def _chosen(how: How) -> Callable[[Run], bool]:
    return lambda run: bool(run.chosen) and run.how is how


def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="Checkpoint. [default: that of the ground]")] = None,
    smallest: Smallest = False,
    ground: Stand = DIGITS,
    seeds: Seeds = "0,1,2,3,4,5,6,7",
    out: Out = None,
    work: Work = WORK,
) -> None:
    """What is left to gain by guessed evaluations where AB2's weights are fitted?"""
    torch.set_num_threads(1)
    plan, numbers = (SMALLEST, [0]) if smallest else (Plan(), seeds_of(seeds))
    stand = ground_of(ground)
    path, folder = checkpoint or stand.checkpoint, work / "fitted-weights"
    trials = Trials(path, numbers, plan.exact, plan.exact_shift, folder)
    found = list(compared(trials, plan))
    report = Report(
        title="AB2's weights fitted to a model",
        question="How much nearer to the exact flow do fitted weights lead, and what do skipped blocks add to that?",
        setup=setup(trials, plan),
        paper="Samples by Euler's rule. Solvers bespoke to a model (arXiv 2403.01329, 2505.21114) are trained.",
        tables=table(HEAD, lines(trials, found)),
        comparisons=comparisons(trials, found),
        data={"runs": runs(trials, found), "exact_errors": trials.judging.exact_errors},
        seeds=numbers,
    )
    typer.echo(
        save(report, out or default_out("fitted-weights", stand), lambda figure: draw(figure, trials, found), (11, 5))
    )


def setup(trials: Trials, plan: Plan) -> str:
    """What was compared, how."""
    own, count = trials.judging, len(trials.fitting.seeds)
    return (
        f"Sampling only, {own.label} ({own.hash}), the guidance that it recommends. Weights are fitted to {count} "
        f"clips, numbered {min(trials.fitting.seeds)} to {max(trials.fitting.seeds)}, and errors are of {count} "
        "others, those of the seeds; clips of odd numbers are given their first frame. Relative L2 error of final "
        f"latents (geometric mean over the clips) against {plan.exact} AB2 steps at shift {plan.exact_shift:g}, whose "
        f"own error is {typical(own.exact_errors):.4f}, at most {max(own.exact_errors):.4f}. Fitted weights are "
        "the pairs that, step by step, lead nearest to the exact flow from where earlier steps have led; along the "
        "exact flow each step begins there. Of the steps that may be skipped, none in the first fifth nor before time "
        "0.12, every second or every third one is; its residual is the pair of the last two that is nearest to its "
        "own, fitted as well, and its own cost is not counted. A reused difference between the guidance's branches is "
        "that of the step before, in every second such step, which takes one row of the model in place of two. The "
        "best of fewer steps is that of all with fitted weights, times left out or not, that take no more evaluations "
        "(of skips) or rows (of reused differences); it is chosen by the clips that judge, to its advantage, and has "
        "no row where it is the one above. Below a ratio of 1 the first run is nearer."
    )


if __name__ == "__main__":
    command.run(main)
