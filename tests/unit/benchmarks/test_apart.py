"""``benchmarks/apart.py``: workers that begin together."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_all_begin_together_and_each_makes_one_clip(
    benchmark_module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins: three workers of which none can make two clips, as it would wait for the others in between."""
    module, opened = benchmark_module("apart"), []
    monkeypatch.setattr(module, "cpu_pipeline", lambda folder, threads: opened.append((folder, threads)) or len(opened))
    monkeypatch.setattr(module, "latent_seconds", lambda pipe, request: request * pipe)
    with module.Apart(Path("there"), 3, 2, processes=False) as apart:
        assert apart(5.0) == 5.0  # of 5, 10 and 15 seconds, a third of the last
    assert opened == [(Path("there"), 2)] * 3
