"""Contestants in processes of their own: what they are asked, what they answer, and what becomes of their faults."""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime import StivPipeline
from stiv_deploy.runtime.command.bench import rival_process, rivals
from stiv_deploy.runtime.command.bench.bundle_rival import rival as bundle_rival
from stiv_deploy.runtime.command.bench.rivals import check_names, rival
from stiv_deploy.runtime.errors import MeasurementError, RequestError
from stiv_deploy.runtime.pipeline.request import GenerationRequest

TEMPLATE = GenerationRequest(prompt="", num_inference_steps=2)


def toy(bundle: Path) -> dict[str, Any]:
    """Of an order for ``bundle``."""
    where = {"backend": "onnxruntime", "device": 0, "threads": 1}
    return {"bundle": str(bundle), "template": TEMPLATE.to_json(), **where}


def told(*lines: Mapping[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """The code and the answers of a process that is asked ``lines``."""
    target = io.StringIO()
    code = rival_process.main(io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), target)
    return code, [json.loads(line) for line in target.getvalue().splitlines()]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a contestant, whose clips have as many frames as the order says, all of the seed's value."""

    def make(order: Mapping[str, Any]) -> Any:
        def clips(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
            if "fail" in prompts:
                raise MeasurementError("no such clip")
            return np.stack([np.full((order["frames"], 2, 2, 3), seed, np.uint8) for seed in seeds])

        return clips

    made = ModuleType("contestant")
    made.rival = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "contestant", made)
    return "contestant"


def test_clips_are_made_and_kept_where_asked(module: str, tmp_path: Path) -> None:
    order = {"module": module, "frames": 4}
    asked = {"prompts": ["a", "b"], "seeds": [5, 6], "keep": str(tmp_path / "clips.npy")}
    code, (ready, one, other) = told(order, asked, asked | {"keep": None})
    assert (code, ready) == (0, {"ready": True})
    assert 0 <= one["seconds"] < 60
    assert 0 < one["cpu_seconds"] <= other["cpu_seconds"]
    clips = np.load(tmp_path / "clips.npy")
    assert clips.shape == (2, 4, 2, 2, 3)
    assert (clips[1] == 6).all()


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([{"module": "no.such.module"}], "ModuleNotFoundError: No module named 'no'"),
        ([{"module": "contestant"}, {"prompts": ["fail"], "seeds": [1]}], "MeasurementError: no such clip"),
    ],
)
def test_faults_are_told_in_a_line(module: str, lines: list[dict[str, Any]], error: str) -> None:
    assert module
    code, answers = told(*lines)
    assert (code, answers[-1]) == (1, {"error": error})


def test_a_bundle_in_its_process_makes_what_it_makes_here(bundle_path: Path, tmp_path: Path) -> None:
    order = {"module": rivals.BUNDLE, **toy(bundle_path)}
    requests = [TEMPLATE.changed(prompt="a red star", seed=seed) for seed in (3, 4)]
    with rival("bundle", order) as one:
        there = one.clips(requests, tmp_path)
        assert one.cpu_seconds > 0
    with StivPipeline.from_bundle(bundle_path, backend="onnxruntime", threads=1) as pipe:
        here = pipe.run(pipe.plan(requests)).frames
    np.testing.assert_array_equal(there, np.stack(here))
    np.testing.assert_array_equal(bundle_rival(order)(["a red star"], [4]), there[1:])


def test_a_contestant_that_ends_is_told(bundle_path: Path) -> None:
    with rival("it", {"module": rivals.BUNDLE, **toy(bundle_path)}) as one:
        one._process.kill()
        with pytest.raises(MeasurementError, match="it failed: it ended with -9"):
            one.make([])


def test_a_contestant_that_cannot_start_says_why() -> None:
    with pytest.raises(MeasurementError, match="it failed: ModuleNotFoundError: No module named 'nowhere'"):
        rival("it", {"module": "nowhere"}).__enter__()


def test_names_are_known_and_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    check_names(["torch-eager", "onnxruntime"])
    with pytest.raises(RequestError, match="--baseline 'diffusers': there are torch-eager, torch-compile, onnxruntime"):
        check_names(["diffusers"])
    with pytest.raises(RequestError, match="nothing to measure against"):
        check_names([])
    monkeypatch.setattr(rivals, "find_spec", lambda _: None)
    check_names(["onnxruntime"])
    with pytest.raises(ModuleNotFoundError) as missing:
        check_names(["torch-eager"])
    assert missing.value.name == "torch"
