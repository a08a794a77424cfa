"""Logs: a line of JSON for each record, with the job that it is about."""

import json
import logging
import sys

from stiv_deploy.serving.logs import JsonFormatter


def line(**extra: object) -> dict[str, object]:
    record = logging.getLogger("a").makeRecord("a", logging.INFO, "f", 1, "be%s", ("gun",), None, extra=extra or None)
    record.created, record.msecs = 1.5, 500.0
    found: dict[str, object] = json.loads(JsonFormatter().format(record))
    return found


def test_a_record_is_one_line_of_json() -> None:
    found = line(job="video_1", worker="w", other="x")
    assert found.pop("pid")
    assert found == {
        "time": "1970-01-01T00:00:01.500Z",
        "level": "info",
        "logger": "a",
        "message": "begun",
        "job": "video_1",
        "worker": "w",
    }
    assert "job" not in line()


def test_an_exception_is_in_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.getLogger("a").makeRecord("a", logging.ERROR, "f", 1, "bad", (), sys.exc_info())
    text = JsonFormatter().format(record)
    assert "\n" not in text
    assert "ValueError: two" in json.loads(text)["exception"]
