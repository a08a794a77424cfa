"""The routes: OpenAI's videos API, and what is ours beside it."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Literal

from anyio import CancelScope
from anyio.lowlevel import checkpoint
from fastapi import APIRouter, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse

from stiv_deploy.runtime.errors import StivError, one_line
from stiv_deploy.serving.api.answers import api_error, error_answer, poll_after
from stiv_deploy.serving.api.body import read_body
from stiv_deploy.serving.api.content import content_of
from stiv_deploy.serving.api.events import changes, stream
from stiv_deploy.serving.api.guard import OWNER, Guard, Tokens
from stiv_deploy.serving.api.metrics import Metrics
from stiv_deploy.serving.api.page import router as page_router
from stiv_deploy.serving.api.schema import ErrorAnswer, Health, ModelList, Remix, VideoDeleted, VideoList, VideoResource
from stiv_deploy.serving.api.service import Service
from stiv_deploy.serving.errors import ApiError, StoreError
from stiv_deploy.serving.store.jobs import Job

log = logging.getLogger(__name__)
KEY_LIMIT = 255
"""Characters of an idempotency key."""
WORDS = {404: "not_found", 405: "method_not_allowed"}
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def alone(_app: FastAPI) -> AsyncIterator[None]:
    """The life of a server that starts nothing else."""
    yield


def create_app(service: Service, tokens: Tokens, lifespan: Lifespan = alone) -> Guard:
    """The ASGI application of ``service``, whose ``lifespan`` is whatever works for it."""
    app = FastAPI(title="stiv serve", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service, app.state.metrics = service, Metrics(service)
    app.include_router(router)
    app.include_router(page_router)
    app.add_exception_handler(StivError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _fault)
    return Guard(app, tokens, service.settings.body_bytes)


router = APIRouter(responses={400: {"model": ErrorAnswer}})


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


def _owner(request: Request) -> str:
    return str(request.scope[OWNER])


def _answer(video: VideoResource) -> JSONResponse:
    return JSONResponse(video.model_dump(mode="json"), headers=poll_after(video))


def _check_key(key: str | None) -> None:
    if key is not None and not 0 < len(key) <= KEY_LIMIT:
        raise ApiError(400, "invalid_request", f"an Idempotency-Key has 1 to {KEY_LIMIT} characters")


async def _submitted(request: Request, key: str | None) -> Job:
    _check_key(key)
    asked = await read_body(request)
    with CancelScope(shield=True):  # who is cancelled meanwhile still learns of the job that is stored
        job = await run_in_threadpool(_service(request).submit, _owner(request), asked, key, request.headers)
    return job


Key = Annotated[str | None, Header(alias="Idempotency-Key")]


@router.post("/v1/videos")
async def create(request: Request, key: Key = None) -> VideoResource:
    """Ask for a video."""
    job = await _submitted(request, key)
    return _answer(await run_in_threadpool(_service(request).seen, job))  # type: ignore[return-value]


@router.post("/v1/videos/sync")
async def create_and_wait(request: Request) -> Response:
    """Ask for a video and wait for it: the answer is the file. A client that leaves cancels it."""
    service, job = _service(request), await _submitted(request, None)
    finished = False
    try:
        await checkpoint()
        async for current in changes(service, job):
            if current is None:
                raise ApiError(404, "not_found", "the video was deleted", "video_id")
            finished = not current.live
            if finished:
                job = current
            elif await request.is_disconnected():
                break
    finally:
        if not finished:
            service.store.cancel(job.id)  # at once: this task may itself be cancelled
    if not finished:
        raise ApiError(499, "cancelled", "the client has left")
    return content_of(service, job, "video", {})


@router.get("/v1/videos")
def list_videos(
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=0, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """Your jobs, newest first."""
    service = _service(request)
    page = service.store.page(_owner(request), after, limit, ascending=order == "asc")
    if page is None:
        raise ApiError(404, "not_found", f"there is no video {str(after)[:80]!r}", "after")
    data = [service.seen(job) for job in page.jobs]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, first_id=first, last_id=last, has_more=page.more)


@router.get("/v1/videos/{video_id}")
def retrieve(request: Request, video_id: str) -> VideoResource:
    """One job."""
    service = _service(request)
    return _answer(service.seen(service.job(_owner(request), video_id)))  # type: ignore[return-value]


@router.delete("/v1/videos/{video_id}")
def delete(request: Request, video_id: str) -> VideoDeleted:
    """Forget a job and its files, whatever its state."""
    _service(request).delete(_owner(request), video_id)
    return VideoDeleted(id=video_id)


@router.post("/v1/videos/{video_id}/remix")
def remix(request: Request, video_id: str, body: Remix, key: Key = None) -> VideoResource:
    """Ask for a video once more, with another prompt or seed."""
    service = _service(request)
    _check_key(key)
    job = service.remix(_owner(request), video_id, body, key, request.headers)
    return _answer(service.seen(job))  # type: ignore[return-value]


@router.post("/v1/videos/{video_id}/cancel")
def cancel(request: Request, video_id: str) -> VideoResource:
    """Cancel a job; one that is done stays as it is."""
    service = _service(request)
    return service.seen(service.cancel(_owner(request), video_id))


@router.head("/v1/videos/{video_id}/content", include_in_schema=False)
@router.get("/v1/videos/{video_id}/content")
def content(
    request: Request, video_id: str, variant: Literal["video", "gif", "thumbnail", "spritesheet"] = "video"
) -> Response:
    """The file of a completed job; ranges of it too."""
    service = _service(request)
    job, bare = service.job(_owner(request), video_id), request.method == "HEAD"
    return content_of(service, job, variant, request.headers, bare=bare)


@router.get("/v1/videos/{video_id}/events")
def events(request: Request, video_id: str) -> Response:
    """Server-sent events: the job whenever it has changed, until it is done."""
    service = _service(request)
    job = service.job(_owner(request), video_id)
    return StreamingResponse(stream(service, job), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


@router.get("/v1/models")
def models(request: Request) -> ModelList:
    """The served model: its sizes, defaults and limits."""
    return ModelList(data=[_service(request).model()])


@router.get("/health")
def health(request: Request) -> Response:
    """Whether anybody works."""
    return _health(_service(request).reasons(ready=False))


@router.get("/ready")
def ready(request: Request) -> Response:
    """Whether new jobs are made at once."""
    return _health(_service(request).reasons(ready=True))


def _health(reasons: list[str]) -> Response:
    health = Health(status="unavailable" if reasons else "ok", reasons=reasons)
    return JSONResponse(health.model_dump(), 503 if reasons else 200)


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    return Response(request.app.state.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StivError)
    if isinstance(error, StoreError):
        log.error("%s", error)
    told = api_error(error)
    request.app.state.metrics.refused(told.code)
    return error_answer(told)


def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    name = str(fault["loc"][-1])
    return error_answer(ApiError(400, "invalid_request", one_line(f"{name}: {fault['msg']}"), name[:80]))


def _left(_request: Request, _error: Exception) -> Response:
    return error_answer(ApiError(499, "cancelled", "the client has left"))


def _http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_answer(ApiError(error.status_code, WORDS.get(error.status_code, "invalid_request"), str(error.detail)))


def _fault(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_answer(ApiError(500, "internal_error", "a fault of the server; its log has more"))
