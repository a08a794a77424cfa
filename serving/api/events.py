"""Server-sent events of one job: its resource whenever it has changed, until it is done."""

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from stiv_deploy.serving.api.service import Service
from stiv_deploy.serving.store.jobs import Job

LOOK = 0.1
"""Seconds between two looks."""
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
    """The events ``video`` (a resource) and, at the end of a job that was deleted, ``deleted``."""
    told, last = time.monotonic(), None
    async for current in changes(service, job):
        if current is None:
            yield f'event: deleted\ndata: {{"id": "{job.id}"}}\n\n'
        elif current is not last:
            last, told = current, time.monotonic()
            video = await run_in_threadpool(service.seen, current)
            yield f"event: video\ndata: {video.model_dump_json()}\n\n"
        elif time.monotonic() > told + ALIVE:
            told = time.monotonic()
            yield ": alive\n\n"
