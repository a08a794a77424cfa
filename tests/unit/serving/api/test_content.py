"""Files of completed jobs as answers: wherever they are, and ranges of them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stiv_deploy.serving.api.content import byte_range


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("bytes=0-3", range(0, 4)),
        ("bytes=4-", range(4, 10)),
        ("bytes=-3", range(7, 10)),
        ("bytes=-30", range(0, 10)),
        ("bytes=8-99", range(8, 10)),
        ("bytes=10-12", range(10, 10)),
        ("bytes=-0", range(10, 10)),
        ("bytes=3-2", None),
        ("bytes=-", None),
        ("bytes=0-1,4-5", None),
        ("lines=0-1", None),
        ("bytes=a-b", None),
    ],
)
def test_a_range_is_as_http_says(header: str, found: range | None) -> None:
    assert byte_range(header, 10) == found


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 40))
def test_a_range_is_within_its_file(first: int, last: int, size: int) -> None:
    found = byte_range(f"bytes={first}-{last}", size)
    if last < first:
        assert found is None
    else:
        assert found is not None
        assert [*found] == [at for at in range(first, last + 1) if at < size]


@pytest.fixture(params=["disk", "memory"])
def done(
    request: pytest.FixtureRequest,
    place_of: Callable[..., Any],
    bundle_path: Path,
    finished: Callable[..., None],
    memory: str,
) -> tuple[Any, str]:
    """The client of a service with a completed job, and the address of its video; on a disk, and elsewhere."""
    place = place_of(bundle_path, results=memory if request.param == "memory" else None)
    job = place.ask()["id"]
    finished(place.worker())
    return place, f"/v1/videos/{job}/content"


def test_ranges_are_answered_alike_from_everywhere(done: tuple[Any, str]) -> None:
    place, address = done
    whole = place.client.get(address)
    assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")
    assert whole.headers["content-length"] == str(len(whole.content))
    assert whole.headers["content-disposition"].endswith('.mp4"')

    def part(value: str, **more: str) -> Any:
        return place.client.get(address, headers={"range": value} | more)

    some = part("bytes=4-7")
    assert (some.status_code, some.content) == (206, whole.content[4:8])
    assert some.headers["content-range"] == f"bytes 4-7/{len(whole.content)}"
    assert part("bytes=-5").content == whole.content[-5:]
    none = part(f"bytes={len(whole.content)}-")
    assert (none.status_code, none.headers["content-range"]) == (416, f"bytes */{len(whole.content)}")
    assert part("bytes=0-1", **{"if-range": whole.headers["etag"]}).status_code == 206
    assert part("bytes=0-1", **{"if-range": '"another"'}).content == whole.content
    for value, status, size in ((None, 200, len(whole.content)), ("bytes=2-4", 206, 3)):
        head = place.client.head(address, headers={"range": value} if value else {})
        assert (head.status_code, head.content, head.headers["content-length"]) == (status, b"", str(size))


def test_all_variants_are_there_and_go_with_their_job(done: tuple[Any, str]) -> None:
    place, address = done
    for variant in ("gif", "thumbnail", "spritesheet"):
        assert Image.open(io.BytesIO(place.client.get(f"{address}?variant={variant}").content)).size
    again = place.ask()
    assert again["status"] == "completed"  # of an equal request the files are there at once
    assert place.client.delete(address.removesuffix("/content")).status_code == 200
    assert place.client.get(address).status_code == 404
    assert place.client.get(f"/v1/videos/{again['id']}/content").status_code == 200
    assert place.results.files.list() == [again["id"]]
    place.clock.now += 2 * place.settings.keep_seconds
    place.service.tidy()
    assert place.results.files.list() == []
