"""Spans: what a video's trace tells, and whose part it is; a collector that gets them, and one that is not there."""

import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stiv_deploy.serving.otlp import OtlpSpans, exporter
from stiv_deploy.serving.spans import Spans
from stiv_deploy.serving.tracing import open_spans
from stiv_deploy.serving.workers import scheduler as module

CALLER = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": "vendor=x"}
STAGES = ["submit", "queue", "prepare", "denoise", "decode", "write"]
Traced = Callable[..., tuple[dict[str, ReadableSpan], str]]


@pytest.fixture
def traced(place_of: Callable[..., Any], bundle_path: Path, finished: Callable[..., None]) -> Traced:
    """Let a job be made; its spans by name, and its id."""

    def make(headers: dict[str, str], path: Path = bundle_path, **body: Any) -> tuple[dict[str, ReadableSpan], str]:
        memory = InMemorySpanExporter()
        place = place_of(path, spans=OtlpSpans(memory, "w"))
        place.client.headers.update(headers)
        job = place.ask(**body)["id"]
        finished(place.worker())
        place.spans.close()
        return {span.name: span for span in memory.get_finished_spans()}, job

    return make


def test_all_pieces_of_work_are_in_the_callers_trace(traced: Traced) -> None:
    started = time.time_ns()
    spans, job = traced(CALLER, prompt="digit three")
    assert [*spans] == STAGES
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {"ab" * 16}
    submit = spans.pop("submit")
    assert f"{submit.parent.span_id:016x}" == "cd" * 8
    assert submit.context.trace_state["vendor"] == "x"
    assert {span.parent.span_id for span in spans.values()} == {submit.context.span_id}
    assert {span.attributes["stiv.job"] for span in spans.values()} == {job}
    assert all(span.end_time <= time.time_ns() for span in spans.values())
    work = [spans[name] for name in STAGES[2:]]
    assert all(started < span.start_time <= span.end_time for span in work)
    assert all(first.end_time <= second.end_time for first, second in zip(work, work[1:], strict=False))
    assert spans["write"].resource.attributes["service.name"] == "stiv-serve"
    assert spans["write"].resource.attributes["service.instance.id"] == "w"


def test_without_a_callers_trace_it_begins_one(traced: Traced) -> None:
    spans, _ = traced({"traceparent": "no such thing"})
    assert spans["submit"].parent is None
    assert len({span.context.trace_id for span in spans.values()}) == 1


def test_the_caller_decides_whether_its_trace_is_sampled(traced: Traced) -> None:
    spans, _ = traced({"traceparent": CALLER["traceparent"][:-1] + "0"})
    assert spans == {}


def test_prompts_are_in_no_span(traced: Traced) -> None:
    spans, _ = traced({}, prompt="digit secret")
    assert "secret" not in "".join(span.to_json() for span in spans.values())


def test_a_failure_says_its_code(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_files", full)
    spans, _ = traced({})
    assert spans["failed"].attributes["stiv.code"] == "storage_error"
    assert not spans["failed"].status.is_ok
    assert "write" not in spans


def test_a_refused_request_is_an_error_without_its_words(place_of: Callable[..., Any], bundle_path: Path) -> None:
    memory = InMemorySpanExporter()
    place = place_of(bundle_path, spans=OtlpSpans(memory))
    assert place.client.post("/v1/videos", json={"prompt": "digit", "num_frames": 9_999}).status_code == 400
    place.spans.close()
    (span,) = memory.get_finished_spans()
    assert (span.name, span.status.is_ok, span.status.description, span.events) == ("submit", False, None, ())


def test_without_the_option_nothing_is_loaded_nor_carried(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "stiv_deploy.serving.otlp", None)
    assert type(open_spans(place.settings)) is Spans
    with pytest.raises(ImportError):
        open_spans(place.settings.model_copy(update={"spans": True}))
    job = place.store.get(place.ask()["id"])
    assert '"trace": {}' in job.facts


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the spans that a collector on this machine was sent."""
    names: list[str] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            names.extend(span.name for a in found.resource_spans for b in a.scope_spans for span in b.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield names
        server.shutdown()
        thread.join()


def test_a_collector_gets_them(collector: list[str]) -> None:
    spans = OtlpSpans(exporter())
    with spans.submitting({}):
        pass
    spans.close()
    assert collector == ["submit"]


def test_a_service_ends_without_its_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    spans = OtlpSpans(exporter())
    with spans.submitting({}):
        pass
    started = time.monotonic()
    spans.close()
    assert time.monotonic() < started + 20
