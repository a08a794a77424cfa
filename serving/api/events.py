"""Server-sent events of one job: its resource whenever it has changed, and how it looks like becoming, to its end."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from stiv_deploy.serving.api.service import Service
from stiv_deploy.serving.store.jobs import Job, State

LOOK = 0.1
"""Seconds between two looks."""
WANTED = 4.0
"""Seconds between two signs that somebody looks."""
ALIVE = 15.0
"""Seconds of silence after which a comment says that the connection lives."""


async def changes(service: Service, job: Job) -> AsyncIterator[Job | None]:
    """``job`` now and whenever its state or step has changed, to its end; ``None`` when it was deleted, and in between.

    In between means that there was nothing new for a moment.
    """
    last: Job | None = None
    current: Job | None = job
    while current is not None:
        if last is None or (current.state, current.step) != (last.state, last.step):
            last = current
            yield current
            if not current.live:
                return
        else:
            yield last
        await asyncio.sleep(LOOK)
        current = await run_in_threadpool(service.store.get, job.id)
    yield None


async def stream(service: Service, job: Job) -> AsyncIterator[str]:
    """The events ``video`` (a resource), ``preview`` (a picture of it) and, if it was deleted, at last ``deleted``."""
    told, last, seen = time.monotonic(), None, None
    looked = -ALIVE
    async for current in changes(service, job):
        if time.monotonic() > looked + WANTED:
            looked = time.monotonic()
            await run_in_threadpool(want_preview, service, current)
        if current is None:
            yield f'event: deleted\ndata: {{"id": "{job.id}"}}\n\n'
        elif current is not last:
            last, told = current, time.monotonic()
            video = await run_in_threadpool(service.seen, current)
            yield f"event: video\ndata: {video.model_dump_json()}\n\n"
        elif time.monotonic() > told + ALIVE:
            told = time.monotonic()
            yield ": alive\n\n"
        picture = await run_in_threadpool(preview_of, service, current)
        if picture is not None and picture != seen:
            seen, told = picture, time.monotonic()
            image = base64.b64encode(picture).decode()
            yield f'event: preview\ndata: {{"id": "{job.id}", "image": "data:image/webp;base64,{image}"}}\n\n'


def want_preview(service: Service, job: Job | None) -> None:
    """Tell who makes ``job`` that somebody looks."""
    if job is not None and job.live and service.bundle.manifest.preview is not None:
        service.results.previews.want(job.id)


def preview_of(service: Service, job: Job | None) -> bytes | None:
    """The newest preview of a running ``job``, a WebP."""
    if job is None or job.state != State.IN_PROGRESS:
        return None
    return service.results.previews.get(job.id)
