"""Scorers of moving-digit clips: which digit it is, and which way it moves.

Both work on brightness fp32 [F, 32, 32] in [0, 1] and find the digit by the centre of mass of what is brighter than
a threshold, so that they do not depend on where it is. They are validated on real clips wherever they are reported
(:func:`validate`): a score of generated clips means little without the score of real ones beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.data.moving_digits import DIRECTIONS

Image = NDArray[np.float32]
Clip = NDArray[np.float32]

THRESHOLD = 0.25  # of full brightness: above the VAE's ripple, below the stroke's soft edge
WINDOW = 20  # pixels of the crop: a digit's ink lies within 16, its centre of mass up to 2 off the middle
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))  # augmentation, in pixels


def brightness(video: NDArray[np.floating]) -> Clip:
    """Brightness [..., F, H, W] in [0, 1] of video [..., F, 3, H, W] in [-1, 1]."""
    return np.clip((np.asarray(video, np.float32).mean(axis=-3) + 1) / 2, 0, 1)


def centre_of_mass(image: Image) -> tuple[float, float] | None:
    """Row and column of the centre of what is brighter than ``THRESHOLD``; ``None`` if nothing is."""
    weight = np.where(image > THRESHOLD, image, 0)
    total = float(weight.sum())
    if total == 0:
        return None
    rows, columns = np.indices(image.shape)
    return float((rows * weight).sum() / total), float((columns * weight).sum() / total)


def centred_crop(image: Image) -> Image:
    """The ``WINDOW`` x ``WINDOW`` pixels around the centre of mass, background outside the image, unit L2 norm."""
    row, column = centre_of_mass(image) or ((image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2)
    top, left = (round(place - (WINDOW - 1) / 2) + WINDOW for place in (row, column))
    crop = np.pad(image, WINDOW)[top : top + WINDOW, left : left + WINDOW]
    return crop / max(float(np.linalg.norm(crop)), 1e-6)


@dataclass(frozen=True)
class DigitScorer:
    """A support vector classifier of still digits, applied to every frame of a clip."""

    classifier: object

    def digit(self, clip: Clip) -> int:
        """The digit 0..9 with the highest class score, averaged over the frames of ``clip`` [F, H, W]."""
        features = np.stack([centred_crop(frame).ravel() for frame in clip])
        return int(self.classifier.decision_function(features).mean(axis=0).argmax())  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def digit_scorer() -> DigitScorer:
    """Train the classifier on the still digits of the *train* split, each also shifted by a pixel."""
    from sklearn.svm import SVC

    from stiv_deploy.stiv_ref.data.moving_digits import MovingDigits

    data = MovingDigits("train")
    padded = [np.pad(image, WINDOW // 2) for image in data.images.numpy()]
    features = [np.roll(centred_crop(image).reshape(WINDOW, WINDOW), by, (0, 1)) for image in padded for by in SHIFTS]
    labels = np.repeat(data.labels, len(SHIFTS))
    classifier = SVC(C=10.0, gamma=2.0).fit(np.stack(features).reshape(len(features), -1), labels)
    return DigitScorer(classifier)


def direction(clip: Clip) -> str | None:
    """'left', 'right', 'up' or 'down' of ``clip`` [F, H, W]; ``None`` if no two frames show anything.

    A line is fitted to the centre of mass over the frames; the axis with the larger slope and its sign decide.
    """
    places = [(frame, place) for frame, image in enumerate(clip) if (place := centre_of_mass(image)) is not None]
    if len(places) < 2:
        return None
    frames = np.array([frame for frame, _ in places])
    slope = np.polyfit(frames, np.array([place for _, place in places]), 1)[0]  # pixels a frame, (rows, columns)
    axis = int(np.abs(slope).argmax())
    wanted = [0, 0]
    wanted[axis] = 1 if slope[axis] > 0 else -1
    return next(name for name, sign in DIRECTIONS.items() if list(sign) == wanted)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the scorers saw in one clip, and whether it is what was asked. ``direction`` is ``None`` for stills."""

    digit: int
    direction: str | None
    digit_right: bool
    direction_right: bool


def judge(clips: Sequence[Clip], digits: Sequence[int], directions: Sequence[str | None]) -> list[Judgement]:
    """Score ``clips`` (brightness, each [F, H, W]) against what was asked; direction ``None`` is not scored."""
    scorer = digit_scorer()
    seen = [(scorer.digit(clip), direction(clip) if len(clip) > 1 else None) for clip in clips]
    return [
        Judgement(digit=d, direction=way, digit_right=d == digit, direction_right=way == asked)
        for (d, way), digit, asked in zip(seen, digits, directions, strict=True)
    ]


def percentages(judgements: Sequence[Judgement], *, moving: bool = True) -> dict[str, float]:
    """Percent of clips with the right digit and, if ``moving``, with the right direction and with both."""

    def percent(flags: list[bool]) -> float:
        return round(100 * sum(flags) / len(flags), 1)

    scores = {"digit": percent([one.digit_right for one in judgements])}
    if moving:
        scores["direction"] = percent([one.direction_right for one in judgements])
        scores["both"] = percent([one.digit_right and one.direction_right for one in judgements])
    return scores
