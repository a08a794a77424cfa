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
from stiv_deploy.runtime.command.bench import against, rounds
from stiv_deploy.runtime.command.bench.measure import LEAST_WARM
from stiv_deploy.runtime.command.bench.record import Verification
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
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
    monkeypatch.setattr(rounds, "rival", made.rival)
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
    assert {tuple(map(len, each.samples)) for each in found.contestants} == {(6,) * 4}
    there = list(SPEEDS)
    round_long = 3 * LEAST_WARM + 18
    assert len(clocked.turns) == 4 * round_long
    for number in range(4):
        names = there if number % 2 == 0 else there[::-1]
        measured = clocked.turns[number * round_long :][3 * LEAST_WARM : round_long]
        assert [name for name, _ in measured] == (names + names[::-1]) * 3
        assert [len({seeds for _, seeds in measured[turn : turn + 3]}) for turn in range(0, 18, 3)] == [1] * 6
    assert all(len(seeds) == 2 for _, seeds in clocked.turns)
    assert len({seeds for _, seeds in clocked.turns}) == 4 * (3 * LEAST_WARM + 6)
    assert "torch-compile" in out


@QUIET
def test_another_bundle_takes_its_turns(run: Run, bundle_path: Path, own_bundle: Path, clocked: Clocked) -> None:
    asked = ("bench", "against", bundle_path, "--backend", "onnxruntime", "--threads", 1, "--baseline", own_bundle)
    code, out, err = run(*asked, "--json", "-")
    assert code == 0, err
    found = against.Against.model_validate(json.loads(out))
    assert [each.name for each in found.contestants] == ["bundle", str(own_bundle)]
    assert clocked.orders[str(own_bundle)]["bundle"] == str(own_bundle)
    changed = clocked.orders[str(own_bundle)] | {"bundle": clocked.orders["bundle"]["bundle"]}
    assert changed == clocked.orders["bundle"]


@QUIET
def test_another_bundle_that_does_other_work_is_refused(
    run: Run, bundle_path: Path, own_bundle: Path, clocked: Clocked
) -> None:
    manifest = read_manifest(own_bundle)
    steps = manifest.sampling.steps + 1
    changed = manifest.sampling.model_copy(update={"steps": steps})
    write_manifest(own_bundle, manifest.model_copy(update={"sampling": changed}))
    asked = ("bench", "against", bundle_path, "--backend", "onnxruntime", "--threads", 1, "--baseline", own_bundle)
    code, _, err = run(*asked)
    assert (code, err.count("\n")) == (2, 1)
    assert f"does other work by default (steps {steps} for {steps - 1}" in err
    assert clocked.orders == {}
    code, _, err = run(*asked, "--steps", 3)
    assert code == 0, err


@pytest.mark.usefixtures("quiet")
def test_another_bundle_must_be_verified_too(
    run: Run, bundle_path: Path, own_bundle: Path, clocked: Clocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verification(pipe: StivPipeline) -> Verification:
        state = "failed" if pipe.bundle.folder == own_bundle else "verified"
        return Verification(state=state, reason="two graphs differ")

    monkeypatch.setattr("stiv_deploy.runtime.command.bench.stage.verification", verification)
    asked = ("bench", "against", bundle_path, "--backend", "onnxruntime", "--threads", 1, "--baseline", own_bundle)
    code, _, err = run(*asked)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{own_bundle}: the outputs are failed: two graphs differ" in err
    code, out, err = run(*asked, "--anyway", "--json", "-")
    assert code == 0, err
    assert len(json.loads(out)["invalid"]) == 1


@QUIET
def test_rounds_go_on_until_the_ratios_are_known(
    run: Run, bundle_path: Path, clocked: Clocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "known", lambda _: False)
    asked = ("bench", "against", bundle_path, "--backend", "onnxruntime", "--threads", 1, "--json", "-")
    for options, count in (((), 12), (("--rounds", 3), 3)):
        code, out, err = run(*asked, "--baseline", "torch-eager", *options)
        assert code == 0, err
        assert {len(each["samples"]) for each in json.loads(out)["contestants"]} == {count}


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
        ({}, ("--rounds", 1), "an interval takes 2 to 12 rounds, got 1"),
        ({}, ("--rounds", 13), "an interval takes 2 to 12 rounds, got 13"),
        ({}, ("--baseline", "tvm"), "--baseline 'tvm': there are torch-eager,"),
        ({}, ("--baseline", "."), ".: no bundle here (manifest.json is missing)"),
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
