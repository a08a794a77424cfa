"""The scorers, on true clips and on clips with planted faults: they must say yes to the ones and no to the others."""

from dataclasses import replace

import numpy as np
import pytest

from stiv_deploy.stiv_ref.data.world.captions import Told
from stiv_deploy.stiv_ref.data.world.clips import World, WorldClip
from stiv_deploy.stiv_ref.data.world.faults import FAULTS, OF_MOTION, catches
from stiv_deploy.stiv_ref.data.world.scores import (
    JUDGED,
    Scores,
    Wanted,
    aggregate,
    asked,
    markdown,
    score,
    wanted_of,
)
from stiv_deploy.stiv_ref.world_settings import WorldData

SEAM = 8


@pytest.fixture(scope="module")
def clips() -> list[WorldClip]:
    world = World(split="test")
    return [world.clip(index) for index in range(130)]


def scored(clip: WorldClip, frames: np.ndarray | None = None) -> Scores:
    return score(clip.frames if frames is None else frames, replace(wanted_of(clip), seams=(SEAM,)))


def test_true_clips_are_right(clips: list[WorldClip]) -> None:
    scores = [scored(clip) for clip in clips]
    table = aggregate(scores)
    assert {name: table[name] for name in JUDGED if table[name] < 99.5} == {}
    assert table["mean_match"] > 0.98
    for each, clip in zip(scores, clips, strict=True):
        truth = clip.scene.truth
        assert each.seen is not None
        assert replace(each.seen, size=None) == replace(truth, size=None)
        assert each.speed == pytest.approx(clip.speed, rel=0.1, abs=0.05)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(clips: list[WorldClip], fault: str) -> None:
    moving = [clip for clip in clips if fault not in OF_MOTION or clip.scene.track.motion != "stay"]
    some = moving[:45] if fault == "halves swapped" else moving[:20]  # an orbit that comes round has no halves
    caught = [catches(fault, scored(clip, FAULTS[fault][1](clip))) for clip in some]
    assert np.mean(caught) >= 0.95


@pytest.mark.parametrize(
    ("settings", "frames", "side"),
    [({}, 8, 64), ({"strides": (2, 3)}, 16, 64), ({}, 16, 32), ({"least_radius": 8.5}, 16, 96), ({}, 1, 64)],
)
def test_other_lengths_strides_and_sizes_are_right_too(settings: dict[str, object], frames: int, side: int) -> None:
    world = World(WorldData.model_validate({"kind": "world", **settings}), frames=frames, side=side)
    scores = [score(clip.frames, wanted_of(clip)) for clip in map(world.clip, range(25))]
    assert all(each.right for each in scores)
    assert (scores[0].motion is None) == (frames == 1)


def test_a_little_noise_and_blur_as_of_a_vae_do_not_matter(clips: list[WorldClip]) -> None:
    for clip in clips[:25]:
        frames = clip.frames / 255
        soft = (frames + np.roll(frames, 1, 1) + np.roll(frames, 1, 2) + np.roll(frames, (1, 1), (1, 2))) / 4
        noise = np.random.default_rng(clip.index).normal(0, 0.015, frames.shape)
        assert scored(clip, np.clip(soft + noise, 0, 1)).right


@pytest.mark.parametrize("value", [0.0, 0.3, 0.53, 1.0])
def test_blank_frames_show_nothing(value: float) -> None:
    scores = score(np.full((6, 64, 64, 3), value), Wanted(colour="red", shape="ring", motion="stay"))
    assert scores.seen is None
    assert (scores.colour, scores.shape, scores.motion, scores.identity, scores.kept) == (False,) * 5
    assert scores.frames == 0


def test_what_is_not_wanted_is_not_judged(clips: list[WorldClip]) -> None:
    scores = score(clips[0].frames, asked(Told(colour="green", shape="circle")))
    assert (scores.size, scores.motion, scores.pace, scores.seamless) == (None,) * 4
    assert (scores.colour, scores.shape, scores.right) == (True,) * 3
    assert "seamless" not in aggregate([scores])


def test_bytes_and_floats_score_the_same(clips: list[WorldClip]) -> None:
    one, other = (score(each, wanted_of(clips[3])) for each in (clips[3].frames, clips[3].frames / 255))
    assert one.seen == other.seen
    assert one.match == pytest.approx(other.match, abs=1e-3)


@pytest.mark.parametrize("shape", [(64, 64, 3), (2, 64, 32, 3), (2, 64, 64, 4)])
def test_frames_of_another_shape_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[F, H, H, 3\], got \["):
        score(np.zeros(shape, np.uint8), Wanted())


@pytest.mark.parametrize("seam", [0, 16])
def test_a_seam_must_lie_between_frames(clips: list[WorldClip], seam: int) -> None:
    with pytest.raises(ValueError, match=f"{seam} is no seam of 16 frames"):
        score(clips[0].frames, Wanted(seams=(seam,)))


def test_table(clips: list[WorldClip]) -> None:
    good, bad = scored(clips[0]), scored(clips[0], clips[1].frames)
    table = aggregate([good, good, good, bad])
    assert table["clips"] == 4
    assert table["shape"] == table["right"] == 75
    text = markdown({"some": table, "true": aggregate([good])})
    assert text.splitlines()[0].startswith("| | clips | colour | shape |")
    assert text.splitlines()[2].startswith("| some | 4 | 75 | 75 |")
    assert len({line.count("|") for line in text.splitlines()}) == 1
