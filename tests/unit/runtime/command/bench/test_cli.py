"""``stiv bench`` on the toy bundle: what it measures and writes, and that faults which are planted are refused."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stiv_deploy.runtime import GenerationPlan, StivOutput, StivPipeline
from stiv_deploy.runtime.command.bench import stage
from stiv_deploy.runtime.command.bench.machine import LoadMeter
from stiv_deploy.runtime.command.bench.maker import PipelineMaker
from stiv_deploy.runtime.command.bench.measure import Requests
from stiv_deploy.runtime.command.bench.record import STAGES, BenchReport, ColdStart, WarmUp, Work

Run = Callable[..., tuple[int, str, str]]
FEW = ("--percentile", 50, "--backend", "onnxruntime", "--threads", 1, "--no-cold")


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.usefixtures("quiet", "verified")
def test_a_sweep_is_measured_shown_and_kept(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    sweep = ("--batch", 1, "--batch", 2, "--steps", 2, "--steps", 3, "--size", "4x8x8", "--json", target)
    code, out, err = run("bench", bundle_path, *FEW, *sweep)
    assert code == 0, err
    report = BenchReport.read(target)
    assert [(each.work.batch, each.work.steps) for each in report.points] == [(1, 2), (1, 3), (2, 2), (2, 3)]
    for point in report.points:
        assert len(point.samples) == 6
        assert point.work.rows == 2 * point.work.batch
        assert (point.graphs, point.launches) == (5, 5.0)
        assert point.latency["p50"] is not None
        for sample in point.samples:
            assert sum(sample.stages[name] for name in STAGES) == pytest.approx(sample.seconds, rel=0.05)
            assert sample.stages["text"] > 0
    assert (report.threads, report.caches, report.invalid, report.transport) == (1, (), (), "in-process")
    assert "2 clips of 4x8x8, 3 steps" in words(out)
    code, out, err = run("bench", "compare", target, target)
    assert code == 0, err
    assert "1.000" in out


PLANTED = {
    "samples": ((*FEW, "--samples", 5), "5 samples are too few for the percentile 50; take 6 or more"),
    "percentile": (("--percentile", 99, "--samples", 100), "100 samples are too few for the percentile 99; take 368"),
    "none": ((*FEW, "--samples", 0), "the number of samples must be 1 or more, got 0"),
    "beyond": (("--percentile", 100), "percentiles are above 0 and below 100, one or more, got 100"),
    "size": ((*FEW, "--size", "8x8"), "--size '8x8': want FRAMESxHEIGHTxWIDTH, as in 16x256x256"),
    "no bucket": ((*FEW, "--size", "4x8x1000"), "width is 1000; this bundle takes"),
    "batch": ((*FEW, "--batch", 4), "4 clips of 4 frames of 8x8 are more than one batch of this bundle; give fewer"),
    "backend": (("--backend", "tensorrt"), "backend tensorrt does not work here"),
}


@pytest.mark.usefixtures("quiet", "verified")
@pytest.mark.parametrize("case", PLANTED)
def test_what_cannot_be_measured_is_one_line(run: Run, bundle_path: Path, tmp_path: Path, case: str) -> None:
    options, said = PLANTED[case]
    code, out, err = run("bench", bundle_path, *options, "--json", tmp_path / "bench.json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert list(tmp_path.iterdir()) == []


def invalid(run: Run, bundle: Path, target: Path, said: str, *options: object) -> None:
    """The fault is refused without a file; with ``--anyway`` every output calls it invalid."""
    code, out, err = run("bench", bundle, *FEW, "--steps", 2, *options, "--json", target)
    assert (code, out) == (2, "")
    assert said in err
    assert "--anyway measures all the same and marks the result invalid" in err
    assert not target.exists()
    code, out, err = run("bench", bundle, *FEW, "--steps", 2, *options, "--anyway", "--json", target)
    assert code == 0, err
    assert said in words(out).partition("INVALID: ")[2]
    assert any(said in each for each in json.loads(target.read_text())["invalid"])
    code, _, err = run("bench", "compare", target, target)
    assert (code, "A is invalid" in err) == (2, True)
    code, out, _ = run("bench", "compare", target, target, "--anyway", "--json")
    assert any("A is invalid" in each for each in json.loads(out)["invalid"])


@pytest.mark.usefixtures("quiet", "verified")
def test_other_work_on_the_machine(
    run: Run, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadMeter, "others", lambda _: 0.3)
    invalid(run, bundle_path, tmp_path / "a.json", "other processes keep 30% of this machine's cores busy")


@pytest.mark.usefixtures("quiet", "verified")
def test_too_few_samples(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    invalid(run, bundle_path, tmp_path / "a.json", "2 samples are too few for the percentile 50", "--samples", 2)


@pytest.mark.usefixtures("quiet", "verified")
def test_a_warm_up_of_another_size(
    run: Run, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(maker: PipelineMaker, requests: Requests, work: Work, news: Callable[[], None]) -> WarmUp:
        other = Requests(requests.template.changed(width=12), requests.prompts, requests.batch)
        return original(maker, other, work, news)

    original = stage.warm_up
    monkeypatch.setattr(stage, "warm_up", small)
    invalid(run, bundle_path, tmp_path / "a.json", "had to load graphs or make buffers")


@pytest.mark.usefixtures("quiet", "verified")
def test_results_that_are_kept(run: Run, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, StivOutput] = {}

    def keeping(self: StivPipeline, plan: GenerationPlan, *rest: Any) -> StivOutput:
        key = str([video.request.to_json() for video in plan.videos])
        if key not in kept:
            time.sleep(0.05)
            kept[key] = original(self, plan, *rest)
        return kept[key]

    original = StivPipeline.run
    monkeypatch.setattr(StivPipeline, "run", keeping)
    said = "results are kept somewhere"
    invalid(run, bundle_path, tmp_path / "a.json", said)


@pytest.mark.usefixtures("quiet", "verified")
def test_kept_texts_are_declared(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("cold.json", "kept.json")]
    for target, option in zip(files, ((), ("--keep-texts", "--prompt", "digit")), strict=True):
        assert run("bench", bundle_path, *FEW, "--steps", 2, *option, "--json", target)[0] == 0
    assert BenchReport.read(files[1]).caches == ("texts",)
    code, _, err = run("bench", "compare", *files)
    assert (code, "A and B differ in caches (none against texts); if that is meant, say --differ caches" in err) == (
        2,
        1,
    )
    code, out, _ = run("bench", "compare", *files, "--differ", "caches")
    assert code == 0
    assert "on purpose, caches differ: none against texts" in words(out)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "cannot be read as JSON"), ("{}", "no measurement of 'stiv bench'"), ('{"format": "stiv-bench"}', "Field")],
)
def test_files_that_are_no_measurement(run: Run, tmp_path: Path, text: str, said: str) -> None:
    target = tmp_path / "a.json"
    target.write_text(text)
    code, _, err = run("bench", "compare", target, target)
    assert (code, err.count("\n"), said in err) == (2, 1, True), err
    code, _, err = run("bench", "compare", tmp_path / "absent.json", target)
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.usefixtures("quiet")
def test_outputs_have_to_be_verified_first(run: Run, proven: Path, tmp_path: Path) -> None:
    invalid(run, proven, tmp_path / "a.json", "the outputs are not verified: 'stiv verify' has not run for onnxruntime")
    code, _, err = run("verify", proven)
    assert code == 0, err
    code, _, err = run("bench", proven, *FEW, "--steps", 2, "--json", tmp_path / "b.json")
    assert code == 0, err
    assert BenchReport.read(tmp_path / "b.json").verification.state == "verified"


@pytest.mark.usefixtures("quiet", "verified")
def test_a_cold_start_is_told(run: Run, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[dict[str, Any]] = []

    def started(order: dict[str, Any]) -> ColdStart:
        orders.append(order)
        return ColdStart(seconds=3.0, imported=1.0, opened=1.0, first=1.0, peak_bytes=2**20)

    monkeypatch.setattr(stage, "cold_start", started)
    code, out, err = run("bench", bundle_path, *FEW[:-1], "--steps", 2)
    assert code == 0, err
    assert "cold start: 3.00 s to the first clip, 1 MiB at most" in out
    (order,) = orders
    assert (order["backend"], order["threads"], len(order["requests"])) == ("onnxruntime", 1, 1)
