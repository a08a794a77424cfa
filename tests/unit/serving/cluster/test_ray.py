"""A service on a Ray cluster of this machine, with its replicas killed, and another bundle put in their place."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[1]))
from running import Running, serving

from stiv_deploy.runtime.bundle.bundle import Bundle

OPTIONS = ("--ray", "--threads", "1", "--grace", "2", "--latents-every", "50", "--free-gib", "0")
ENDED = ("completed", "failed")


def of_each(server: Running, what: Callable[[psutil.Process], Any]) -> dict[int, Any]:
    """``what`` of each process that the ``server`` has started, by id, but for those that have ended."""
    found = {}
    for each in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray's come and go, and are zombies for a moment
            found[each.pid] = what(each)
    return found


def replicas(server: Running, kind: str) -> list[int]:
    """Processes of the ``server`` that are replicas of a ``kind``."""
    words = of_each(server, psutil.Process.cmdline)
    return [pid for pid, found in words.items() if any(f"ServeReplica:stiv:{kind}" in word for word in found)]


def asked(server: Running, path: str, body: object = None) -> Any:
    """The answer, which may take a moment while replicas come and go."""
    for _ in range(100):
        try:
            return server.call(path, body)
        except (urllib.error.URLError, ConnectionError):  # of a replica that died with it in its hands
            time.sleep(0.1)
    raise AssertionError(f"{path} is not answered")


def finished(server: Running, jobs: list[str]) -> list[Any]:
    """The resources of ``jobs``, all ended."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = [asked(server, f"/v1/videos/{job}") for job in jobs]
        if all(each["status"] in ENDED for each in found):
            return found
        time.sleep(0.2)
    raise AssertionError(found)


def start(server: Running, seeds: range, steps: int) -> list[str]:
    body = {"prompt": "digit three moving left", "num_inference_steps": steps}
    return [asked(server, "/v1/videos", body | {"seed": seed})["id"] for seed in seeds]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray's files and its token in a folder of their own, with a short path: a socket's has at most 107 characters."""
    folder = tempfile.mkdtemp(prefix="ray")
    for name in ("HOME", "RAY_TMPDIR"):
        monkeypatch.setenv(name, folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'stiv-deploy[ray]'")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two replicas want two cores")
def test_killed_replicas_and_a_new_bundle_lose_nothing(
    bundle_path: Path, bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "jobs"
    with serving(bundle_path, data, *OPTIONS, "--workers", "2") as server:
        tree = psutil.Process(server.process.pid).children(recursive=True)
        server.wait("/ready", lambda found: found["status"] == "ok")
        check_manners(server)
        jobs = start(server, range(6), 1000)
        server.wait(f"/v1/videos/{jobs[0]}", lambda found: found["stiv"]["step"] > 60)
        for kind in ("maker", "front"):
            os.kill(replicas(server, kind)[0], signal.SIGKILL)
        found = finished(server, jobs)
        assert [each["status"] for each in found] == ["completed"] * 6
        assert max(each["stiv"]["attempts"] for each in found) == 2

        jobs = start(server, range(10, 14), 1000)
        other = bundle_of(0.25)
        hand_over(server, other, data)
        jobs += start(server, range(20, 22), 10)
        assert {each["status"] for each in finished(server, jobs)} == {"completed"}
        bundle = asked(server, "/v1/models")["data"][0]["stiv"]["bundle"]
        assert bundle == Bundle.open(other).hash
        assert len({each["id"] for each in asked(server, "/v1/videos?limit=100")["data"]}) == 12

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert alive == []


def check_manners(server: Running) -> None:
    """Nothing listens for others, and nothing reports to Ray's makers."""
    places = of_each(server, psutil.Process.net_connections).values()
    listening = {place.laddr.ip for each in places for place in each if place.status == "LISTEN"}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    for kind in ("maker", "front"):
        assert len(replicas(server, kind)) == 2
        variables = psutil.Process(replicas(server, kind)[0]).environ()
        assert (variables["RAY_USAGE_STATS_ENABLED"], variables["ORT_DISABLE_TELEMETRY"]) == ("0", "1")


def hand_over(server: Running, bundle: Path, data: Path) -> None:
    """Put ``bundle`` in the place of the one that is served."""
    cluster = server.line.partition(" on Ray at ")[2].partition(";")[0]
    command = [Path(sys.executable).parent / "stiv", "serve", bundle, "--data", data, *OPTIONS, "--workers", "2"]
    done = subprocess.run(
        [*map(str, command)],
        env=os.environ | {"RAY_ADDRESS": cluster, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "`serve shutdown` ends it" in done.stdout
