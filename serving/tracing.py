"""Whether a process of a service sends spans."""

from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.spans import Spans


def open_spans(settings: ServeSettings, *, worker: str = "") -> Spans:
    """Spans as ``settings`` want them, of the API or of a ``worker``; ``ModuleNotFoundError`` without OpenTelemetry."""
    if not settings.spans:
        return Spans()
    from stiv_deploy.serving.otlp import OtlpSpans, exporter

    return OtlpSpans(exporter(), worker)
