"""The door: closed unless there is a reason to open it, and each owner sees its own."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stiv_deploy.serving.api.guard import OPEN, Rate, Tokens, add_token, read_tokens
from stiv_deploy.serving.errors import ServeError

ALICE, BOB = {"authorization": "Bearer alice-token"}, {"authorization": "bearer bob-token"}


@pytest.fixture
def place(place_of: Callable[..., Any], bundle_path: Path) -> Any:
    digests = {name: hashlib.sha256(f"{name}-token".encode()).hexdigest() for name in ("alice", "bob")}
    return place_of(bundle_path, Tokens(digests))


def test_no_route_is_forgotten(place: Any) -> None:
    """Deny by default: also what somebody adds tomorrow."""
    found = place.client.get("/openapi.json", headers=ALICE).json()["paths"]
    assert len(found) > 9
    for path, methods in {**found, "/openapi.json": ["get"], "/nothing": ["get"]}.items():
        for method in methods:
            status = place.client.request(method, path.replace("{video_id}", "video_0")).status_code
            assert (status == 401) == (path not in OPEN), (method, path)


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic alice-token", "alice-token"])
def test_wrong_tokens(place: Any, header: str) -> None:
    answer = place.client.get("/v1/videos", headers={"authorization": header})
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_owners_see_their_own_jobs_only(place: Any) -> None:
    job = place.client.post("/v1/videos", json={"prompt": "digit"}, headers=ALICE).json()["id"]
    address = f"/v1/videos/{job}"
    assert place.client.get(address, headers=ALICE).status_code == 200
    for method, path in (
        ("GET", address),
        ("DELETE", address),
        ("POST", f"{address}/cancel"),
        ("POST", f"{address}/remix"),
        ("GET", f"{address}/content"),
        ("GET", f"{address}/events"),
    ):
        assert place.client.request(method, path, headers=BOB, json={}).status_code == 404
    assert place.client.get("/v1/videos", headers=BOB).json()["data"] == []
    assert place.client.get(f"/v1/videos?after={job}", headers=BOB).status_code == 404
    assert place.client.get(address, headers=ALICE).json()["status"] == "queued"


def test_pages_of_other_sites_and_other_names_are_kept_out(place_of: Callable[..., Any], bundle_path: Path) -> None:
    place = place_of(bundle_path)
    body = {"data": {"prompt": "digit"}, "files": {"a": b""}}
    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example:8000"}, {"origin": "null"}):
        assert place.client.post("/v1/videos", headers=headers, **body).status_code == 403
    for headers in ({"host": "localhost:8000"}, {"host": "[::1]:8000"}, {"origin": "http://127.0.0.1:8000"}):
        assert place.client.get("/v1/videos", headers=headers).status_code == 200


def test_prompts_are_in_no_log(
    place_of: Callable[..., Any], bundle_path: Path, finished: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    place = place_of(bundle_path)
    done = place.ask(prompt="secretword digit", negative_prompt="secretword")["id"]
    assert place.client.post("/v1/videos", json={"prompt": "secretword", "size": "x"}).status_code == 400
    finished(place.worker())
    assert place.look(done)["status"] == "completed"
    assert "secretword" in str(place.look(done)["stiv"]["warnings"])  # its owner is told
    assert "secretword" not in caplog.text


def test_answers_are_safe_to_show(place: Any) -> None:
    for answer in (place.client.get("/health"), place.client.get("/v1/videos")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_a_token_is_shown_once_and_kept_hashed(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    alice, bob = add_token(path, "alice"), add_token(path, "bob")
    assert alice not in path.read_text()
    assert path.stat().st_mode & 0o77 == 0
    tokens = read_tokens(path)
    assert (tokens.owner(alice), tokens.owner(bob), tokens.owner("x"), tokens.owner("é")) == (
        "alice",
        "bob",
        None,
        None,
    )


@pytest.mark.parametrize("text", ["", "alice", "alice abc", f"alice {'X' * 64}", f"a b {'0' * 64}"])
def test_a_file_that_has_no_tokens_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ServeError, match="--new-token NAME"):
        read_tokens(tmp_path / "tokens")


def test_a_rate_is_a_bucket_that_fills() -> None:
    now = [0.0]
    rate = Rate(60, lambda: now[0])
    assert [rate.take("a") for _ in range(60)] == [0.0] * 60
    assert rate.take("a") == pytest.approx(1.0)
    assert rate.take("b") == 0
    now[0] += 1.0
    assert rate.take("a") == 0
