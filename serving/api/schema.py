"""What clients are sent: the resources of OpenAI's videos API, with what is ours under one key, ``stiv``.

This is the contract; ``tests/unit/serving/api/videos.schema.json`` is its copy to compare with.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from stiv_deploy.serving.store.jobs import State


class ErrorDetail(BaseModel):
    """What went wrong, in words and for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The answer to a request that failed."""

    error: ErrorDetail


class VideoError(BaseModel):
    """Why a job failed; ``cancelled`` is one of the codes."""

    code: str
    message: str


class VideoDetails(BaseModel):
    """What OpenAI's videos do not have: place in the queue, seconds to wait, steps, and how it was asked for.

    ``eta_s`` is an estimate, and ``None`` before anything was measured. ``warnings`` say what the model was not trained
    for, or does not hear of the prompts.
    """

    step: int
    steps: int
    queue_position: int | None = None
    eta_s: float | None = None
    seed: int
    fps: float
    num_frames: int
    priority: int
    attempts: int
    task: str
    warnings: list[str] = []


class Remix(BaseModel):
    """What is another in a video that is made once more; the rest, pictures too, stays as it was."""

    model_config = ConfigDict(extra="forbid")
    prompt: str | None = None
    seed: int | None = None


class VideoResource(BaseModel):
    """A video job."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: State
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str | None
    size: str
    seconds: str
    remixed_from_video_id: str | None = None
    error: VideoError | None
    stiv: VideoDetails


class VideoList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[VideoResource]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ModelResource(BaseModel):
    """The served model; ``stiv`` has its sizes, defaults, limits and tasks."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "stiv-deploy"
    stiv: dict[str, Any]


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelResource]


class Health(BaseModel):
    """Whether the service works, and why not."""

    status: Literal["ok", "unavailable"]
    reasons: list[str] = []
