"""What users of other servers of video models ran into: each fault has tests here by name, and those run."""

import ast
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from stiv_deploy.serving.api import events
from stiv_deploy.serving.api.app import create_app
from stiv_deploy.serving.api.guard import Tokens
from stiv_deploy.serving.api.service import Service
from stiv_deploy.serving.store.sqlite import SqliteJobStore
from stiv_deploy.serving.workers.clips import Clip

FOLDER = Path(__file__).parent
SOURCE = FOLDER.parents[2] / "serving"
FAULTS = {
    "in progress while it still waits": ("test_faults::test_a_job_waits_until_a_worker_has_it",),
    "a deleted job leaves the device at work": (
        "workers/test_scheduler::test_a_cancelled_clip_leaves_before_the_next_step",
        "workers/test_scheduler::test_decoding_waits_for_nobody_and_can_be_cancelled",
    ),
    "a deletion against the end leaves an orphan": (
        "store/test_sql::test_who_ends_first_wins",
        "workers/test_scheduler::test_cancelled_while_it_is_written",
    ),
    "a job that is stored after its task began waits for ever": (
        "test_faults::test_a_job_is_stored_before_anybody_can_begin_it",
    ),
    "jobs are lost at a restart": (
        "store/test_sql::test_everything_outlives_the_process",
        "workers/test_scheduler::test_the_store_outlives_its_users",
        "test_cli::test_jobs_outlive_a_killed_worker_and_a_stopped_server",
    ),
    "one of several servers knows nothing of the job": ("test_faults::test_any_server_answers_for_any_job",),
    "the file is gone and the job stays": (
        "api/test_app::test_what_is_kept_long_enough_goes_with_its_files",
        "store/test_results::test_files_without_a_job_and_jobs_without_a_file_are_swept",
    ),
    "memory grows with requests that were given up": ("test_faults::test_what_was_given_up_leaves_no_memory",),
    "the queue has no end": ("api/test_app::test_a_full_queue_says_when_to_come_again",),
    "one bad request ends the server": (
        "workers/test_scheduler::test_a_request_that_cannot_be_prepared_fails_alone",
        "workers/test_scheduler::test_a_clip_that_is_not_finite_fails_alone",
        "workers/test_scheduler::test_the_last_try_of_a_suspect_is_alone",
    ),
    "minutes to stop on SIGTERM": (
        "workers/test_scheduler::test_what_does_not_finish_in_time_is_given_back",
        "workers/test_supervisor::test_who_does_not_end_is_killed",
    ),
    "it hangs after hours": (
        "workers/test_supervisor::test_who_hangs_is_killed_and_started_again",
        "api/test_app::test_health_knows_whether_anybody_works",
    ),
    "orphans of a disconnect while it is prepared": (
        "test_faults::test_who_leaves_while_it_is_prepared_leaves_no_orphan",
        "api/test_app::test_a_client_that_leaves_cancels",
    ),
    "a deadlock after bad requests at the same time": ("test_faults::test_many_bad_requests_at_once_block_nobody",),
    "nonsense is answered as an empty success": ("api/test_app::test_a_bad_request_is_told_what_is_wrong",),
    "slow and stuck look the same": ("test_faults::test_slow_can_be_told_from_stuck",),
    "a file name writes anywhere": ("api/test_app::test_forms_and_json_ask_for_the_same",),
    "a URL makes the server ask others": ("api/test_app::test_a_bad_request_is_told_what_is_wrong",),
    "a pickle runs code": (
        "test_faults::test_nothing_unpickles_and_no_process_listens",
        "store/test_results::test_damaged_latents_are_none",
    ),
    "a route is forgotten by the door": ("api/test_guard::test_no_route_is_forgotten",),
    "a full disk is an internal error": (
        "store/test_sqlite::test_a_full_disk_changes_nothing",
        "test_faults::test_a_full_disk_of_the_store_is_told_as_such",
        "workers/test_scheduler::test_a_store_that_fails_for_a_while_costs_no_job",
        "workers/test_scheduler::test_latents_that_cannot_be_kept_cost_nothing",
    ),
    "a slow upload holds its connection for ever": ("test_faults::test_a_body_that_does_not_come_is_given_up",),
}
"""Tests by fault, as FILE::TEST from this folder."""


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_tests(fault: str) -> None:
    for name in FAULTS[fault]:
        file, test = name.split("::")
        tree = ast.parse((FOLDER / f"{file}.py").read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_a_job_waits_until_a_worker_has_it(place: Any, finished: Callable[..., None]) -> None:
    jobs = [place.ask(seed=seed, num_inference_steps=50)["id"] for seed in range(5)]
    worker = place.worker()
    worker.turn()
    place.service._looked = None  # a look at the queue is good for a moment
    states = [place.look(job)["status"] for job in jobs]
    assert states == ["in_progress"] * 3 + ["queued"] * 2  # three slots
    assert [place.look(job)["stiv"]["queue_position"] for job in jobs] == [None] * 3 + [0, 1]
    worker.close()


def test_a_job_is_stored_before_anybody_can_begin_it(place: Any, finished: Callable[..., None]) -> None:
    """Its row is all there is of it: whoever makes it has read it."""
    worker, submit, claimed = place.worker(), place.store.submit, []

    def watched(*arguments: Any, **options: Any) -> Any:
        worker.turn()
        claimed.append(place.store.owned("w"))
        return submit(*arguments, **options)

    place.store.submit = watched
    job = place.ask()["id"]
    assert claimed == [set()]
    finished(worker)
    assert place.look(job)["status"] == "completed"


def test_any_server_answers_for_any_job(place: Any, finished: Callable[..., None]) -> None:
    from starlette.testclient import TestClient

    store = SqliteJobStore(Path(place.settings.jobs), place.clock)
    place.stores.append(store)
    other = Service(place.settings, place.bundle, store, place.results, place.clock)
    client = TestClient(create_app(other, Tokens()), base_url="http://127.0.0.1")
    job = place.ask()["id"]
    assert client.get(f"/v1/videos/{job}").json()["status"] == "queued"
    finished(place.worker())
    assert client.get(f"/v1/videos/{job}/content").status_code == 200
    assert client.delete(f"/v1/videos/{job}").status_code == 200
    assert place.client.get(f"/v1/videos/{job}").status_code == 404


def test_what_was_given_up_leaves_no_memory(place: Any, finished: Callable[..., None]) -> None:
    worker = place.worker()
    for seed in range(20):
        job = place.ask(seed=seed, num_inference_steps=100)["id"]
        for _ in range(seed % 3):
            worker.turn()
        place.client.post(f"/v1/videos/{job}/cancel")
    finished(worker)
    gc.collect()
    kept = [each for each in gc.get_objects() if type(each) is Clip and each.job.worker == "w"]
    assert kept == []
    assert [lane.empty for lane in worker._lanes.values()] == [True]
    assert (len(worker._decoding), worker._writing) == (0, {})


def in_app(place: Any, receive: Any, path: str = "/v1/videos/sync") -> tuple[int, bytes]:
    """Status and body of a request whose parts come as ``receive`` says."""
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": b"", "query_string": b""}
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    anyio.run(place.client.app, scope | {"headers": headers, "http_version": "1.1"}, receive, send)
    return said[0]["status"], said[1]["body"]


def test_who_leaves_while_it_is_prepared_leaves_no_orphan(place: Any) -> None:
    """Its task is cancelled while the job is stored, as by a server that stops."""
    submit, scopes = place.service.submit, []

    def cancelled(*arguments: Any) -> Any:
        anyio.from_thread.run_sync(scopes[0].cancel)
        return submit(*arguments)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"prompt": "digit"}'}

    async def app(*arguments: Any) -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await inner(*arguments)

    inner, place.client.app, place.service.submit = place.client.app, app, cancelled
    with pytest.raises(IndexError):  # there is no answer any more
        in_app(place, receive)
    (job,) = place.store.page("local", None, 9).jobs
    assert job.error_code == "cancelled"


def test_many_bad_requests_at_once_block_nobody(place: Any) -> None:
    statuses = []

    def ask(number: int) -> None:
        body = {"prompt": "digit", "frames": {"0": "data:image/png;base64,AAAA"}} if number % 2 else {"fps": 0}
        statuses.append(place.client.post("/v1/videos", json=body).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == [400] * 16
    assert place.ask()["status"] == "queued"


def test_slow_can_be_told_from_stuck(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is told when it is done, and a silent connection says that it lives."""
    monkeypatch.setattr(events, "ALIVE", 0.0)
    monkeypatch.setattr(events, "LOOK", 0.0)
    job = place.store.get(place.ask(num_inference_steps=100)["id"])

    async def said() -> list[str]:
        stream = events.stream(place.service, job)
        return [await anext(stream) for _ in range(2)]

    assert anyio.run(said)[1] == ": alive\n\n"
    worker = place.worker()
    worker.turn()
    assert (place.look(job.id)["stiv"]["step"], place.look(job.id)["progress"]) == (1, 1)
    worker.close()


def test_nothing_unpickles_and_no_process_listens() -> None:
    """Processes speak by the store alone."""
    wrong = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "multiprocessing", "zmq", "xmlrpc", "socketserver"}
    for file in SOURCE.rglob("*.py"):
        text = file.read_text()
        imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in imports for alias in node.names} | {getattr(n, "module", "") for n in imports}
        assert wrong.isdisjoint(str(name).partition(".")[0] for name in names), file
        assert "allow_pickle=True" not in text, file
    listening = [file.name for file in SOURCE.rglob("*.py") if "socket" in file.read_text()]
    assert set(listening) <= {"server.py", "guard.py"}  # the guard names websockets, to refuse them


def test_a_full_disk_of_the_store_is_told_as_such(place: Any) -> None:
    (pages,) = place.store.database.connection.execute("PRAGMA page_count").fetchone()
    place.store.database.connection.execute(f"PRAGMA max_page_count = {pages}")
    answers = [place.client.post("/v1/videos", json={"prompt": "x" * 900, "seed": seed}) for seed in range(40)]
    last = answers[-1]
    assert (last.status_code, last.json()["error"]["code"]) == (507, "insufficient_storage")
    assert int(last.headers["retry-after"]) >= 1
    assert {answer.status_code for answer in answers} == {200, 507}
    assert place.client.get("/v1/videos").status_code == 200


def test_a_body_that_does_not_come_is_given_up(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stiv_deploy.serving.api import guard

    monkeypatch.setattr(guard, "UPLOAD", 0.05)
    parts = [b"{"]

    async def receive() -> dict[str, Any]:
        if not parts:
            await anyio.sleep_forever()
        return {"type": "http.request", "body": parts.pop(), "more_body": True}

    status, body = in_app(place, receive)
    assert (status, b"request_timeout" in body) == (408, True)
    assert place.store.page("local", None, 9).jobs == []


def test_a_client_that_leaves_while_it_sends_is_no_fault(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    status, _ = in_app(place, receive)
    assert status == 499
    assert caplog.text == ""
