"""Warm-up, samples, and the probe for results that are kept."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stiv_deploy.runtime.command.bench.maker import Maker
from stiv_deploy.runtime.command.bench.record import CacheProbe, Sample, WarmUp, Work
from stiv_deploy.runtime.command.bench.statistics import Estimate, percentile, ratio
from stiv_deploy.runtime.pipeline.request import GenerationRequest

LEAST_WARM, MOST_WARM = 6, 40
WINDOW = 3
"""Samples whose median is compared with that of as many before them."""
GETS_FASTER = 0.05
"""A median that is less than this share below the one before is no faster."""
NARROW = 0.02
"""Half of the median's interval, as a share of it, at which there are samples enough: that of the ratio of two such
medians is sqrt(2) times as wide, below 3 %."""
PROBES = 6
"""Requests of either kind in a probe."""


@dataclass
class Requests:
    """Ever new requests of one kind of work: prompts in turns, and for every clip a seed that was not there before."""

    template: GenerationRequest
    prompts: tuple[str, ...]
    batch: int
    seed: int = 0
    _made: int = field(default=0)

    def __call__(self) -> list[GenerationRequest]:
        """The clips of the next sample."""
        return self.of(range(self._made, self._made + self.batch))

    def of(self, numbers: Sequence[int]) -> list[GenerationRequest]:
        """Clips of the prompts with these ``numbers``, counted round."""
        first = self.seed + self._made
        self._made += len(numbers)
        prompts = [self.prompts[number % len(self.prompts)] for number in numbers]
        return [self.template.changed(prompt=each, seed=seed) for seed, each in enumerate(prompts, first)]


def settled(seconds: Sequence[float]) -> bool:
    """Whether the last of ``seconds`` are no faster than those before."""
    last, before = seconds[-WINDOW:], seconds[-2 * WINDOW : -WINDOW]
    return statistics.median(last) > (1 - GETS_FASTER) * statistics.median(before)


def warm_up(maker: Maker, requests: Requests, work: Work, news: Callable[[], object]) -> WarmUp:
    """Make samples until they get no faster, or there were enough."""
    seconds = warmed(lambda: maker.make(requests()).seconds, news)
    return WarmUp(work=work, seconds=tuple(seconds), stable=settled(seconds))


def warmed(make: Callable[[], float], news: Callable[[], object]) -> list[float]:
    """Seconds that ``make`` took, called until it got no faster, or often enough."""
    seconds: list[float] = []
    while len(seconds) < LEAST_WARM or (not settled(seconds) and len(seconds) < MOST_WARM):
        seconds.append(make())
        news()
    return seconds


def samples(maker: Maker, requests: Requests, count: int, news: Callable[[], object], most: int = 0) -> list[Sample]:
    """``count`` of them, and then more, up to ``most`` in all, until their median is known to :data:`NARROW`."""
    made: list[Sample] = []
    while len(made) < count or (len(made) < most and not known(percentile([each.seconds for each in made], 0.5))):
        made.append(maker.make(requests()))
        news()
    return made


def known(median: Estimate | None) -> bool:
    """Whether the interval of a ``median`` is narrow enough."""
    return median is not None and median.half_width <= NARROW


def probe(maker: Maker, requests: Requests) -> CacheProbe:
    """The same request by turns with new ones; who keeps results makes it faster (as MLPerf's TEST04 audit does)."""
    same = requests()
    maker.make(same)
    repeated: list[float] = []
    fresh: list[float] = []
    for turn in range(PROBES):
        pair = [(repeated, same), (fresh, requests())]
        for times, asked in pair if turn % 2 else reversed(pair):
            times.append(_modelled(maker.make(asked)))
    return CacheProbe(repeated=tuple(repeated), fresh=tuple(fresh), ratio=ratio(repeated, fresh))


def _modelled(sample: Sample) -> float:
    """Seconds without those of prompts, whose cache is declared, and of files, which are written every time."""
    return max(1e-9, sample.seconds - sample.stages["text"] - sample.stages["write"])
