"""Samples of several drawn data in one source."""

import numpy as np
import pytest

from stiv_deploy.stiv_ref.data.drawn import Drawn, DrawnSource, Part, mixed_source
from stiv_deploy.stiv_ref.tasks import TaskName

COLOURS = {"red": 10, "blue": 20}


def plain(word: str) -> DrawnSource:
    """Of one colour, by which its samples are known; stills are brighter."""

    def drawn(index: int, bright: int) -> Drawn:
        frames = np.full((2, 4, 4, 3), COLOURS[word] + bright, np.uint8)
        return Drawn(frames=frames, caption=word, stride=1, name=f"{word} {index}")

    return DrawnSource(lambda index: drawn(index, 0), lambda index: drawn(index, 1), ["a", word], seed=0, stage=1)


def mixed(*shares: float) -> DrawnSource:
    """Red and blue ones, of which the latter are views."""
    tasks: list[TaskName | None] = [None, "views"]
    parts = [Part(source=plain(w), share=s, task=t) for w, s, t in zip(COLOURS, shares, tasks, strict=True)]
    return mixed_source(parts, seed=0, stage=1)


def test_each_has_its_share_and_a_sample_is_the_same_in_any_batch() -> None:
    ((batch,),) = mixed(3, 1).batches(range(1), [range(1000)])
    captions = list(batch.captions)
    # Three standard deviations of a binomial of 1000.
    assert captions.count("red") == pytest.approx(750, abs=3 * (1000 * 0.75 * 0.25) ** 0.5)
    ((part,),) = mixed(3, 1).batches(range(1), [range(40, 60)])
    assert part.captions == captions[40:60]
    assert part.names == list(batch.names)[40:60]
    assert batch.tasks == [None if caption == "red" else "views" for caption in captions]
    stills = ((mixed(1, 1).stills(200)[:, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert set(stills) == {11.0, 21.0}


def test_it_has_all_words_once() -> None:
    assert mixed(1, 1).words() == ("a", "red", "blue")
