"""How a clip was made: the record that its file carries, the report of a generation, and both read back."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from stiv_deploy.runtime.errors import RequestError, one_line
from stiv_deploy.runtime.files import parse_json, read_text
from stiv_deploy.runtime.pipeline.given import PictureData, PictureFile
from stiv_deploy.runtime.pipeline.media import is_clip, read_comment
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.tasks import task_of

EMBEDDED_LIMIT = 2**24
"""Most characters of a record in a clip; readers of PNG refuse a file with much more text."""


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """One clip: its own request, the hash of the bundle that made it, and on which backend.

    ``omitted`` are fields of the request that were too large for the clip, ``lost`` says what of its prompts the model
    did not hear, ``warnings`` what of it the model was not trained for.
    """

    bundle: str
    backend: str
    request: GenerationRequest
    omitted: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """What it is called to be given just these frames, see :data:`~stiv_deploy.runtime.pipeline.tasks.TASKS`."""
        return task_of(self.request.frames or self.request.latents, self.request.num_frames or 0).name

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {"bundle": self.bundle, "backend": self.backend, "task": self.task, "request": self.request.to_json()}
        values |= {"lost": dict(self.lost)} if self.lost else {}
        values |= {"warnings": list(self.warnings)} if self.warnings else {}
        return values | ({"omitted": list(self.omitted)} if self.omitted else {})

    def embedded(self, limit: int | None = None) -> str:
        """As JSON text for a clip, which may be passed on: of a picture's absolute path only the file's name.

        If it takes more than ``limit`` characters (by default ``EMBEDDED_LIMIT``), given pictures, latents and noise
        are left out; a report has them.
        """
        frames = {index: _without_folder(picture) for index, picture in self.request.frames.items()}
        text = self._compact(request=self.request.changed(frames=frames))
        if len(text) <= (limit or EMBEDDED_LIMIT):
            return text
        omitted = tuple(name for name in ("frames", "latents", "noise") if getattr(self.request, name))
        return self._compact(request=self.request.changed(frames={}, latents={}, noise=None), omitted=omitted)

    def _compact(self, **changes: Any) -> str:
        values = replace(self, **changes).to_json() | {"task": self.task}  # which it stays without what is left out
        return json.dumps(values, separators=(",", ":"))


def embedded_together(records: Sequence[GenerationRecord]) -> str:
    """The :meth:`GenerationRecord.embedded` records of one file, as a list; each has its share of the limit."""
    return f"[{','.join(record.embedded(EMBEDDED_LIMIT // len(records)) for record in records)}]"


def _without_folder(picture: PictureFile | PictureData) -> PictureFile | PictureData:
    if isinstance(picture, PictureFile):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(picture.path).is_absolute():
                return replace(picture, path=kind(picture.path).name)
    return picture


def report_text(files: Sequence[Path], records: Sequence[GenerationRecord], timings: Mapping[str, float]) -> str:
    """How the clips in ``files`` were made, whole, as JSON; :func:`read_requests` reads it."""
    clips = [{"file": str(file)} | record.to_json() for file, record in zip(files, records, strict=True)]
    return json.dumps({"clips": clips, "timings": dict(timings)}, indent=2)


class Recorded(NamedTuple):
    """A request that was read, and the hash of the bundle that it was made with, if known."""

    request: GenerationRequest
    bundle: str | None


def read_requests(path: str | Path) -> list[Recorded]:
    """The requests in ``path``: JSON of one, a list, a report, or a clip that carries its record.

    Paths of pictures in it are looked up from the working folder. Raises a :class:`RequestError` that names ``path``.
    """
    return _read(Path(path), _recorded)


def _read(path: Path, found: Callable[[Any], Iterator[Recorded]]) -> list[Recorded]:
    """What ``found`` finds in the JSON of ``path``; :class:`RequestError`."""
    try:
        text = read_comment(path) if is_clip(path) else read_text(path)
        return list(found(parse_json(text)))
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(str(error), 200)
        raise RequestError(f"{path}: no request can be read from it ({reason})") from None
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def read_template(path: str | Path) -> GenerationRequest:
    """The one request in ``path``: as :func:`read_requests` reads it, or that of the clips of a long video.

    Raises a :class:`RequestError` that names ``path``, also if there are several.
    """
    requests = _read(Path(path), _templates)
    if len(requests) != 1:
        raise RequestError(f"{path}: has {len(requests)} requests, and one is wanted; give a file of one clip")
    return requests[0].request


def _templates(values: Any) -> Iterator[Recorded]:
    match values:
        case {"template": template, "passes": _, "bundle": str(bundle)}:
            yield Recorded(GenerationRequest.from_json(template), bundle)
        case _:
            yield from _recorded(values)


def _recorded(values: Any) -> Iterator[Recorded]:
    match values:
        case [*items] | {"clips": [*items], "timings": _}:
            for item in items:
                yield from _recorded(item)
        case {"request": request, "bundle": str(bundle), **rest}:
            _check_whole(rest)
            yield Recorded(GenerationRequest.from_json(request), bundle)
        case _:
            yield Recorded(GenerationRequest.from_json(values), None)


def _check_whole(rest: Mapping[Any, Any]) -> None:
    omitted = rest.get("omitted")
    if omitted:
        names = " and ".join(map(str, omitted)) if isinstance(omitted, list) else str(omitted)
        raise RequestError(
            f"the {one_line(names, 80)} of its request were too large for it; use the report that 'stiv generate "
            "--json' wrote"
        )
