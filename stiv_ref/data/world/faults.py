"""Faults planted into true clips, each of which the scorers must see: what they are measured with.

Every fault is a function of a clip alone, its choices drawn by the clip's number.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.data.world.backgrounds import BRIGHTEST
from stiv_deploy.stiv_ref.data.world.captions import COLOURS
from stiv_deploy.stiv_ref.data.world.clips import Frames, Scene, WorldClip, render, times_of
from stiv_deploy.stiv_ref.data.world.draws import Draws
from stiv_deploy.stiv_ref.world_settings import SHAPES

NOISE = 0.075
"""Standard deviation of the noise, of full brightness."""
DRIFT = 0.15
"""By how much of full brightness the background drifts."""
FAULT_DRAWS = 1
"""Seeds the choices of faults, beside the clip's number."""

Fault = Callable[[WorldClip], NDArray[np.generic]]


def _half(clip: WorldClip) -> int:
    return len(clip.frames) // 2


def _shown(clip: WorldClip, scene: Scene) -> Frames:
    return render(scene, times_of(clip))


def _other_shape(clip: WorldClip) -> Frames:
    others = [shape for shape in SHAPES if shape != clip.scene.shape]
    return _shown(clip, replace(clip.scene, shape=Draws(FAULT_DRAWS, clip.index).choice(others)))


def _other_colour(clip: WorldClip) -> Frames:
    others = [colour for colour in COLOURS if colour != clip.scene.colour]
    return _shown(clip, replace(clip.scene, colour=Draws(FAULT_DRAWS, clip.index).choice(others)))


def _changes_shape(clip: WorldClip) -> Frames:
    return np.concatenate([clip.frames[: _half(clip)], _other_shape(clip)[_half(clip) :]])


def _changes_colour(clip: WorldClip) -> Frames:
    return np.concatenate([clip.frames[: _half(clip)], _other_colour(clip)[_half(clip) :]])


def _share(clip: WorldClip) -> NDArray[np.float32]:
    """How far each frame is through the clip, from 0 to 1, [F, 1, 1, 1]."""
    return np.linspace(0, 1, len(clip.frames), dtype=np.float32)[:, None, None, None]


def _colour_drifts(clip: WorldClip) -> NDArray[np.float32]:
    share = _share(clip)
    mixed = clip.frames * (1 - share) + _other_colour(clip) * share
    return mixed.astype(np.float32) / np.float32(255)


def _background_drifts(clip: WorldClip) -> NDArray[np.float32]:
    dark = clip.frames.max(-1, keepdims=True) <= 255 * (BRIGHTEST + 0.02)
    return clip.frames.astype(np.float32) / np.float32(255) + np.float32(DRIFT) * _share(clip) * dark


def _freezes(clip: WorldClip) -> Frames:
    return np.repeat(clip.frames[:1], len(clip.frames), axis=0)


def _swaps_halves(clip: WorldClip) -> Frames:
    return np.roll(clip.frames, _half(clip), axis=0)


def _too_slow(clip: WorldClip) -> Frames:
    return render(clip.scene, [clip.start + (time - clip.start) / 2 for time in times_of(clip)])


def _vanishes(clip: WorldClip) -> Frames:
    frames = clip.frames.copy()
    frames[_half(clip)] = (clip.scene.picture * 255 + 0.5).astype(np.uint8)
    return frames


def _noise(clip: WorldClip) -> NDArray[np.float32]:
    noise = np.random.default_rng((FAULT_DRAWS, clip.index)).normal(0, NOISE, clip.frames.shape)
    return np.clip(clip.frames / 255 + noise, 0, 1).astype(np.float32)


def _flickers(clip: WorldClip) -> NDArray[np.float32]:
    light = np.where(np.arange(len(clip.frames)) % 2, 1.0, 0.8).astype(np.float32)
    return clip.frames.astype(np.float32) / np.float32(255) * light[:, None, None, None]


def _brighter_behind_a_seam(clip: WorldClip) -> Frames:
    later = np.clip(clip.frames[_half(clip) :].astype(np.int64) + 12, 0, 255).astype(np.uint8)
    return np.concatenate([clip.frames[: _half(clip)], later])


FAULTS: dict[str, tuple[str, Fault]] = {
    "another shape": ("identity", _other_shape),
    "another colour": ("identity", _other_colour),
    "changes shape half-way": ("kept", _changes_shape),
    "changes colour half-way": ("kept", _changes_colour),
    "colour drifts": ("kept", _colour_drifts),
    "vanishes in one frame": ("kept", _vanishes),
    "background drifts": ("still", _background_drifts),
    "noise": ("still", _noise),
    "flickers": ("steady", _flickers),
    "brighter behind a seam": ("seamless", _brighter_behind_a_seam),
    "frozen": ("motion", _freezes),
    "half as fast": ("pace", _too_slow),
    "halves swapped": ("motion or smooth", _swaps_halves),
}
"""What is planted, and which of the scores must say so. The last three are none in a clip whose object stays."""
OF_MOTION = ("frozen", "half as fast", "halves swapped")


def catches(fault: str, scores: object) -> bool:
    """Whether ``scores`` (:class:`~stiv_deploy.stiv_ref.data.world.scores.Scores`) say what they must of ``fault``."""
    return any(getattr(scores, name) is False for name in FAULTS[fault][0].split(" or "))
