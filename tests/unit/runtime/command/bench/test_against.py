"""``stiv bench against``: contestants take turns, ratios are over the bundle's, and what is unfair is refused."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime.bundle.bundle import read_manifest, write_manifest
from stiv_deploy.runtime.bundle.manifest import LoraRecord
from stiv_deploy.runtime.command.bench import against
from stiv_deploy.runtime.command.bench.measure import LEAST_WARM
from stiv_deploy.runtime.pipeline.request import GenerationRequest

Run = Callable[..., tuple[int, str, str]]
SPEEDS = {"bundle": 1.0, "torch-eager": 3.0, "torch-compile": 2.0}


@dataclass
class Clocked:
    """Contestants whose clips take as long as their names say, and how they were asked."""

    orders: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    turns: list[tuple[str, tuple[int | None, ...]]] = field(default_factory=list)
    other: str = ""
    """Whose clips are others."""
    slowing: str = ""
    """Who gets faster all the time."""

    @contextmanager
    def rival(self, name: str, order: Mapping[str, Any]) -> Iterator[Any]:
        self.orders[name] = order
        yield ClockedOne(self, name)


@dataclass
class ClockedOne:
    clocked: Clocked
    name: str
    cpu_seconds: float = 0.0

    def make(self, requests: Sequence[GenerationRequest]) -> float:
        self.clocked.turns.append((self.name, tuple(each.seed for each in requests)))
        spent = sum(name == self.name for name, _ in self.clocked.turns)
        return SPEEDS.get(self.name, 1.0) * (
            0.9**spent if self.name == self.clocked.slowing else 1 + 0.001 * (spent % 2)
        )

    def clips(self, requests: Sequence[GenerationRequest], _: Path) -> np.ndarray:
        values = [np.random.default_rng(each.seed).integers(0, 256, (4, 8, 8, 3)) for each in requests]
        return np.stack(values) if self.name != self.clocked.other else 255 - np.stack(values)


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    made = Clocked()
    monkeypatch.setattr(against, "rival", made.rival)
    return made


QUIET = pytest.mark.usefixtures("quiet", "verified")


@QUIET
def test_all_take_turns_and_ratios_are_over_the_bundle(
    run: Run, bundle_path: Path, tmp_path: Path, clocked: Clocked
) -> None:
    target = tmp_path / "against.json"
    code, out, err = run(
        "bench", "against", bundle_path, "--backend", "onnxruntime", "--threads", 1, "--batch", 2, "--json", target
    )
    assert code == 0, err
    found = against.Against.model_validate(json.loads(target.read_text()))
    assert [each.name for each in found.contestants] == list(SPEEDS)
    assert [round(each.ratio.value, 2) for each in found.contestants] == [1.0, 3.0, 2.0]
    assert [each.difference for each in found.contestants] == [0, 0, 0]
    assert found.elsewhere > 0.3
    assert {len(each.samples) for each in found.contestants} == {6}
    measured = clocked.turns[3 * LEAST_WARM :]
    there = list(SPEEDS)
    assert [name for name, _ in measured] == (there + there[::-1]) * 3
    assert [len({seeds for _, seeds in measured[turn : turn + 3]}) for turn in range(0, 18, 3)] == [1] * 6
    assert all(len(seeds) == 2 for _, seeds in measured)
    assert len({seeds for _, seeds in measured}) == 6
    assert "torch-compile" in out


@QUIET
def test_the_reference_samples_as_the_bundle_does(run: Run, bundle_path: Path, clocked: Clocked) -> None:
    options = ("--steps", 3, "--guidance", 5.5, "--guidance-mode", "sit", "--solver", "heun", "--threads", 1)
    code, _, err = run("bench", "against", bundle_path, "--checkpoint", "there", *options, "--backend", "onnxruntime")
    assert code == 0, err
    eager, compiled = (clocked.orders[name] for name in ("torch-eager", "torch-compile"))
    assert (eager["compile"], compiled["compile"]) == (False, True)
    assert (eager["checkpoint"], eager["device"], eager["threads"], eager["precision"]) == (
        "there",
        "cpu",
        1,
        "float32",
    )
    wanted = {"steps": 3, "guidance_scale": 5.5, "guidance_mode": "sit", "solver": "heun"}
    assert {name: eager["settings"][name] for name in wanted} == wanted
    assert clocked.orders["bundle"]["template"]["num_inference_steps"] == 3


@QUIET
@pytest.mark.parametrize(
    ("fault", "options", "message"),
    [
        ({"other": "torch-eager"}, (), "torch-eager makes other clips than the bundle of the same prompts and seeds"),
        ({"slowing": "bundle"}, (), "after 40 samples of warm-up bundle still got faster"),
        ({}, ("--samples", 5), "5 samples are too few for the percentile 50; take 6 or more"),
        ({}, ("--samples", 0), "the number of samples must be 1 or more, got 0"),
        ({}, ("--baseline", "tvm"), "--baseline 'tvm': there are torch-eager,"),
    ],
)
def test_what_is_unfair_is_refused_in_a_line(
    run: Run,
    bundle_path: Path,
    clocked: Clocked,
    monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, str],
    options: tuple[object, ...],
    message: str,
) -> None:
    vars(clocked).update(fault)
    monkeypatch.setattr("stiv_deploy.runtime.command.bench.measure.GETS_FASTER", 0.05)
    code, _, err = run("bench", "against", bundle_path, "--backend", "onnxruntime", "--threads", 1, *options)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


@QUIET
def test_anyway_is_invalid_in_every_output(run: Run, bundle_path: Path, clocked: Clocked) -> None:
    clocked.other = "torch-compile"
    asked = ("bench", "against", bundle_path, "--backend", "onnxruntime", "--threads", 1, "--anyway")
    code, out, err = run(*asked)
    assert code == 0, err
    assert "INVALID: torch-compile makes other clips" in " ".join(out.split())
    _, out, _ = run(*asked, "--json", "-")
    assert json.loads(out)["invalid"]


@QUIET
def test_the_reference_is_no_baseline_of_a_bundle_with_a_lora(run: Run, own_bundle: Path, clocked: Clocked) -> None:
    """It would run the checkpoint that the LoRA was merged into; another backend of the same bundle may run."""
    merged = LoraRecord(name="look.safetensors", sha256="a" * 64, scale=1.0)
    write_manifest(own_bundle, read_manifest(own_bundle).model_copy(update={"lora": (merged,)}))
    asked = ("bench", "against", own_bundle, "--backend", "onnxruntime", "--threads", 1)
    code, _, err = run(*asked)
    assert (code, err.count("\n")) == (2, 1)
    assert "look.safetensors was merged into it, and PyTorch runs the checkpoint without" in err
    assert clocked.orders == {}
    code, _, err = run(*asked, "--baseline", "onnxruntime")
    assert code == 0, err
