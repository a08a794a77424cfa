"""The worker that Dynamo starts, asks and ends; its own options are Dynamo's variables, such as ``DYN_NAMESPACE``.

See Dynamo's ``dynamo/common/backend/engine.py`` for the contract; tried with ai-dynamo 1.6.1.
"""

import argparse
import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack
from threading import Event
from typing import Any

from dynamo.common.backend import DiffusionEngine, EngineConfig, WorkerConfig
from dynamo.common.backend.health_check import build_raw_health_check_payload, is_probe
from dynamo.common.backend.run import run
from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup, DynamoRuntimeConfig
from dynamo.common.storage import get_fs, upload_to_fs
from dynamo.llm import ModelInput, exceptions

from stiv_deploy.runtime.errors import StivError, one_line
from stiv_deploy.serving.api.answers import api_error
from stiv_deploy.serving.dynamo.videos import Answer, Videos
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.front import Front
from stiv_deploy.serving.server import working
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.workers.supervisor import Supervisor

READY = 0.1
"""Seconds between two looks whether a worker has begun."""


def run_on_dynamo(settings: ServeSettings) -> None:
    """Serve as a worker of Dynamo until SIGTERM or Ctrl-C; raises what :class:`Front` does."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)  # Dynamo's own handlers would call ours too, which end all at once
    try:
        run(StivEngine, [settings.model_dump_json()])
    except Exception as error:
        if type(error) is not Exception:  # Dynamo's core has no other for what ends it
            raise
        raise ServeError(f"--dynamo: {one_line(str(error))}") from None


def raised(error: StivError) -> Exception:
    """The exception by which Dynamo's frontend has the status of ``error``; it tells clients the message of a 400."""
    told = api_error(error)
    if told.status == 429:
        return exceptions.HttpError(429, str(told))
    if told.status == 499:
        return exceptions.Cancelled(str(told))
    return exceptions.InvalidArgument(str(told)) if told.status < 500 else exceptions.Unknown(str(told))


class StivEngine(DiffusionEngine):
    """The service of ``settings``, whose clients are those of Dynamo's frontend; the methods are Dynamo's."""

    def __init__(self, front: Front, settings: ServeSettings, media: str, url: str | None) -> None:
        self._front, self._service, self._settings = front, front.service, settings
        self._media, self._url = get_fs(media), url
        self._videos = Videos(front.service, self._store)
        self._stack, self._failed = ExitStack(), Event()

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple["StivEngine", WorkerConfig]:
        """The engine of the :class:`ServeSettings` that are the one argument, as JSON, and Dynamo's options of it."""
        assert argv is not None
        settings = ServeSettings.model_validate_json(argv[0])
        parser = argparse.ArgumentParser()
        DynamoRuntimeArgGroup().add_arguments(parser)
        chosen = DynamoRuntimeConfig.from_cli_args(parser.parse_args([]))
        chosen.validate()
        config = WorkerConfig.from_runtime_config(
            chosen, settings.name, settings.name, ModelInput.Text, endpoint_types="videos", enable_kv_routing=False
        )
        return cls(Front(settings), settings, chosen.media_output_fs_url, chosen.media_output_http_url), config

    async def start(self, worker_id: int) -> EngineConfig:
        """Start the workers, and wait until one is ready; :class:`ServeError` if none can start."""
        self._stack.callback(self._front.close)
        supervisor = Supervisor(self._settings, self._service.store, self._failed.set)
        self._stack.enter_context(working(self._front, supervisor))
        self._stack.callback(self._videos.close)
        while not any(worker.ready for worker in self._service.store.workers()):
            if self._failed.is_set():
                raise ServeError("no worker of the service could start")
            await asyncio.sleep(READY)
        return EngineConfig(model=self._settings.name, served_model_name=self._settings.name)

    async def _store(self, name: str, content: bytes) -> str:
        return str(await upload_to_fs(self._media, name, content, self._url))

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[Answer]:
        """The answer to ``request``, an NvCreateVideoRequest, or those that are streamed; raises Dynamo's exceptions.

        The probe of its health check makes no video.
        """
        if is_probe(request):
            yield self._health()
            return
        answers = self._videos.make(request, context.id(), context.is_stopped, context.trace_headers() or {})
        try:
            async for answer in answers:
                yield answer
        except StivError as error:
            raise raised(error) from None
        finally:
            await answers.aclose()

    def _health(self) -> Answer:
        reasons = self._service.reasons(ready=False)
        if reasons:
            raise exceptions.EngineShutdown("; ".join(reasons))
        return {"id": "", "model": self._settings.name, "created": 0, "data": []}

    async def health_check_payload(self) -> dict[str, Any]:
        """What Dynamo sends to see whether this lives."""
        return dict(build_raw_health_check_payload({"prompt": "", "model": self._settings.name}))

    async def abort(self, context: Any) -> None:
        """The client has left."""
        self._videos.cancel(context.id())

    async def cleanup(self) -> None:
        """End what nobody waits for any more, and close the service; a second time does nothing."""
        await asyncio.to_thread(self._stack.close)
