"""Answers: errors in OpenAI's form, and jobs as clients see them."""

import json
import math
from typing import Any

from starlette.responses import JSONResponse, Response

from stiv_deploy.runtime.errors import StivError, one_line
from stiv_deploy.serving.api.schema import ErrorAnswer, ErrorDetail, VideoDetails, VideoError, VideoResource
from stiv_deploy.serving.errors import ApiError, StoreError
from stiv_deploy.serving.store.jobs import Job, State

POLL_AFTER = "openai-poll-after-ms"
SOON, LATE, UNKNOWN = 100, 5_000, 1_000
"""Milliseconds between two polls: fewest, most, and where nobody knows how long it takes."""
STORE_BACK = 10.0
"""Seconds after which one may try again where the job store could not be used."""
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def api_error(error: StivError) -> ApiError:
    """``error`` as clients are to be told of it."""
    if isinstance(error, StoreError):
        status, code = (507, "insufficient_storage") if error.full else (503, "store_unavailable")
        return ApiError(status, code, str(error), retry_after=STORE_BACK)
    return error if isinstance(error, ApiError) else ApiError(400, "invalid_request", one_line(str(error)))


def error_answer(error: ApiError) -> Response:
    """``error`` in OpenAI's form."""
    kind = TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    detail = ErrorDetail(message=str(error), type=kind, param=error.param, code=error.code)
    headers = {} if error.retry_after is None else {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(ErrorAnswer(error=detail).model_dump(), error.status, headers)


def resource(job: Job, position: int | None, eta: float | None) -> VideoResource:
    """``job`` as clients see it, with its place in the queue and the seconds until it is done."""
    facts: dict[str, Any] = json.loads(job.facts)
    failed = job.state == State.FAILED
    return VideoResource(
        id=job.id,
        model=facts["model"],
        status=job.state,
        progress=100 if job.state == State.COMPLETED else min(99, 100 * job.step // job.steps),
        created_at=int(job.created),
        completed_at=int(job.finished) if job.state == State.COMPLETED and job.finished else None,
        expires_at=None if job.expires is None else int(job.expires),
        prompt=facts["prompt"],
        remixed_from_video_id=facts.get("remixed_from"),
        size=f"{job.width}x{job.height}",
        seconds=f"{job.frames / facts['fps']:g}",
        error=VideoError(code=job.error_code or "", message=job.error_message or "") if failed else None,
        stiv=VideoDetails(
            step=job.step,
            steps=job.steps,
            queue_position=position,
            eta_s=None if eta is None else round(eta, 3),
            seed=facts["seed"],
            fps=facts["fps"],
            num_frames=job.frames,
            priority=job.priority,
            attempts=job.attempts,
            task=facts["task"],
            warnings=facts["warnings"],
        ),
    )


def poll_after(video: VideoResource) -> dict[str, str]:
    """The header that says when to ask again of a job that is not done."""
    if video.status not in (State.QUEUED, State.IN_PROGRESS):
        return {}
    eta = video.stiv.eta_s
    pause = UNKNOWN if eta is None else min(LATE, max(SOON, int(500 * eta)))
    return {POLL_AFTER: str(pause)}
