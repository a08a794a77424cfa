"""The world: clips are functions of their index, the object is where the truth says, captions tell the truth."""

import hashlib

import numpy as np
import pytest

from stiv_deploy.stiv_ref.data.world.backgrounds import BRIGHTEST
from stiv_deploy.stiv_ref.data.world.captions import COLOURS, words
from stiv_deploy.stiv_ref.data.world.clips import HELD_OUT, World, WorldClip
from stiv_deploy.stiv_ref.data.world.motions import DIRECTIONS
from stiv_deploy.stiv_ref.world_settings import BACKGROUNDS, MOTIONS, SHAPES, WorldData


@pytest.fixture(scope="module")
def clips() -> list[WorldClip]:
    world = World(split="test")
    return [world.clip(index) for index in range(200)]


def centre(clip: WorldClip, frame: int) -> tuple[float, float]:
    """x and y of the centre of mass of what is bright."""
    bright = clip.frames[frame].max(-1) > 255 * (BRIGHTEST + 0.1)
    rows, columns = np.nonzero(bright)
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def test_shape_and_everything_that_can_be_is_there(clips: list[WorldClip]) -> None:
    assert {clip.frames.shape for clip in clips} == {(16, 64, 64, 3)}
    assert clips[0].frames.dtype == np.uint8
    scenes = [clip.scene for clip in clips]
    assert {scene.shape for scene in scenes} == set(SHAPES)
    assert {scene.colour for scene in scenes} == set(COLOURS)
    assert {scene.track.motion for scene in scenes} == set(MOTIONS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.size for scene in scenes} == {"small", "big", None}


def test_clips_are_the_same_in_any_order_and_on_any_machine() -> None:
    forward = [World().clip(index).frames for index in range(5)]
    world = World()
    assert all(np.array_equal(world.clip(index).frames, forward[index]) for index in (3, 1, 4, 0, 2))
    assert len({frames.tobytes() for frames in forward}) == 5
    assert not np.array_equal(World(seed=1).clip(0).frames, forward[0])
    assert hashlib.sha256(np.stack(forward).tobytes()).hexdigest()[:16] == "a632e4d405427d7f"


def test_splits_share_no_clip() -> None:
    train = [World(split="train").clip(index).frames.tobytes() for index in range(HELD_OUT * 2)]
    test = [World(split="test").clip(index).frames.tobytes() for index in range(4)]
    assert len({*train, *test}) == len(train) + len(test)


def test_the_object_is_bright_and_the_background_is_not(clips: list[WorldClip]) -> None:
    for clip in clips:
        assert clip.scene.picture.max() <= BRIGHTEST
        assert clip.scene.picture.min() >= 0
        for x, y, radius in clip.places:
            assert 1 <= x - radius <= x + radius <= 63
            assert 1 <= y - radius <= y + radius <= 63
        far = np.ones(clip.frames.shape[1:3], bool)
        for _, y, radius in clip.places:
            far[int(y - 1.4 * radius) - 1 : int(y + 1.4 * radius) + 3, :] = False
        assert (clip.frames[:, far] == clip.frames[:1, far]).all()


def test_the_object_is_where_the_truth_says(clips: list[WorldClip]) -> None:
    for clip in clips:
        for frame in (0, 7, 15):
            x, y, radius = clip.places[frame]
            # A triangle's middle is its centre of mass; a pixel's share counts as whole or nothing.
            assert np.hypot(*np.subtract(centre(clip, frame), (x, y))) < 0.3 + 0.05 * radius, clip.scene


def test_motions_are_what_they_are_called(clips: list[WorldClip]) -> None:
    for clip in clips:
        x, y, radius = np.array(clip.places).T
        motion = clip.scene.track.motion
        if motion in DIRECTIONS:
            assert tuple(np.sign(np.round([x[-1] - x[0], y[-1] - y[0]], 6))) == DIRECTIONS[motion]
            assert np.hypot(np.diff(x), np.diff(y)) == pytest.approx(clip.speed)
        if motion == "bounce":
            along = np.diff(x if np.ptp(x) > np.ptp(y) else y)
            assert along.min() < 0 < along.max()
            assert min(np.ptp(x), np.ptp(y)) == 0
        if motion == "orbit":
            assert min(np.ptp(x), np.ptp(y)) > 5
        if motion in ("grow", "shrink"):
            assert (radius[-1] - radius[0]) * (1 if motion == "grow" else -1) >= 2.5
        if motion == "stay":
            assert clip.speed == np.ptp(x) == np.ptp(y) == np.ptp(radius) == 0


def test_captions_tell_the_truth_in_few_words(clips: list[WorldClip]) -> None:
    for clip in clips:
        told, truth, text = clip.caption.told, clip.scene.truth, clip.caption.text.split()
        assert (told.colour, told.shape) == (truth.colour, truth.shape)
        assert {told.colour, told.shape} <= set(text) <= set(words())
        assert told.size in (None, truth.size)
        assert told.motion in (None, truth.motion)
        assert len(text) <= 10
    silent = sum(clip.caption.told.motion is None for clip in clips)
    assert 5 <= silent <= 40


def test_stills_have_still_captions_and_all_times() -> None:
    stills = [World(frames=1).clip(index) for index in range(40)]
    assert {still.frames.shape for still in stills} == {(1, 64, 64, 3)}
    assert {still.stride for still in stills} == {1}
    assert all(still.caption.told.motion is None for still in stills)
    assert len({still.start for still in stills}) > 8


def test_strides_show_larger_steps_of_the_same_scene() -> None:
    one, three = (World(WorldData(kind="world", strides=(stride,)), frames=4).clip(5) for stride in (1, 3))
    long = World(frames=10).clip(5)
    assert three.places == long.places[::3]
    assert np.array_equal(three.frames, long.frames[::3])
    assert one.scene.truth == three.scene.truth
    mixed = [World(WorldData(kind="world", strides=(1, 2, 4))).clip(index).stride for index in range(40)]
    assert set(mixed) == {1, 2, 4}


def test_key_frames_and_what_lies_between_are_of_scenes_with_the_same_speeds() -> None:
    keys, between = (WorldData(kind="world", strides=(stride,), scene_frames=381) for stride in (20, 1))
    for index in range(30):
        far, near = World(keys, frames=20).clip(index), World(between, frames=20).clip(index)
        assert far.scene.track.speed == near.scene.track.speed
        assert (far.start, far.stride, near.stride) == (0, 20, 1)
        assert 0 <= near.start <= 381 - 20


@pytest.mark.parametrize("side", [32, 96])
def test_other_sizes_show_the_same(side: int) -> None:
    for index in range(30):
        here, there = World(side=side, frames=4).clip(index), World(frames=4).clip(index)
        assert here.frames.shape == (4, side, side, 3)
        assert here.caption == there.caption
        assert np.array(here.places) / side == pytest.approx(np.array(there.places) / 64)


def test_an_easier_world() -> None:
    easy = WorldData(kind="world", shapes=("ring",), backgrounds=("plain",), motions=("left", "grow"), least_radius=8.5)
    for index in range(40):
        clip = World(easy).clip(index)
        assert (clip.scene.shape, clip.scene.background) == ("ring", "plain")
        assert clip.scene.track.motion in ("left", "grow")
        assert min(radius for _, _, radius in clip.places) >= 8.5
        assert (clip.scene.picture == clip.scene.picture[0, 0]).all()


@pytest.mark.parametrize("frames", [2, 3, 40, 400])
def test_any_number_of_frames_stays_inside(frames: int) -> None:
    world = World(frames=frames)
    for index in range(60 if frames < 100 else 5):
        assert all(1 <= p - r <= p + r <= 63 for x, y, r in world.clip(index).places for p in (x, y))
