"""Spans in OpenTelemetry's protocol (OTLP over HTTP), in the trace of whoever asked for a video.

The span ``submit`` is a child of the caller's span, by W3C Trace Context, or begins a trace; what workers do for the
job are its children. Where to send them, with which headers, and which traces are sampled is said by the variables of
OpenTelemetry's specification (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_TRACES_SAMPLER``, ...).
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from stiv_deploy.serving.spans import TRACE, Carrier, Spans
from stiv_deploy.serving.store.jobs import Job

SERVICE = "stiv-serve"
"""Name of the service where ``OTEL_SERVICE_NAME`` gives none."""
PATIENCE = 5.0
"""Seconds that one sending may take: a service does not wait for its collector when it stops."""
NANOSECONDS = 1_000_000_000
FAILED = "failed"
_headers = TraceContextTextMapPropagator()


def exporter() -> SpanExporter:
    """What sends spans to the collector of the environment, by default to one on this machine."""
    return OTLPSpanExporter(timeout=PATIENCE)


class OtlpSpans(Spans):
    """Spans of the API, or of a ``worker``, by ``exporter``; they are sent in batches, by another thread."""

    def __init__(self, exporter: SpanExporter, worker: str = "") -> None:
        about = {"service.name": os.environ.get("OTEL_SERVICE_NAME", SERVICE)}
        about |= {"service.instance.id": worker} if worker else {}
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("stiv_deploy.serving")

    @contextmanager
    def submitting(self, headers: Mapping[str, str]) -> Iterator[Carrier]:
        """As the base class says."""
        span = self._tracer.start_span("submit", _headers.extract(headers), SpanKind.SERVER)
        carrier: Carrier = {}
        _headers.inject(carrier, set_span_in_context(span, Context()))
        try:
            yield carrier
        except BaseException:
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            span.end()

    def note(self, name: str, job: Job, seconds: float, **facts: str | int) -> None:
        """As the base class says."""
        end = time.time_ns()
        span = self._tracer.start_span(
            name,
            _headers.extract(json.loads(job.facts).get(TRACE, {}), Context()),
            attributes=_about(job) | {f"stiv.{key}": value for key, value in facts.items()},
            start_time=end - round(seconds * NANOSECONDS),
        )
        if name == FAILED:
            span.set_status(StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """As the base class says."""
        self._provider.shutdown()


def _about(job: Job) -> dict[str, str | int]:
    size = job.size
    return {
        "stiv.job": job.id,
        "stiv.size": f"{size.frames}x{size.width}x{size.height}",
        "stiv.steps": job.steps,
        "stiv.rows": job.rows,
        "stiv.attempt": job.attempts,
    }
