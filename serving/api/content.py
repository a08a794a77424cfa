"""Files of completed jobs as answers, ranges of them too."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from starlette.responses import FileResponse, Response, StreamingResponse

from stiv_deploy.runtime.pipeline.films import open_film
from stiv_deploy.runtime.pipeline.media import write_video
from stiv_deploy.serving.api.service import Service
from stiv_deploy.serving.errors import ApiError
from stiv_deploy.serving.store.files import SPRITESHEET, THUMBNAIL, VIDEO, RemoteFile
from stiv_deploy.serving.store.jobs import Job, State

VARIANTS = {
    "video": (VIDEO, "video/mp4"),
    "gif": (VIDEO, "image/gif"),
    "thumbnail": (THUMBNAIL, "image/webp"),
    "spritesheet": (SPRITESHEET, "image/png"),
}
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
"""One range; with several a server may answer with the whole, as we do of a file that is elsewhere."""


def content_of(service: Service, job: Job, variant: str, headers: Mapping[str, str], *, bare: bool = False) -> Response:
    """The file of ``job`` that ``variant`` names, to a request with ``headers``; or its headers, ``bare``.

    Raises :class:`ApiError` if there is no such file.
    """
    name, kind = VARIANTS[variant]
    found = file_of(service, job, name)
    if variant == "gif":
        return _gif(found, job)
    filename = f"{job.id}{Path(name).suffix}"
    if isinstance(found, Path):
        return FileResponse(found, 200, {"x-video-id": job.id}, kind, filename=filename)
    return _remote(found, headers, kind, _headers(job, filename), bare=bare)


def file_of(service: Service, job: Job, name: str = VIDEO) -> Path | RemoteFile:
    """A file of ``job``; :class:`ApiError` if there is no such file."""
    if job.state == State.FAILED:
        raise ApiError(409, job.error_code or "failed", f"the video failed: {job.error_message}", "video_id")
    if job.state != State.COMPLETED:
        raise ApiError(409, "video_not_ready", f"the video is {job.state}", "video_id", 1)
    found = service.results.files.get(job.id, name)
    if found is None:
        raise ApiError(404, "not_found", "the file of this video is gone", "video_id")
    return found


def _headers(job: Job, filename: str) -> dict[str, str]:
    return {"x-video-id": job.id, "content-disposition": f'attachment; filename="{filename}"'}


def _gif(video: Path | RemoteFile, job: Job) -> Response:
    """The frames of ``video`` as a GIF, made now."""
    with tempfile.TemporaryDirectory() as folder:
        rate = float(json.loads(job.facts)["fps"])
        content = write_video(Path(folder) / "video.gif", frames_of(video, job), rate).read_bytes()
    return Response(content, 200, _headers(job, f"{job.id}.gif"), "image/gif")


def frames_of(video: Path | RemoteFile, job: Job) -> np.ndarray:
    """The frames uint8 [F, H, W, 3] of the ``video`` of ``job``."""
    with tempfile.TemporaryDirectory() as folder:
        path = video if isinstance(video, Path) else Path(folder) / VIDEO
        if not isinstance(video, Path):
            video.fetch(path)
        return np.concatenate([*open_film(path).windows(job.frames, job.height, job.width)])


def _remote(file: RemoteFile, asked: Mapping[str, str], kind: str, headers: dict[str, str], *, bare: bool) -> Response:
    """``file``, or the range of it that is ``asked`` for, read while it is sent."""
    headers |= {"accept-ranges": "bytes", "etag": f'"{file.tag}"'}
    wanted = asked.get("range", "") if asked.get("if-range", headers["etag"]) == headers["etag"] else ""
    part, status = byte_range(wanted, file.size), 206
    if part is None:
        part, status = range(file.size), 200
    elif not part:
        return Response(None, 416, {"content-range": f"bytes */{file.size}"})
    else:
        headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{file.size}"
    headers["content-length"] = str(len(part))
    if bare:
        return Response(None, status, headers, kind)
    return StreamingResponse(file.read(part.start, part.stop), status, headers, kind)


def byte_range(header: str, size: int) -> range | None:
    """The bytes of a file of ``size`` that a ``Range`` header asks for, empty where there are none of them.

    ``None`` if it asks for nothing that is one range of bytes, and so for the whole (RFC 9110, section 14.2).
    """
    found = RANGE.fullmatch(header.replace(" ", ""))
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return range(min(int(first), size), min(int(last) + 1, size) if last else size)
