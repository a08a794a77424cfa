"""Scene cuts by PySceneDetect, fed frame by frame, so that a video is decoded once for everything that is measured."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stiv_deploy.stiv_ref.config import FrozenConfig

CLOCK = 25.0  # frames per second: cuts are counted in frames here, so that any rate does, and PySceneDetect takes few

Detector = Literal["adaptive", "content"]


class SceneSettings(FrozenConfig):
    """How cuts are found.

    ``content`` cuts where the mean HSV change of a frame reaches ``threshold``; ``adaptive`` where that change is
    ``threshold`` times the one of its neighbours, which fast motion does not set off. None is PySceneDetect's default
    (27 and 3). No scene is shorter than ``min_seconds``.
    """

    detector: Detector = "adaptive"
    threshold: float | None = Field(default=None, gt=0, le=1e6)
    min_seconds: float = Field(default=0.6, ge=0, le=1e6)


class SceneCutter:
    """Finds the scenes of one video of ``fps`` frames per second; takes its frames in order."""

    def __init__(self, settings: SceneSettings, fps: float) -> None:
        from scenedetect import AdaptiveDetector, ContentDetector

        shortest = max(1, round(settings.min_seconds * fps))
        given = {} if settings.threshold is None else {"threshold": settings.threshold}
        if settings.detector == "content":
            self._detector = ContentDetector(min_scene_len=shortest, **given)
        else:
            given = {f"adaptive_{name}": value for name, value in given.items()}
            self._detector = AdaptiveDetector(min_scene_len=shortest, **given)
        self._frames = 0
        self._cuts: set[int] = set()

    def add(self, image: NDArray[np.uint8]) -> None:
        """Take the next frame, RGB uint8 [H, W, 3]."""
        from scenedetect import FrameTimecode

        at = FrameTimecode(self._frames, CLOCK)
        found = self._detector.process_frame(at, np.ascontiguousarray(image[..., ::-1]))  # it wants BGR
        self._cuts.update(cut.frame_num for cut in found)
        self._frames += 1

    def scenes(self) -> list[tuple[int, int]]:
        """After the last frame: first frame and end (exclusive) of every scene, in order, covering all frames."""
        from scenedetect import FrameTimecode

        late = self._detector.post_process(FrameTimecode(self._frames, CLOCK))
        cuts = sorted(cut for cut in self._cuts | {cut.frame_num for cut in late} if 0 < cut < self._frames)
        bounds = [0, *cuts, self._frames]
        return list(zip(bounds[:-1], bounds[1:], strict=True))
