"""The efficiency benchmark: variants are what they say, ratios are taken inside a round, files are whole."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.training.parallel import Team
from stiv_deploy.stiv_ref.training.run import new_run
from stiv_deploy.stiv_ref.training.stages import begin_stage
from stiv_deploy.stiv_ref.training.step import training_step

TINY = {"name": "small", "blocks": 2, "width": 32, "heads": 2, "text_width": 24, "base_frames": 4, "base_grid": [2, 2]}


@pytest.fixture
def benchmark(benchmark_module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = benchmark_module("training_efficiency")
    monkeypatch.setattr(module, "SMALL", {**TINY, "frequency_width": 32})
    return module


@pytest.fixture
def setting(benchmark: ModuleType) -> Any:
    return benchmark.Setting(model="small", frames=2, size=32, batch=4, micro_batch=2, steps=1, threads=1)


def test_each_variant_differs_from_the_baseline_in_one_thing(benchmark: ModuleType, setting: Any) -> None:
    recipes = {name: benchmark.recipe_of(setting, switches) for name, switches in benchmark.VARIANTS.items()}
    base = recipes["baseline"]
    assert (base.efficiency.precision, base.efficiency.micro_batch, base.optimizer.name) == ("float32", None, "adamw")
    changed: dict[str, set[str]] = {}
    for name, recipe in recipes.items():
        pairs = zip(_flat(recipe.model_dump()).items(), _flat(base.model_dump()).items(), strict=True)
        changed[name] = {key for (key, value), (_, other) in pairs if value != other}
    single = {name: keys for name, keys in changed.items() if name not in ("baseline", "all together", "MaskDiT")}
    assert all(len(keys) == 1 for keys in single.values())
    assert changed["MaskDiT"] == {"stages.0.mask_ratio", "model.blocks", "model.full_blocks"}
    assert changed["all together"] == set().union(*changed.values())
    assert len(changed["all together"]) == 9


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        return {path.strip("."): value}
    return {key: each for name, inner in items for key, each in _flat(inner, f"{path}.{name}").items()}


@pytest.mark.parametrize("name", ["baseline", "MaskDiT", "gradient accumulation", "Adafactor"])
def test_a_variant_trains(benchmark: ModuleType, setting: Any, name: str, tmp_path: Path) -> None:
    run = new_run(benchmark.recipe_of(setting, benchmark.VARIANTS[name]), tmp_path, Team(), benchmark.WORDS)
    run.stage = 1
    begin_stage(run)
    parts = run.team.parts(setting.batch, run.recipe.efficiency.micro_batch)
    assert len(parts) == (2 if name == "gradient accumulation" else 1)
    before = [parameter.detach().clone() for parameter in run.parameters.values()]
    result = training_step(run, benchmark.batches_of(run, setting, parts), parts)
    assert result.tokens == 4 * 2 * 2 * 2
    assert any((one != other).any() for one, other in zip(before, run.parameters.values(), strict=True))


@pytest.mark.slow
def test_a_worker_measures_in_its_own_process(benchmark: ModuleType, setting: Any) -> None:
    measured = benchmark.in_process(setting, "baseline")
    assert measured["tokens_per_second"] > 0
    assert measured["memory"] > 0
    assert len(measured["seconds"]) == benchmark.WARMUP + setting.steps


@pytest.mark.slow
def test_a_worker_that_fails_says_why(benchmark: ModuleType, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.VARIANTS, "bad", {"optimizer": "nothing"})
    assert "optimizer" in benchmark.in_process(setting, "bad")["error"]


def test_ratios_are_taken_inside_a_round(benchmark: ModuleType) -> None:
    """A machine that is ten times slower in one round changes no ratio."""
    rounds = [
        {
            "baseline": {"tokens_per_second": 100 * speed, "memory": 10},
            "fast": {"tokens_per_second": 200 * speed, "memory": 5},
            "broken": {"error": "no memory"},
        }
        for speed in (1, 0.1, 1)
    ]
    rounds[2]["fast"]["tokens_per_second"] = 250
    rows = benchmark.summary(rounds)
    assert rows["fast"]["tokens_per_second_ratio"] == pytest.approx(2)
    assert rows["fast"]["tokens_per_second_range"] == pytest.approx([2, 2.5])
    assert rows["fast"]["memory_ratio"] == 0.5
    assert rows["broken"] == {"error": "no memory"}
    assert "| fast | 200 | 2.00 (2.00 to 2.50) | 0 MiB | 0.50 (0.50 to 0.50) |" in benchmark.table(rows)
    assert "| broken | no memory |" in benchmark.table(rows)


def test_without_a_baseline_there_are_no_ratios(benchmark: ModuleType) -> None:
    rows = benchmark.summary([{"baseline": {"error": "x"}, "fast": {"tokens_per_second": 1.0, "memory": 2**20}}])
    assert rows["fast"] == {"tokens_per_second": 1.0, "memory": 2**20}
    assert "| fast | 1 |  | 1 MiB |  |" in benchmark.table(rows)


def test_the_result_names_machine_versions_and_command(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {name: {"tokens_per_second": 10.0 + i, "memory": 2**20} for i, name in enumerate(benchmark.VARIANTS)}
    monkeypatch.setattr(benchmark, "in_process", lambda _, name: values[name])
    benchmark.main(
        out=tmp_path / "result",
        model="small",
        frames=None,
        size=None,
        batch=None,
        micro_batch=None,
        rounds=2,
        steps=3,
        threads=1,
        worker=None,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "result.md", "result.png"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["versions"]["torch"] == torch.__version__
    assert "--frames 8 --size 128 --batch 4 --micro-batch 1 --rounds 2" in result["command"]
    assert result["tokens"] == 8 * 8 * 8
    page = (tmp_path / "result.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert ("says little about GPUs" in page) is not torch.cuda.is_available()


def test_sizes_that_do_not_fit_are_an_error_before_anything_runs(benchmark: ModuleType, setting: Any) -> None:
    with pytest.raises(ConfigError, match="40x40 is not a multiple of 16"):
        benchmark.main(
            out=None,
            model="small",
            frames=2,
            size=40,
            batch=2,
            micro_batch=1,
            rounds=1,
            steps=1,
            threads=1,
            worker=None,
        )
