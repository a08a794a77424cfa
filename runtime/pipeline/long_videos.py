"""The tasks that make videos longer than a clip, as a pipeline has them: extend, interpolate, long."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from threading import Event
from typing import Unpack

import numpy as np

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.call import CallOptions, requests_of_call
from stiv_deploy.runtime.pipeline.chained import Chain, ChainOutput, Maker, run_chain
from stiv_deploy.runtime.pipeline.films import Film, open_film
from stiv_deploy.runtime.pipeline.given import as_array
from stiv_deploy.runtime.pipeline.images import Fit, fitted_image
from stiv_deploy.runtime.pipeline.long_tasks import extend_chain, interpolate_chain, long_chain, upsampled_chain
from stiv_deploy.runtime.pipeline.pictures import rgb_of
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.timeline import begun_seed
from stiv_deploy.runtime.progress import Progress, unheard

Planned = Callable[[Chain], object]
"""Called once what will be made is known; it stops that by raising."""
Video = np.ndarray | str | PathLike[str]
"""A clip: frames uint8 [F, H, W, 3], latents fp32 [T, C, h, w], or the path of a clip's file or folder."""


@dataclass(frozen=True)
class _Held:
    """A clip in memory: frames uint8 [F, H, W, 3], or latents fp32 [T, C, h, w], which go through as they are."""

    array: np.ndarray
    prompt = ""

    @property
    def frames(self) -> int:
        return len(self.array)

    @property
    def sha256(self) -> str:
        shape = f"{self.array.dtype} {self.array.shape} "
        return hashlib.sha256(shape.encode() + np.ascontiguousarray(self.array).tobytes()).hexdigest()

    def windows(
        self, most: int, height: int, width: int, fit: Fit = Fit.EXACT, background: str = "black"
    ) -> Iterator[np.ndarray]:
        for start in range(0, len(self.array), most):
            window = self.array[start : start + most]
            if window.dtype == np.uint8:
                behind = rgb_of(background)
                fitted = (fitted_image(each, height, width, fit, "the video", behind, tell=False) for each in window)
                window = np.stack(list(fitted))
            yield window


def _source(video: Video) -> Film | _Held:
    """What ``video`` is; :class:`RequestError`."""
    array = as_array(video)
    if array is None:
        if not isinstance(video, str | PathLike):
            raise RequestError(f"cannot use a {type(video).__name__} as a video; give a file, frames or latents")
        return open_film(Path(video))
    frames = array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3
    latents = array.dtype == np.float32 and array.ndim == 4
    if not (frames or latents) or 0 in array.shape:
        raise RequestError(
            f"the video is {array.dtype} {list(array.shape)}; give frames uint8 [F, H, W, 3] or latents float32 "
            "[T, C, h, w]"
        )
    if latents and not np.isfinite(array).all():
        raise RequestError("the latents of the video are not finite")
    return _Held(array)


def unplanned(_chain: Chain) -> None:
    """Nothing is asked of a chain."""


class LongVideos(Maker):
    """Videos longer than a clip, in latents from end to end. ``options`` are those of a call, and are each clip's.

    So ``num_frames`` are the frames of a clip, by default as the bundle recommends; ``frames`` are all. The default
    ``prompt`` is that of the record that the file of a video of ours carries, or empty. ``upsample``, 2 or 4, ends with
    what :meth:`interpolate` does with that factor.

    All of them keep finished chunks in ``folder`` if it is given: a run that was stopped or killed goes on there when
    it is called again in the same way. ``progress`` hears of sampling steps of the whole; ``cancel`` stops between two.
    They raise :class:`RequestError` before anything is computed, among others if the model was not trained for it.
    """

    def extend(
        self,
        video: Video,
        frames: int,
        *,
        prompt: str | None = None,
        overlap: int | None = None,
        upsample: int | None = None,
        folder: str | PathLike[str] | None = None,
        progress: Progress = unheard,
        cancel: Event | None = None,
        planned: Planned = unplanned,
        **options: Unpack[CallOptions],
    ) -> ChainOutput:
        """``video`` and what comes after it, ``frames`` frames in all; each clip is given ``overlap`` frames."""
        source = _source(video)
        request = self._request(source.prompt if prompt is None else prompt, options, folder, source)
        chain = extend_chain(self.bundle, request, source.frames, frames, overlap, source.sha256, upsample)
        planned(chain)
        return self._chained(chain, source, folder, progress, cancel)

    def interpolate(
        self,
        video: Video,
        factor: int = 2,
        *,
        prompt: str | None = None,
        folder: str | PathLike[str] | None = None,
        progress: Progress = unheard,
        cancel: Event | None = None,
        planned: Planned = unplanned,
        **options: Unpack[CallOptions],
    ) -> ChainOutput:
        """``video`` with ``factor`` - 1 new frames, of 2 or 4, between each two, and that much faster."""
        source = _source(video)
        request = self._request(source.prompt if prompt is None else prompt, options, folder, source)
        chain = interpolate_chain(self.bundle, request, source.frames, factor, source.sha256)
        planned(chain)
        return self._chained(chain, source, folder, progress, cancel)

    def long(
        self,
        prompt: str,
        frames: int,
        *,
        spacing: int | None = None,
        overlap: int | None = None,
        upsample: int | None = None,
        folder: str | PathLike[str] | None = None,
        progress: Progress = unheard,
        cancel: Event | None = None,
        planned: Planned = unplanned,
        **options: Unpack[CallOptions],
    ) -> ChainOutput:
        """A video of ``prompt``: key frames ``spacing`` apart, by default as trained, and what is between them.

        An ``image`` is its first frame. Where one clip has too few key frames, more are predicted from the last
        ``overlap`` of them.
        """
        request = self._request(prompt, options, folder)
        chain = long_chain(self.bundle, request, frames, spacing, overlap, upsample)
        planned(chain)
        return self._chained(chain, None, folder, progress, cancel)

    def upsampled(
        self,
        prompt: str,
        upsample: int = 2,
        *,
        folder: str | PathLike[str] | None = None,
        progress: Progress = unheard,
        cancel: Event | None = None,
        planned: Planned = unplanned,
        **options: Unpack[CallOptions],
    ) -> ChainOutput:
        """A clip of ``prompt``, as a call makes it, and the frames between: ``upsample`` times the frame rate."""
        chain = upsampled_chain(self.bundle, self._request(prompt, options, folder), upsample)
        planned(chain)
        return self._chained(chain, None, folder, progress, cancel)

    def _request(
        self, prompt: str, options: CallOptions, folder: str | PathLike[str] | None, source: Film | _Held | None = None
    ) -> GenerationRequest:
        """The template of the clips; latents say their size. Without a seed it is that of the run in ``folder``."""
        requests = requests_of_call(prompt, options)
        if len(requests) != 1 or requests[0].count != 1:
            raise RequestError("one long video is made at a time; give one prompt, and no count")
        (request,) = requests
        if options.get("seed") is None and options.get("generator") is None and folder is not None:
            request = request.changed(seed=begun_seed(Path(folder), request.seed))
        if request.latents or request.noise is not None or (source is not None and request.frames):
            raise RequestError("a long video is given its frames by the task; leave image and latents out")
        if isinstance(source, _Held) and source.array.dtype == np.float32:
            factor = self.bundle.manifest.model.spatial_factor
            _, _, height, width = source.array.shape
            return request.changed(height=height * factor, width=width * factor)
        return request

    def _chained(
        self,
        chain: Chain,
        source: Film | _Held | None,
        folder: str | PathLike[str] | None,
        progress: Progress,
        cancel: Event | None,
    ) -> ChainOutput:
        size = self.plan(chain.template).size
        fit, background = chain.template.fit, chain.template.background
        windows = () if source is None else source.windows(size.frames, size.height, size.width, fit, background)
        place = None if folder is None else Path(folder)
        return run_chain(self, chain, windows, folder=place, progress=progress, cancel=cancel)
