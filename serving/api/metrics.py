"""Metrics for Prometheus, read from the store when they are asked for: right whichever process did the work."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from stiv_deploy.serving.api.service import Service


class StoreCollector:
    """Gauges of the queue, the workers and the files of ``service``."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now."""
        store, look = self._service.store, self._service.outlook()
        jobs = GaugeMetricFamily("stiv_jobs", "Jobs that are kept, by state.", labels=["state"])
        for state, count in store.counts().items():
            jobs.add_metric([state], count)
        yield jobs
        queued = look.costs.backlog(look.waiting, look.workers)
        yield GaugeMetricFamily(
            "stiv_queue_cost_seconds", "Seconds until all workers have made what waits.", queued or 0.0
        )
        yield GaugeMetricFamily("stiv_workers", "Workers that have not signed off.", look.workers)
        yield GaugeMetricFamily("stiv_store_bytes", "Bytes of all results.", store.finished_bytes())
        yield GaugeMetricFamily("stiv_store_free_bytes", "Free bytes of the disk.", self._service.results.free_bytes())
        yield self._calls()

    def _calls(self) -> Metric:
        name, words = "stiv_step_seconds", "Seconds of a call of the model, by size and rows; 0 rows: of decoding."
        calls = GaugeMetricFamily(name, words, labels=["size", "rows"])
        for each in self._service.store.measurements(self._service.bundle.hash):
            frames, height, width = each.size
            calls.add_metric([f"{frames}x{width}x{height}", str(each.rows)], each.seconds)
        return calls


def registry(service: Service) -> CollectorRegistry:
    """A registry of these metrics alone."""
    made = CollectorRegistry()
    made.register(StoreCollector(service))
    return made


def exposition(registry: CollectorRegistry) -> bytes:
    """All metrics in Prometheus's text format."""
    return generate_latest(registry)
