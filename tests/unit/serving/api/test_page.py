"""The page: what is served of it and to whom; and all of it in a real browser, where there is one."""

import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

from stiv_deploy.runtime.bundle.bundle import read_manifest, write_manifest
from stiv_deploy.serving.api.app import create_app
from stiv_deploy.serving.api.guard import Tokens
from stiv_deploy.serving.api.page import FILES, FOLDER
from stiv_deploy.serving.server import address, listen

TOKENS = Tokens({"alice": sha256(b"alice-token").hexdigest()})
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 20_000
"""Milliseconds that the browser waits at most for what must come."""


@pytest.mark.parametrize("path", FILES)
def test_it_is_served_to_everybody_and_kept_to_itself(
    place_of: Callable[..., Any], bundle_path: Path, path: str
) -> None:
    place = place_of(bundle_path, TOKENS)
    answer = place.client.get(path)
    assert (answer.status_code, answer.headers["x-content-type-options"]) == (200, "nosniff")
    assert answer.headers["content-type"].partition(";")[0] == FILES[path][1]
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"default-src 'self'", "form-action 'none'", "frame-ancestors 'none'"} <= {*policy}
    assert "unsafe" not in " ".join(policy)
    assert place.client.get("/v1/videos").status_code == 401


def test_it_can_be_asked_for_without_its_body(place: Any) -> None:
    answer = place.client.head("/")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("name", [name for name, _ in FILES.values()])
def test_it_is_whole_in_itself(name: str) -> None:
    """No other host, and nothing that its own policy would stop."""
    text = (FOLDER / name).read_text()
    assert re.findall(r"https?:|[\"'(]//|@import|url\(", text) == []
    assert re.findall(r"<script(?![^>]* src=)|<style| style=| on\w+=|innerHTML|\beval\(", text) == []


def test_all_of_it_is_served() -> None:
    assert {file.name for file in FOLDER.iterdir()} == {name for name, _ in FILES.values()}
    linked = re.findall(r'(?:src|href)="(/[^"]*)"', (FOLDER / "index.html").read_text())
    assert {"/", *linked} == {*FILES}


@contextmanager
def served(place: Any, tokens: Tokens) -> Iterator[str]:
    """The address of ``place`` on a real socket."""
    server = uvicorn.Server(
        uvicorn.Config(create_app(place.service, tokens), log_level="warning", timeout_graceful_shutdown=1)
    )
    with listen("127.0.0.1", 0, tokens) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield address(listening)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for all cases."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("there is no chromium: the page is not tried in a browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, place_of: Callable[..., Any], bundle_path: Path) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """Opens the page of a new service with ``tokens``, as wide as a telephone; at the end nothing was complained of."""
    context = chromium.new_context(viewport={"width": 360, "height": 800}, accept_downloads=True)
    context.set_default_timeout(SECONDS)
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    with_tokens: list[Any] = []

    def open_page(tokens: Tokens | None = None, bundle: Path = bundle_path) -> tuple[Any, Any]:
        place = place_of(bundle, tokens)
        opened = served(place, tokens or Tokens())
        with_tokens.append(opened)
        tab.goto(opened.__enter__())
        return place, tab

    yield open_page
    context.close()
    for opened in with_tokens:
        opened.__exit__(None, None, None)
    assert [line for line in said if "a status of 4" not in line and not line.startswith(" Note")] == []


def picture(color: int = 200) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), color, np.uint8)).save(buffer, "PNG")
    return {"name": "../a.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def ask(tab: Any, prompt: str, steps: int) -> Any:
    """Fill in the form and send it; the card of the new video."""
    tab.get_by_label("Prompt", exact=True).fill(prompt)
    tab.get_by_label("Steps", exact=True).fill(str(steps))
    tab.get_by_role("button", name="Make the video").click()
    card = tab.locator("#gallery > li").filter(has_text=prompt).first
    card.wait_for()
    return card


def says(card: Any, words: str) -> None:
    card.locator(".state").filter(has_text=re.compile(words)).wait_for()


def until(tab: Any, expression: str) -> None:
    """Wait for it to be true; the page's policy forbids the browser's own way, which is eval."""
    for _ in range(SECONDS // 50):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(expression)


def fits(tab: Any) -> bool:
    """Whether nothing sticks out to the right."""
    found: bool = tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    return found


@pytest.mark.slow
def test_a_video_is_asked_for_watched_through_a_reload_and_played(
    visit: Any, finished: Callable[..., None], previewed_path: Path
) -> None:
    place, tab = visit(None, previewed_path)
    tab.get_by_label("Picture of frame 0").set_input_files(picture())
    tab.get_by_label("Picture of frame 3").set_input_files(picture(50))
    card = ask(tab, "digit three", 40)
    says(card, "Waiting, 0 before it")
    worker = place.worker()
    worker.turn()
    says(card, "Step 1 of 40")
    assert fits(tab)
    tab.reload()
    says(card, "Step 1 of 40")
    preview = card.locator(".preview")
    for _ in range(30):
        worker._told = 0.0
        worker.turn()
        if preview.is_visible():
            break
        tab.wait_for_timeout(100)
    until(tab, "document.querySelector('.preview').naturalWidth === 4")
    assert fits(tab)
    finished(worker)
    says(card, "Done")
    assert not preview.is_visible()
    card.get_by_role("button", name="Play").click()
    until(tab, "document.querySelector('video')?.currentTime > 0")
    card.get_by_role("button", name="Contact sheet").click()
    until(tab, "document.querySelector('dialog[open] img')?.naturalWidth > 0")
    tab.keyboard.press("Escape")
    with tab.expect_download() as saved:
        card.get_by_role("button", name="Save mp4").click()
    assert saved.value.path().read_bytes()[4:8] == b"ftyp"
    card.get_by_role("button", name="Again with another seed").click()
    until(tab, "document.querySelectorAll('#gallery > li').length === 2")
    again, first = place.client.get("/v1/videos").json()["data"]
    assert {first["stiv"]["task"], again["stiv"]["task"]} == {"interpolate"}
    assert (again["remixed_from_video_id"], again["stiv"]["seed"]) == (first["id"], first["stiv"]["seed"] + 1)


@pytest.mark.slow
def test_pages_are_turned_and_a_running_one_is_cancelled(visit: Any, finished: Callable[..., None]) -> None:
    place, tab = visit()
    for seed in range(13):
        place.ask(seed=seed, prompt=f"older {seed}")
    tab.reload()
    tab.get_by_role("button", name="Older").click()
    tab.get_by_text("older 0", exact=True).wait_for()
    assert tab.locator("#gallery > li").count() == 1
    for video in place.client.get("/v1/videos").json()["data"]:
        place.client.delete(f"/v1/videos/{video['id']}")
    card, worker = ask(tab, "long", 40), place.worker()
    worker.turn()
    says(card, "Step 1 of 40")
    card.get_by_role("button", name="Cancel").click()
    says(card, "Cancelled")
    finished(worker)
    tab.once("dialog", lambda dialog: dialog.accept())
    card.get_by_role("button", name="Delete").click()
    tab.get_by_text("None yet.").wait_for()
    assert place.client.get("/v1/videos").json()["data"] == []


@pytest.mark.slow
def test_a_token_is_asked_for_and_a_refusal_is_told_where_it_belongs(visit: Any) -> None:
    _, tab = visit(TOKENS)
    for token in ("wrong", "alice-token"):
        tab.get_by_label("Token").fill(token)
        tab.keyboard.press("Enter")
        tab.get_by_text("not known here" if token == "wrong" else "New video").wait_for()
    tab.get_by_label("Picture of frame 0").set_input_files(picture() | {"buffer": b"no picture"})
    tab.get_by_label("Prompt", exact=True).fill("digit")
    tab.get_by_label("Prompt", exact=True).press("Control+Enter")
    tab.locator("#refusal").filter(has_text="not an image").wait_for()
    tab.get_by_label("Remove the picture of frame 0").press("Enter")
    says(ask(tab, "digit", 4), "Waiting")
    tab.reload()
    tab.get_by_text("Waiting, 0 before it").wait_for()
    tab.get_by_role("button", name="Forget the token").click()
    tab.get_by_label("Token").wait_for()
    assert tab.locator("#gallery > li").count() == 0


@pytest.mark.slow
def test_pictures_are_dropped_and_moved_on_the_timeline(visit: Any) -> None:
    _, tab = visit()
    drop = """(slot) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(4)], "a.png", { type: "image/png" }));
        slot.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    tab.locator("#timeline .drop").nth(1).evaluate(drop)
    moved = tab.get_by_label("Frame of the picture that is at 1")
    moved.fill("3")
    moved.blur()
    tab.get_by_label("Frame of the picture that is at 3").wait_for()
    tab.get_by_label("Frames", exact=True).fill("6")
    tab.get_by_label("Frame of the picture that is at 5").wait_for()  # the last stays the last
    assert fits(tab)


@pytest.mark.slow
def test_what_goes_with_the_steps_is_shown_and_is_what_is_made(visit: Any, tuned_path: Path) -> None:
    place, tab = visit(None, tuned_path)
    tab.get_by_text("More", exact=True).click()
    fields = ("solver", "time_shift", "late_stretch")

    def shown() -> list[str]:
        return [tab.locator(f"#{name}").input_value() for name in fields]

    assert shown() == ["ab2", "1.5", "1.25"]
    ask(tab, "as it is", 4)
    tab.get_by_label("Steps", exact=True).fill("30")
    assert shown() == ["euler", "2.5", "1"]
    ask(tab, "as shown", 30)
    tab.locator("#solver").select_option("heun")
    assert shown() == ["heun", "3.5", "1.75"]
    tab.get_by_label("Steps", exact=True).fill("5")
    assert shown() == ["heun", "3.5", "1.75"]  # what was chosen stays
    tab.get_by_label("Late stretch", exact=True).fill("2")
    ask(tab, "as chosen", 5)
    requests = [json.loads(place.store.request(job.id)) for job in place.store.waiting()]
    made = [[each[name] for name in (*fields, "num_inference_steps")] for each in requests]
    assert made == [["ab2", 1.5, 1.25, 4], ["euler", 2.5, 1.0, 30], ["heun", 3.5, 2.0, 5]]
    tuned = read_manifest(tuned_path).tuned
    assert tuned is not None
    fitted = [list(each) for each in tuned.grids[0].solver_weights]
    assert [each.get("solver_weights") for each in requests] == [fitted, None, None]


@pytest.mark.slow
def test_nobody_is_shown_times_of_steps_that_skip_blocks(visit: Any, skipping_path: Path) -> None:
    """Euler's rule was tuned with these alone."""
    place, tab = visit(None, skipping_path)
    tab.get_by_text("More", exact=True).click()
    tab.get_by_label("Steps", exact=True).fill("8")
    tab.locator("#solver").select_option("euler")
    assert [tab.locator(f"#{name}").input_value() for name in ("time_shift", "late_stretch")] == ["3", "1"]
    ask(tab, "as shown", 8)
    (request,) = [json.loads(place.store.request(job.id)) for job in place.store.waiting()]
    assert [request[name] for name in ("solver", "time_shift", "late_stretch")] == ["euler", 3, 1]
    assert "skipped_steps" not in request


@pytest.mark.slow
def test_a_solver_that_was_not_tuned_gets_the_times_that_are_shown(visit: Any, tuned_path: Path) -> None:
    manifest = read_manifest(tuned_path)
    assert manifest.tuned is not None
    ab2 = manifest.tuned.model_copy(update={"grids": manifest.tuned.grids[:1]})
    write_manifest(tuned_path, manifest.model_copy(update={"tuned": ab2}))
    place, tab = visit(None, tuned_path)
    tab.get_by_text("More", exact=True).click()
    tab.locator("#solver").select_option("heun")
    shown = [float(tab.locator(f"#{name}").input_value()) for name in ("time_shift", "late_stretch")]
    ask(tab, "as shown", 4)
    (request,) = [json.loads(place.store.request(job.id)) for job in place.store.waiting()]
    assert [request["solver"], request["time_shift"], request["late_stretch"]] == ["heun", *shown]
