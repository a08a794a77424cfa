"""Metrics: those of the store, whoever counted; all of them are in the document."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

DOCUMENT = (Path(__file__).parents[4] / "docs/serving.md").read_text()


def values(place: Any) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(place.client.get("/metrics").text)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def test_nothing_was_counted_of_a_new_service(place: Any) -> None:
    place.ask()
    place.service._looked = None
    found = values(place)
    assert [found["stiv_jobs", "queued"], found[("stiv_workers",)], found["stiv_queue_depth", "4x8x8"]] == [1, 0, 1]
    assert [found[("stiv_preemptions_total",)], found[("stiv_cancel_latency_seconds_count",)]] == [0, 0]


def test_every_end_and_stage_is_counted_once(place: Any, finished: Callable[..., None]) -> None:
    worker = place.worker()
    place.ask(num_inference_steps=3)
    place.ask(num_inference_steps=3, seed=2, guidance_mode="none")
    finished(worker)
    place.ask(num_inference_steps=3)  # the same again
    deleted, cancelled = (place.ask(seed=seed)["id"] for seed in (3, 4))
    place.client.delete(f"/v1/videos/{deleted}")
    place.client.post(f"/v1/videos/{cancelled}/cancel")
    assert place.client.post("/v1/videos", json={"nope": 1}).status_code == 400
    found = values(place)
    ends = {key[1]: value for key, value in found.items() if key[0] == "stiv_requests_total"}
    assert ends == {"completed": 3, "deleted": 1, "cancelled": 1}
    assert [found[("stiv_result_cache_hits_total",)], found["stiv_refused_total", "unknown_parameter"]] == [1, 1]
    assert [found["stiv_steps_total", "4"], found["stiv_rows_total", "computed"]] == [3, 12]
    assert found["stiv_rows_total", "used"] == 9  # two of guidance, one without
    for stage in ("prepare", "denoise", "decode", "write"):
        assert found["stiv_stage_seconds_count", stage] == 2
    assert [found[("stiv_queue_wait_seconds_count",)], found[("stiv_e2e_seconds_count",)]] == [2, 2]
    assert found[("stiv_prompt_cache_hits_total",)] == 1  # one prompt for both


def test_a_cancelled_job_is_timed_until_it_has_left(place: Any) -> None:
    worker = place.worker()
    job = place.ask(num_inference_steps=100)["id"]
    worker.turn()
    place.client.post(f"/v1/videos/{job}/cancel")
    place.clock.now += 0.03
    assert not worker.turn()
    worker.close()
    found = values(place)
    assert found["stiv_cancel_latency_seconds_bucket", "0.025"] == 0
    assert found["stiv_cancel_latency_seconds_bucket", "0.05"] == 1
    assert found[("stiv_cancel_latency_seconds_sum",)] == pytest.approx(0.03)


def test_each_metric_is_in_the_document(place: Any, finished: Callable[..., None]) -> None:
    place.ask()
    finished(place.worker())
    for family in text_string_to_metric_families(place.client.get("/metrics").text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"`{name}" in DOCUMENT, name


def test_each_job_has_its_way_in_the_log(
    place: Any, finished: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = place.ask()["id"]
    finished(place.worker())
    said = [each.message for each in caplog.records if getattr(each, "job", None) == job]
    assert said == ["asked for", "begun", "completed"]
