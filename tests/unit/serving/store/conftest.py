"""Places for job stores: a file, and a PostgreSQL server where its programs are installed."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

sys.path.append(str(Path(__file__).parent))
from store_jobs import Clock

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sqlite_place(tmp_path: Path) -> str:
    """A file that is not there yet."""
    return str(tmp_path / "jobs.sqlite")


def program(name: str) -> str | None:
    """The path of a program of PostgreSQL."""
    return shutil.which(name) or next((str(each / name) for each in PROGRAMS if (each / name).is_file()), None)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a server without data, at a socket of its own, which ends with the tests."""
    initdb, server = program("initdb"), program("postgres")
    if initdb is None or server is None:
        pytest.skip("no PostgreSQL: initdb and postgres are not found")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a short path: a socket's has at most 107 characters
    user: Any = {}
    if os.getuid() == 0:  # PostgreSQL does not run as root
        user = {"user": "nobody"}
        shutil.chown(folder, "nobody")
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder} | user
    subprocess.run([initdb, "-D", folder / "data", "-A", "trust", "-U", "tests", "--no-sync"], check=True, **quiet)
    command = [server, "-D", folder / "data", "-k", folder, "-h", "", "-F"]
    url = f"postgresql://tests@/postgres?host={quote(str(folder), safe='')}"
    with subprocess.Popen(command, **quiet) as process:
        try:
            wait_for_it(url)
            yield url
        finally:
            process.send_signal(signal.SIGINT)  # the fast end, which does not wait for clients
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def wait_for_it(url: str) -> None:
    """Return when the server at ``url`` answers."""
    import psycopg

    until = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


@pytest.fixture
def postgres_place(postgres_server: str, tmp_path: Path) -> str:
    """URL of an empty schema."""
    import psycopg

    name = f"s{abs(hash(tmp_path))}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
    return f"{postgres_server}&options=-csearch_path%3D{name}"
