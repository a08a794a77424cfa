"""Which chunks a task takes with a bundle, and whether its model was trained for that: extend, interpolate, long."""

from collections.abc import Collection, Sequence

from stiv_deploy.runtime.bundle.bounds import SIZE_LIMIT
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.manifest import TrainedOn
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.chained import Chain, Pass, check_frame_by_frame
from stiv_deploy.runtime.pipeline.chunks import Chunk, filled_in, filled_total, key_frames, rolled_on
from stiv_deploy.runtime.pipeline.limits import Bounds, bounded
from stiv_deploy.runtime.pipeline.plan import plan_generation
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.tasks import covers, giving_frames

FACTORS = (2, 4)
"""How many times the frames an interpolation makes."""
SPACING = Bounds(1, SIZE_LIMIT)
OVERLAP = 4
"""Frames that a roll-out is given where the checkpoint does not tell: the paper's video prediction."""


def extend_chain(
    bundle: Bundle,
    request: GenerationRequest,
    known: int,
    frames: int,
    overlap: int | None,
    source: str,
    upsample: int | None = None,
) -> Chain:
    """From ``known`` frames to ``frames``, each clip given the last ``overlap`` frames before it.

    Without ``overlap`` as many as the model was trained to be given. Then the frames between for ``upsample`` times the
    frame rate. Raises :class:`RequestError`.
    """
    clips = _Clips(bundle, request, "extend")
    frames = int(bounded("num_frames", frames))
    if frames <= known:
        raise RequestError(f"the video has {known} frames, and {frames} are wanted; ask for more than it has")
    lap = clips.overlap(overlap, known)
    chunks = tuple(rolled_on(known, frames, clips.frames, lap))
    return clips.upsampled([Pass(name="more", chunks=chunks, stride=clips.stride)], known, frames, source, upsample)


def upsampled_chain(bundle: Bundle, request: GenerationRequest, factor: int) -> Chain:
    """One clip, and the frames between for ``factor`` times the frame rate; :class:`RequestError`."""
    clips = _Clips(bundle, request, "generate --upsample")
    whole = Chunk(start=0, frames=clips.frames, given=(), kept=tuple(range(clips.frames)))
    return clips.upsampled([Pass(name="clip", chunks=(whole,), stride=clips.stride)], 0, clips.frames, None, factor)


def interpolate_chain(bundle: Bundle, request: GenerationRequest, known: int, factor: int, source: str | None) -> Chain:
    """``factor`` times the frame rate of ``known`` frames, all of which stay; :class:`RequestError`."""
    clips = _Clips(bundle, request, "interpolate")
    _check_factor("factor", factor, known)
    passes, total = clips.between(known, factor)
    return clips.chain(passes, known, total, source, faster=factor)


def _check_factor(name: str, factor: int, frames: int) -> None:
    """:class:`RequestError` if ``frames`` frames cannot become ``factor`` times as many."""
    if factor not in FACTORS:
        raise RequestError(f"{name} must be {' or '.join(map(str, FACTORS))}, got {factor}")
    if frames < 2:
        raise RequestError(f"the video has {frames} frame, and there is nothing between; give 2 or more")


def long_chain(
    bundle: Bundle,
    request: GenerationRequest,
    frames: int,
    spacing: int | None,
    overlap: int | None,
    upsample: int | None = None,
) -> Chain:
    """A video of ``frames`` frames: key frames ``spacing`` apart at a large stride, then what is between neighbours.

    Key frames are one clip, and roll on with ``overlap`` where one does not suffice. ``spacing`` is that of the strides
    that the model was trained at. ``upsample`` is as in :func:`extend_chain`. Raises :class:`RequestError`, which names
    the nearest numbers of frames that can be.
    """
    clips = _Clips(bundle, request, "long")
    spacing = clips.spacing(spacing)
    keys = key_frames(int(bounded("num_frames", frames)), spacing)
    lap = clips.overlap(overlap, keys) if keys > clips.frames else 0
    chunks = tuple(rolled_on(0, keys, clips.frames, lap))
    first = Pass(name="key-frames", chunks=chunks, stride=clips.near(clips.stride * spacing))
    between, _ = clips.between(keys, spacing)
    return clips.upsampled([first, *between], 0, frames, None, upsample)


class _Clips:
    """The clips of a bundle: their request with every default, their length, and what the model was trained for."""

    def __init__(self, bundle: Bundle, request: GenerationRequest, task: str) -> None:
        check_frame_by_frame(bundle, task)
        (video,) = plan_generation(bundle, request.changed(count=1)).videos
        self.bundle, self.task, self.template = bundle, task, video.request
        self._asked_fps = request.fps
        self.frames, self.stride = self.template.num_frames or 1, self.template.stride or 1

    @property
    def trained(self) -> TrainedOn | None:
        return self.bundle.manifest.trained

    def chain(self, passes: Sequence[Pass], known: int, frames: int, source: str | None, *, faster: int = 1) -> Chain:
        """The chain of ``passes``; ``faster`` frame rate than that of clips, if none was asked for."""
        fps = self._asked_fps or (self.template.fps or 1) * faster
        return Chain(
            fps=fps,
            task=self.task,
            template=self.template,
            passes=tuple(passes),
            known=known,
            frames=frames,
            bundle=self.bundle.hash,
            source=source,
        )

    def upsampled(
        self, passes: Sequence[Pass], known: int, frames: int, source: str | None, factor: int | None
    ) -> Chain:
        """:meth:`chain` for ``factor`` times the frame rate, if that is given: then it ends with what is between."""
        if factor is None:
            return self.chain(passes, known, frames, source)
        _check_factor("upsample", factor, frames)
        between, total = self.between(frames, factor, "upsampled")
        return self.chain([*passes, *between], known, total, source, faster=factor)

    def overlap(self, asked: int | None, known: int) -> int:
        """Frames that a roll-out is given; :class:`RequestError` for too many, or none that were trained for."""
        most = min(self.frames - 1, known)
        if asked is not None:
            if not 1 <= asked < self.frames:
                raise RequestError(f"overlap is {asked}; a clip has {self.frames} frames, take 1 to {self.frames - 1}")
            if asked > known:
                raise RequestError(f"the video has {known} frames, and the overlap is {asked}; give a smaller overlap")
            return asked
        if self.trained is None:
            return min(OVERLAP, most)
        learnt = [lap for lap in range(1, most + 1) if self._leading(lap)]
        if not learnt:
            raise self._untrained(f"the first {most} frames or fewer")
        return max(self._named(learnt)) if self._named(learnt) else min(OVERLAP, most)

    def _leading(self, lap: int) -> bool:
        assert self.trained is not None
        return covers(self.trained.givings, range(lap), self.frames)

    def _named(self, laps: Collection[int]) -> list[int]:
        """Those of ``laps`` that a giving has by name; others are but random ones."""
        assert self.trained is not None
        known = [giving_frames(name, self.frames) for name in self.trained.givings]
        return [lap for lap in laps if list(range(lap)) in known]

    def spacing(self, asked: int | None) -> int:
        """Frames from key frame to key frame."""
        if asked is not None:
            return int(bounded("spacing", asked, SPACING))
        if self.trained is None:
            return self.frames - 1
        spacing = max(self.trained.strides) // self.stride
        if spacing < 2:
            strides = ", ".join(map(str, self.trained.strides))
            raise RequestError(
                f"this model was not trained for key frames: the strides that it knows are {strides}, and its clips "
                f"are made at {self.stride}; give a spacing to try it, or extend a clip instead"
            )
        return spacing

    def near(self, stride: int) -> int:
        """The stride that the model was trained at which is nearest to ``stride``."""
        return min(self.trained.strides, key=lambda each: abs(each - stride)) if self.trained else stride

    def between(self, known: int, spacing: int, name: str = "between") -> tuple[list[Pass], int]:
        """Passes called ``name`` that fill in between ``known`` frames, and the number of frames then."""
        passes, total, left = [], known, spacing
        for number, (step, frames) in enumerate(self._steps(spacing)):
            total, left = filled_total(total, step), left // step
            chunks = tuple(filled_in(total, step, min(frames, self._allowed(total))))
            stride = self.near(self.stride * left)
            passes.append(Pass(name=f"{name}-{number}", chunks=chunks, stride=stride, spacing=step))
        return passes, total

    def _steps(self, spacing: int) -> list[tuple[int, int]]:
        """Spacing and frames of the clips of each pass; :class:`RequestError` if the model has learnt no way.

        All at once with every ``spacing``-th frame given, else by halves, else clips from one known frame to the next.
        """
        whole, alone = (spacing, self.frames), (spacing, self._allowed(spacing + 1))
        if spacing == 1:
            return []
        if spacing < self.frames and (self._every(*whole) or (self.trained is None and spacing not in FACTORS)):
            return [whole]
        if spacing in FACTORS and (self._every(2, self.frames) or self.trained is None):
            return [(2, self.frames)] * (spacing // 2)
        if self._every(*alone):
            return [alone]
        raise self._untrained(f"every {spacing}, nor frames {spacing} apart at the ends of a clip")

    def _every(self, spacing: int, frames: int) -> bool:
        """Whether the model has learnt to be given every ``spacing``-th of ``frames`` frames."""
        return self.trained is not None and covers(self.trained.givings, range(0, frames, spacing), frames)

    def _allowed(self, frames: int) -> int:
        """The least number of frames, from ``frames`` on, that the bundle takes."""
        multiple = self.bundle.manifest.model.frame_multiple
        least = min(bucket.frames.min for bucket in self.bundle.manifest.buckets)
        return max(-(-frames // multiple) * multiple, least)

    def _untrained(self, wanted: str) -> RequestError:
        assert self.trained is not None
        givings = ", ".join(self.trained.givings)
        return RequestError(
            f"{self.task}: this model was not trained to be given {wanted}; its givings are {givings}; use a bundle of "
            "a model that was"
        )
