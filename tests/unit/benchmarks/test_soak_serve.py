"""The soak in small: nothing is lost, though workers die and clients leave; and growth is seen."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

JOBS = int(os.environ.get("STIV_SOAK_JOBS", "60"))


@pytest.mark.alone
@pytest.mark.slow
def test_a_soak_finds_no_fault(benchmark_module: Callable[[str], ModuleType], bundle_path: Path) -> None:
    result = benchmark_module("soak_serve").soaked(bundle_path, JOBS, kills=max(2, JOBS // 100), workers=2, seed=0)
    assert result["faults"] == []
    assert set(result["ends"]) == {"completed", "cancelled"}


@pytest.mark.parametrize(
    ("late", "words"),
    [
        ({}, []),
        ({"server_mib": 140.0}, ["server_mib has grown from 100 to 140"]),
        ({"descriptors": 30, "threads": 19}, ["descriptors has grown from 20 to 30"]),
    ],
)
def test_growth_is_seen(benchmark_module: Callable[[str], ModuleType], late: dict[str, Any], words: list[str]) -> None:
    early = {"server_mib": 100.0, "worker_mib": 1.0, "descriptors": 20, "threads": 15}
    usage = [early | {"server_mib": 90.0}, early, *[early | late] * 4]
    assert benchmark_module("soak_serve").growth(usage) == words
