"""A server as a process, and its clients."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Running:
    """A server process and its address."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self.line = process.stdout.readline()
        assert self.line.startswith("serving toy at http://127.0.0.1:"), self.line
        self.address = self.line.split()[3].rstrip(",")

    def call(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.address + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.load(answer)

    def wait(self, path: str, until: Callable[[Any], bool]) -> Any:
        for _ in range(600):
            try:
                found = self.call(path)
            except urllib.error.HTTPError as error:
                found = json.load(error)
            if until(found):
                return found
            time.sleep(0.1)
        raise AssertionError(found)


@contextmanager
def serving(bundle: Path, data: Path, *options: str) -> Iterator[Running]:
    command = [Path(sys.executable).parent / "stiv", "serve", bundle, "--data", data, "--port", "0", *options]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    try:
        yield Running(process)
    finally:
        process.kill()
        process.wait()
