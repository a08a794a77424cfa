"""Requests of Dynamo's video API as jobs of ours, and their answers; Dynamo itself is not needed for that.

Its frontend takes one answer for ``/v1/videos``, and adds what comes after it to the first. What comes while a clip is
made is for ``/v1/videos/stream``, which shows the JPEG of every answer, one after another.
"""

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stiv_deploy.runtime.errors import briefly, few
from stiv_deploy.serving.api.body import asked_of
from stiv_deploy.serving.api.content import file_of, frames_of
from stiv_deploy.serving.api.events import changes, preview_of, want_preview
from stiv_deploy.serving.api.guard import LOCAL
from stiv_deploy.serving.api.service import Service
from stiv_deploy.serving.errors import ApiError
from stiv_deploy.serving.store.files import RemoteFile
from stiv_deploy.serving.store.jobs import CANCELLED, Job, State

SHARED = ("model", "prompt", "input_reference", "seconds", "size")
"""Fields that mean the same in both."""
UNASKED = ("annotations",)
"""Extensions that say nothing of the video."""
FORMATS = ("url", "b64_json")
QUALITY = 90
"""Of a JPEG."""
Answer = dict[str, Any]
"""What Dynamo calls NvVideosResponse."""
Stored = Callable[[str, bytes], Awaitable[str]]
"""Puts the bytes of a file of that name where clients find it: at the URL."""


def body_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our API that ``request`` has: those of both, those of ``nvext``, and those Dynamo does not know.

    Raises :class:`ApiError` for one that is given twice, or for a format that is not made.
    """
    _check("response_format", request, FORMATS)
    _check("output_format", request, ("mp4",))
    extra = request.get("extra_args") or {}
    parts = [
        {name: request.get(name) for name in SHARED},
        {name: value for name, value in (request.get("nvext") or {}).items() if name not in UNASKED},
        extra.get("media_passthrough") or {},
    ]
    given = [(name, value) for part in parts for name, value in part.items() if value is not None]
    body = dict(given)
    if len(body) < len(given):
        twice = [name for name in body if sum(name == each for each, _ in given) > 1]
        raise ApiError(400, "invalid_request", f"given in nvext and beside it: {few(twice)}; give either", twice[0])
    return body


def _check(name: str, request: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if (request.get(name) or known[0]) not in known:
        message = f"{name} is {' or '.join(known)}, got {briefly(request[name])}"
        raise ApiError(400, "invalid_request", message, name)


class Videos:
    """Makes what Dynamo's clients ask for as jobs of ``service``, with files where ``stored`` puts them."""

    def __init__(self, service: Service, stored: Stored) -> None:
        self._service, self._stored = service, stored
        self._jobs: dict[str, str] = {}

    async def make(
        self, request: Mapping[str, Any], name: str, stopped: Callable[[], bool], headers: Mapping[str, str]
    ) -> AsyncGenerator[Answer, None]:
        """The answer to ``request``, which is called ``name``; with ``stream`` a JPEG for each, previews at first.

        A video that fails is an answer too. It is cancelled when it is ``stopped``, or this is closed. Raises what
        :meth:`Service.submit` does, and :class:`ApiError` if it was cancelled or deleted.
        """
        asked = asked_of(body_of(request))
        job = await asyncio.to_thread(self._service.submit, LOCAL, asked, None, headers)
        self._jobs[name] = job.id
        streams = bool(request.get("stream"))
        try:
            async for current, picture in self._watched(job, stopped, previews=streams):
                job = current
                if picture is not None:
                    yield self._answer(job, [_still(picture)])
            if job.state == State.FAILED:
                yield self._answer(job, [])
            elif streams:
                for frame in await asyncio.to_thread(self._frames, job):
                    yield self._answer(job, [_still(Image.fromarray(frame))])
            else:
                yield self._answer(job, [await self._video(job, request.get("response_format") or FORMATS[0])])
        finally:
            self.cancel(name)  # at once: this task may itself be cancelled

    def cancel(self, name: str) -> None:
        """Cancel the video of the request of that ``name``, if it is being made."""
        job = self._jobs.pop(name, None)
        if job is not None:
            self._service.store.cancel(job)

    def close(self) -> None:
        """Cancel all."""
        for name in [*self._jobs]:
            self.cancel(name)

    async def _watched(
        self, job: Job, stopped: Callable[[], bool], *, previews: bool
    ) -> AsyncIterator[tuple[Job, Image.Image | None]]:
        """``job`` until it is done, with how it looks like becoming when that has changed."""
        seen: bytes | None = None
        async for current in changes(self._service, job):
            if current is None:
                raise ApiError(404, "not_found", "the video was deleted")
            if current.error_code == CANCELLED or stopped():
                raise ApiError(499, CANCELLED, "the video was cancelled")
            picture = await asyncio.to_thread(self._preview, current) if previews else None
            yield current, None if picture in (None, seen) else Image.open(io.BytesIO(picture))
            seen = picture

    def _preview(self, job: Job) -> bytes | None:
        want_preview(self._service, job)
        return preview_of(self._service, job)

    def _answer(self, job: Job, data: list[dict[str, str]]) -> Answer:
        seen = self._service.seen(job)
        answer = {
            "id": seen.id,
            "object": "video",
            "model": seen.model,
            "status": str(seen.status),
            "progress": seen.progress,
            "created": seen.created_at,
            "data": data,
        }
        if seen.error is not None:
            answer["error"] = f"{seen.error.code}: {seen.error.message}"
        return answer if job.finished is None else answer | {"inference_time_s": job.finished - job.created}

    def _frames(self, job: Job) -> np.ndarray:
        return frames_of(file_of(self._service, job), job)

    async def _video(self, job: Job, form: str) -> dict[str, str]:
        content = await asyncio.to_thread(lambda: _read(file_of(self._service, job)))
        if form == "url":
            return {"output_format": "mp4", form: await self._stored(f"videos/{job.id}.mp4", content)}
        return {"output_format": "mp4", form: base64.b64encode(content).decode()}


def _read(file: Path | RemoteFile) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else b"".join(file.read(0, file.size))


def _still(picture: Image.Image) -> dict[str, str]:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return {"output_format": "jpeg", "b64_json": base64.b64encode(buffer.getvalue()).decode()}
