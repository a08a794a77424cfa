"""Prompts that contradict the picture."""

import numpy as np

from stiv_deploy.stiv_ref.data.world.clips import World, render, times_of
from stiv_deploy.stiv_ref.data.world.conflicts import ABOUT, conflicts, shares
from stiv_deploy.stiv_ref.data.world.scores import asked, score


def test_the_caption_says_another_thing_in_one_respect() -> None:
    found = conflicts(World(split="test"), 30)
    for number, conflict in enumerate(found):
        truth, told = conflict.clip.scene.truth, conflict.caption.told
        assert conflict.about == ABOUT[number % 3]
        assert [name for name in ABOUT if getattr(truth, name) != getattr(told, name)] == [conflict.about]
        assert str(told.shape) in conflict.caption.text.split()
    again = conflicts(World(split="test"), 30)
    assert [each.caption for each in again] == [each.caption for each in found]
    later = conflicts(World(split="test"), 3, first=27)
    assert [each.caption for each in later] == [each.caption for each in found[27:]]


def test_what_is_followed() -> None:
    import dataclasses

    for conflict in conflicts(World(split="test"), 12):
        clip, told = conflict.clip, conflict.caption.told
        assert conflict.followed(score(clip.frames, asked(told))) == "picture"
        assert conflict.followed(score(np.zeros_like(clip.frames), asked(told))) == "neither"
        if conflict.about != "motion":
            scene = dataclasses.replace(clip.scene, colour=told.colour, shape=told.shape)
            assert conflict.followed(score(render(scene, times_of(clip)), asked(told))) == "words"


def test_shares_of_what_is_followed() -> None:
    found = conflicts(World(split="test"), 4)
    blank = np.zeros_like(found[0].clip.frames)
    made = [found[0].clip.frames, blank, blank, found[3].clip.frames]
    scores = [score(frames, asked(each.caption.told)) for frames, each in zip(made, found, strict=True)]
    assert shares(found, scores) == {"picture": 50.0, "words": 0.0, "neither": 50.0}
