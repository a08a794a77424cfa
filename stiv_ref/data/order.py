"""The order of training samples: which bucket a step takes, and which of its members each sample of the step is.

A pure function of (seed, stage, step, sample): any number of processes, any micro-batch and a resumed run see the same
samples. Within a bucket, samples go through one permutation of its members after another, so that each epoch has every
member once. Buckets take turns in rounds: in a round each comes up as often as its share of all members says.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MEMBERS, TURNS = 1, 2  # what a permutation is for; last of the words that seed it


@lru_cache(maxsize=16)
def _permutation(count: int, *words: int) -> Tensor:
    """A permutation int64 [count], seeded by ``words``."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(state[0])))


@lru_cache(maxsize=4)
def _turns(shares: tuple[int, ...], *words: int) -> tuple[Tensor, Tensor]:
    """Bucket of every step of a round, int64 [R], and how many steps of the round it had before that, int64 [R]."""
    slots = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
    turns = slots[_permutation(len(slots), *words)]
    by_bucket = turns.argsort(stable=True)
    starts = torch.tensor([0, *shares]).cumsum(0)[:-1]
    before = torch.empty_like(turns)
    before[by_bucket] = torch.arange(len(turns)) - starts[turns[by_bucket]]
    return turns, before


class Order:
    """Order of the samples of one stage, in batches of ``batch``, from buckets with so many ``members``."""

    def __init__(self, members: Sequence[int], *, seed: int, stage: int, batch: int) -> None:
        if not sum(members):
            raise ValueError("there are no members in any bucket")
        self.members, self.batch = tuple(members), batch
        self.seeds = (seed, stage)
        divisor = math.gcd(*members)
        self.shares = tuple(count // divisor for count in members)

    def bucket(self, step: int) -> int:
        """Number of the bucket that all samples of ``step`` come from."""
        return self._turn(step)[0]

    def candidates(self, step: int, sample: int) -> Iterator[int]:
        """Numbers of members of the step's bucket: the one for ``sample``, then those that stand in if it is broken.

        Stand-ins follow it in the permutation of its epoch, round to its start; all members come, each once.
        """
        bucket, earlier = self._turn(step)
        count = self.members[bucket]
        epoch, place = divmod(earlier * self.batch + sample, count)
        permutation = _permutation(count, *self.seeds, bucket, epoch, MEMBERS)
        for ahead in range(count):
            yield int(permutation[(place + ahead) % count])

    def _turn(self, step: int) -> tuple[int, int]:
        """Bucket of ``step``, and how many steps it had before."""
        length = sum(self.shares)
        number, place = divmod(step, length)
        turns, before = _turns(self.shares, *self.seeds, number, TURNS)
        bucket = int(turns[place])
        return bucket, number * self.shares[bucket] + int(before[place])
