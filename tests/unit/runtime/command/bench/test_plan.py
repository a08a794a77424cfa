"""``stiv bench plan``: predictions are those derived by hand, and nothing is called what it is not."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from measured import SECONDS, WORK, a_point, a_report

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.command.bench.plan import Plan, PlanRequest, plan
from stiv_deploy.runtime.command.bench.predict import EFFICIENCIES, PAPER, Form, Load, PlannedPrecision, predicted
from stiv_deploy.runtime.command.bench.record import BundleFacts
from stiv_deploy.runtime.command.bench.roofline import PEAKS, ffn_ratio, operations
from stiv_deploy.runtime.command.bench.stage import Size
from stiv_deploy.runtime.errors import RequestError

Run = Callable[..., tuple[int, str, str]]
BY_HAND = {
    "RTX 4090": ("154/137/89", "656/588/395", "1434/1360/824", "5906/5609/3463"),
    "A100": ("88/80/-", "376/343/-", "845/808/-", "3480/3333/-"),
    "H100": ("40/35/24", "170/150/106", "360/338/218", "1480/1391/913"),
    "B200": ("19/16/11", "79/70/50", "170/161/105", "700/663/441"),
}
"""Milliseconds of a step of XL and M at 256 and 512 pixels, 2 rows of 20 frames: bfloat16 native, with plugins, and FP8
with plugins; from a sheet of its own, 36 D^2 operations a token for linear layers and 120, 76 and 66 D bytes."""
COLUMNS: tuple[tuple[PlannedPrecision, Form], ...] = (
    ("bfloat16", "native"),
    ("bfloat16", "plugins"),
    ("fp8", "plugins"),
)


@pytest.mark.parametrize("gpu", BY_HAND)
def test_steps_are_those_of_the_sheet(gpu: str) -> None:
    for (name, pixels), wanted in zip([(n, p) for n in ("XL", "M") for p in (256, 512)], BY_HAND[gpu], strict=True):
        found = [predicted(gpu, PAPER[name], Load(2, 20, (pixels // 16) ** 2), *each) for each in COLUMNS]
        assert "/".join("-" if each is None else f"{1e3 * each.seconds:.0f}" for each in found) == wanted


def test_every_gpu_with_a_peak_has_an_efficiency() -> None:
    assert set(EFFICIENCIES) == set(PEAKS)
    assert all(0 < share < 1 for each in EFFICIENCIES.values() for share in each)


def test_a_bundle_is_planned_as_it_would_be_measured(bundle_path: Path) -> None:
    """Its operations are those that a measurement counts; size, rows and evaluations those that it recommends."""
    model = Bundle.open(bundle_path).manifest.model
    found = plan(PlanRequest(what=str(bundle_path), gpus=("H100",), precisions=("bfloat16",), forms=("native",)))
    own = Bundle.open(bundle_path).manifest.sampling
    (each,) = found.planned
    frames, places = model.latent_frames(own.frames), own.height * own.width // model.pixel_multiple**2
    dims = {"token_frames": frames, "tokens": places, "text_tokens": model.max_text_tokens, "model_batch": found.rows}
    linear, attention = operations(model, ffn_ratio(Bundle.open(bundle_path).manifest), dims)
    ratio = each.prediction.linear / each.prediction.attention
    assert ratio == pytest.approx(linear / attention * 0.8, rel=1e-6)
    assert (found.rows, found.evaluations) == (2, own.steps)
    assert each.measured is None


def test_a_measurement_of_the_same_work_stands_beside(bundle_path: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(bundle_path).manifest
    own, model = manifest.sampling, manifest.model
    size = Size(own.frames, own.height, own.width)
    work = WORK.model_copy(update={"frames": size.frames, "height": size.height, "width": size.width})
    facts = BundleFacts(hash="0" * 64, precision="bfloat16", quantization=None, model=model, engines=0)
    report = a_report((a_point(SECONDS, work=work),), bundle=facts, device="NVIDIA H100 80GB HBM3 (SM 90)")
    (tmp_path / "bench.json").write_text(report.model_dump_json())
    asked = PlanRequest(
        what=str(bundle_path), rows=work.rows, gpus=("H100", "L40S"), measured=(tmp_path / "bench.json",)
    )
    told = [each for each in plan(asked).planned if each.measured is not None]
    assert {(each.prediction.gpu, each.prediction.precision, each.measured) for each in told} == {
        ("H100", "bfloat16", report.points[0].evaluation_seconds)
    }
    assert plan(dataclasses.replace(asked, rows=1)).planned[0].measured is None


def test_the_table_says_that_it_is_no_measurement(run: Run) -> None:
    code, out, _ = run("bench", "plan", "XL", "--gpu", "H100", "--precision", "fp8", "--form", "plugins")
    assert code == 0
    assert out.startswith("PREDICTED, not measured: XL, 20 frames of 256x256, 2 rows, 50 evaluations")
    assert "predicted" in out
    assert "24.1 ms" in out
    found = Plan.model_validate(json.loads(run("bench", "plan", "XL", "--gpu", "H100", "--json")[1]))
    assert len(found.planned) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"what": "XS"}, "'XS': no bundle, and none of XL, XXL, M"),
        ({"gpus": ("T4",)}, "nothing is known of a 'T4'; known are RTX 4090"),
        ({"size": Size(20, 250, 256)}, "a token of XL is 16 pixels wide, got 250x256"),
        ({"rows": 0}, "rows must be 1 or more, got 0"),
        ({"evaluations": 0}, "evaluations must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_planned(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan(PlanRequest(**{"what": "XL"} | changes))  # type: ignore[arg-type]
