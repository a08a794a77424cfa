"""Metrics for Prometheus, read from the store when they are asked for: right whichever process did the work."""

from collections import Counter as Count
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from stiv_deploy.serving.api.service import Service
from stiv_deploy.serving.store.jobs import Size
from stiv_deploy.serving.store.tallies import HITS, PARTS, REQUESTS, SUM, TAKEN_BACK, Key

COUNTERS = {
    REQUESTS: ("outcome", "Jobs that ended, by how: completed, deleted, or the code of their failure."),
    HITS: ("", "Jobs that were done at once, with the files of an equal one."),
    TAKEN_BACK: ("", "Jobs taken from workers that had died or stood still."),
    "preemptions": ("", "Clips that paused for a more urgent one."),
    "prompt_cache_hits": ("", "Prompts that had been encoded before."),
    "clips": ("devices", "Clips whose steps are done, by how many devices made them together."),
    "steps": ("rows", "Calls of the model, by their rows."),
    "rows": ("kind", "Rows of calls of the model: computed, and used by some clip."),
    "suspect_videos": ("what", "Videos that are black, frozen (all frames the same), or not finite, which fail."),
}
"""Label and meaning of what is counted, see :mod:`~stiv_deploy.serving.store.tallies`."""
TIMES = {
    "queue_wait": ("", "Seconds from a job's coming to its beginning."),
    "e2e": ("", "Seconds from a job's coming to its result."),
    "stage": ("stage", "Seconds of a job's stages: prepare, denoise (beside others), decode, write."),
    "cancel_latency": ("", "Seconds from a running job's cancellation to its leaving the batch."),
}
"""The same for what is timed."""


class StoreCollector:
    """Metrics of the queue, the workers and the files of ``service``."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now."""
        store, look = self._service.store, self._service.outlook()
        yield _gauge("jobs", "Jobs that are kept, by state.", "state", store.counts())
        waiting = Count(_text(job.size) for job in look.waiting)
        yield _gauge("queue_depth", "Jobs that wait, by size.", "size", waiting)
        queued = look.costs.backlog(look.waiting, look.workers)
        yield GaugeMetricFamily(
            "stiv_queue_cost_seconds", "Seconds until all workers have made what waits.", queued or 0.0
        )
        yield GaugeMetricFamily("stiv_workers", "Workers that have not signed off.", look.workers)
        yield GaugeMetricFamily("stiv_store_bytes", "Bytes of all results.", store.finished_bytes())
        yield GaugeMetricFamily("stiv_store_free_bytes", "Free bytes of the disk.", self._service.results.free_bytes())
        yield self._calls()
        tallies = store.tallies()
        yield from (_counter(name, *about, tallies) for name, about in COUNTERS.items())
        yield from (_histogram(name, *about, tallies) for name, about in TIMES.items())

    def _calls(self) -> Metric:
        name = "stiv_step_seconds"
        words = "Seconds of a call of the model, by size, rows and the devices that share it; 0 rows: of decoding."
        calls = GaugeMetricFamily(name, words, labels=["size", "rows", "devices"])
        for each in self._service.store.measurements(self._service.bundle.hash):
            calls.add_metric([_text(each.size), str(each.rows), str(each.devices)], each.seconds)
        return calls


def _text(size: Size) -> str:
    frames, height, width = size
    return f"{frames}x{width}x{height}"


def _gauge(name: str, words: str, label: str, values: Mapping[str, int]) -> Metric:
    gauge = GaugeMetricFamily(f"stiv_{name}", words, labels=[label])
    for value, count in values.items():
        gauge.add_metric([value], count)
    return gauge


def _counter(name: str, label: str, words: str, tallies: Mapping[Key, float]) -> Metric:
    found = {key.label: value for key, value in tallies.items() if key.metric == name}
    counter = CounterMetricFamily(f"stiv_{name}", words, labels=[label] if label else [])
    for value, count in (found or ({} if label else {"": 0.0})).items():
        counter.add_metric([value] if label else [], count)
    return counter


def _histogram(name: str, label: str, words: str, tallies: Mapping[Key, float]) -> Metric:
    histogram = HistogramMetricFamily(f"stiv_{name}_seconds", words, labels=[label] if label else [])
    labels = sorted({key.label for key in tallies if key.metric == name}) or ([] if label else [""])
    for value in labels:
        buckets, total = [], 0.0
        for part in PARTS:
            total += tallies.get(Key(name, value, part), 0.0)
            buckets.append((part, total))
        histogram.add_metric([value] if label else [], buckets, tallies.get(Key(name, value, SUM), 0.0))
    return histogram


class Metrics:
    """All metrics of ``service``, and how many requests this process has refused."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(StoreCollector(service))
        words = "Requests that this server refused, by the code of the error."
        self._refused = Counter("stiv_refused", words, ["code"], registry=self._registry)

    def refused(self, code: str) -> None:
        """A request was refused."""
        self._refused.labels(code).inc()

    def exposition(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self._registry)
