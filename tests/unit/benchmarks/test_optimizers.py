"""The comparison of optimizers: equal draws and beginnings, and what is told of them."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def benchmark(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("optimizers")


def test_all_begin_alike_and_see_the_same_clips(benchmark: ModuleType, checkpoint: Path) -> None:
    """The first loss is that of a velocity of zero; after one step each has gone its own way."""
    runs = [benchmark.begun(arm, 2, 2, checkpoint) for arm in benchmark.ARMS.values()]
    assert [benchmark.sizes(run) for run in runs] == [{"head": 0.0, "gates": 0.0}] * 4
    losses = [next(benchmark.trained(run, 1)) for run in runs]
    assert set(losses) == {losses[0]}
    heads = [benchmark.sizes(run)["head"] for run in runs]
    assert heads[0] == pytest.approx(heads[1], rel=0.5)  # both by the learning rate
    assert heads[2] < 0.01 * heads[0]
    assert heads[3] == pytest.approx(heads[0], rel=1e-5)  # Muon leaves it to AdamW


def test_the_report(benchmark: ModuleType, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    benchmark.main(tmp_path / "result", steps=1, batch=1, checkpoint=checkpoint)
    text = (tmp_path / "result.md").read_text()
    assert all(name in text for name in benchmark.ARMS)
    assert "--steps 1 --batch 1" in text
    assert (tmp_path / "result.json").is_file()
