"""What a clip follows where its first frame and its words contradict each other, on grounds with such prompts."""

from collections.abc import Mapping, Sequence

from evaluation import Trial, generate
from ground import Result, Shape
from harness import Adapt, Frozen, as_is
from records import shown
from report import Comparison, table

from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingSettings

KEY = "conflicts"
"""Of a result that has them."""
TOLD = "Under captions that name another colour or another shape than the given first frame shows, clips follow"
Rows = Mapping[str, Sequence[Result]]


def followed(
    model: Stiv,
    frozen: Frozen,
    settings: SamplingSettings,
    trial: Trial,
    seed: int,
    shape: Shape,
    *,
    adapt: Adapt = as_is,
) -> Result:
    """Under :data:`KEY`, percent of clips that follow the picture, the words or neither; nothing without conflicts."""
    clips = frozen.ground.conflicts(trial.clips, seed, shape)
    if clips is None:
        return {}
    video, _ = generate(model, frozen, clips, settings, trial, seed, image=True, adapt=adapt)
    return {KEY: clips.followed(video)}


def tables(what: str, rows: Rows) -> list[str]:
    """A table of those ``rows`` that have conflicts, ``what`` they are over the first column; nothing without any."""
    found = {name: [row[KEY] for row in got] for name, got in rows.items() if got and KEY in got[0]}
    if not found:
        return []
    ways = list(next(iter(found.values()))[0])
    lines = [[name, *(shown([row[way] for row in got]) for way in ways)] for name, got in found.items()]
    return ["", f"{TOLD}:", "", *table([what, *(f"{way} %" for way in ways)], lines)]


def comparisons(what: str, first: Sequence[Result], second: Sequence[Result]) -> list[Comparison]:
    """``first`` minus ``second`` in clips that follow the picture, and the words; nothing without conflicts."""
    if not first or KEY not in first[0]:
        return []
    return [
        Comparison(
            what=f"{what}: clips that follow the {way}",
            first=[row[KEY][way] for row in first],
            second=[row[KEY][way] for row in second],
            unit="points",
        )
        for way in ("picture", "words")
    ]
