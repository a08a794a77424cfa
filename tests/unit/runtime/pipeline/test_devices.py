"""Pipelines over several devices: clips and frames of one, and what is refused before anything is computed."""

from pathlib import Path

import numpy as np
import pytest
from mixing_toys import mixing_graphs
from teams import assert_same
from toys import BUCKET, Toy, make_bundle

from stiv_deploy.runtime.bundle.manifest import Range
from stiv_deploy.runtime.errors import BackendError, DeviceError, RequestError, StivError
from stiv_deploy.runtime.pipeline import pipeline as pipelines
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.request import GenerationRequest

REQUEST = GenerationRequest(prompt="three moving", num_frames=5, height=8, width=12, num_inference_steps=2, seed=3)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle with halves, for frames up to 128x128."""
    large = Range(min=4, typical=8, max=128)
    bucket = BUCKET.model_copy(update={"height": large, "width": large})
    return make_bundle(tmp_path_factory.mktemp("halved") / "bundle", Toy(), mixing_graphs(), bucket)


@pytest.fixture(scope="module")
def alone(halved: Path) -> np.ndarray:
    with StivPipeline.from_bundle(halved, threads=1) as pipe:
        return pipe.run(pipe.plan(REQUEST), output_type="latent").latents


@pytest.mark.parametrize(("count", "parallel"), [(2, None), (3, "dsp3"), (4, "cfg2xdsp2")])
def test_a_clip_of_several_devices(halved: Path, alone: np.ndarray, count: int, parallel: str | None) -> None:
    devices = ["cpu"] * count
    with StivPipeline.from_bundle(halved, devices=devices, parallel=parallel, threads=1) as pipe:
        plan = pipe.plan(REQUEST)
        first = pipe.run(plan)
        assert_same(first.latents, alone)
        np.testing.assert_array_equal(pipe.run(plan).latents, first.latents)
        assert first.timings["graphs"] > 0


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("tile", [None, 0, 32])
def test_frames_are_decoded_by_all_bit_by_bit(halved: Path, count: int, tile: int | None) -> None:
    """Whole frames, shared out; all at once; tiles of them, blended on the host in their order."""
    asked = REQUEST.changed(height=64, width=96, decode_tile=tile)
    with StivPipeline.from_bundle(halved, threads=1) as pipe:
        plan = pipe.plan(asked)
        shape = (1, 5, 4, 32, 48)
        latents = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        right = pipe.decode(plan, latents)
    with StivPipeline.from_bundle(halved, devices=["cpu"] * count, parallel=f"dsp{count}", threads=1) as pipe:
        np.testing.assert_array_equal(pipe.decode(plan, latents), right)


def test_every_device_decodes(halved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StivPipeline.from_bundle(halved, devices=["cpu"] * 4, parallel="dsp4", threads=1) as pipe:
        assert pipe._team is not None
        told: list[tuple[int, str]] = []
        tell = pipe._team.tell
        monkeypatch.setattr(
            pipe._team,
            "tell",
            lambda ranks, message: (told.extend((r, message.command) for r in ranks), tell(ranks, message)),
        )
        pipe.decode(pipe.plan(REQUEST), np.zeros((1, 5, 4, 4, 6), np.float32))
        assert {rank for rank, command in told if command == "code"} == {1, 2}, "5 frames are 3 pieces of 2"


def test_a_device_that_fails_at_decoding(halved: Path) -> None:
    with StivPipeline.from_bundle(halved, devices=["cpu"] * 2, parallel="dsp2", threads=1) as pipe:
        assert pipe._team is not None
        member = pipe._team._members[1]

        def broken(*_: object) -> None:
            raise StivError("graph decoder failed in ONNX Runtime: out of memory")

        member._worker._coded = broken  # type: ignore[attr-defined]
        with pytest.raises(DeviceError, match="^device 1 of the clip stopped .graph decoder failed .* fewer --dev"):
            pipe.decode(pipe.plan(REQUEST), np.zeros((1, 5, 4, 4, 6), np.float32))


@pytest.mark.slow
def test_a_clip_of_several_processes(halved: Path, alone: np.ndarray) -> None:
    """Latents and frames; the decoders of the others answer over the line of orders."""
    with StivPipeline.from_bundle(halved, threads=1) as pipe:
        right = pipe.decode(pipe.plan(REQUEST), alone)
    with StivPipeline.from_bundle(halved, devices=["cpu"] * 3, parallel="dsp3", threads=1, processes=True) as pipe:
        assert_same(pipe.run(pipe.plan(REQUEST), output_type="latent").latents, alone)
        np.testing.assert_array_equal(pipe.decode(pipe.plan(REQUEST), alone), right)


def test_more_devices_than_frames_are_refused_by_the_plan(halved: Path) -> None:
    with StivPipeline.from_bundle(halved, devices=["cpu"] * 4, parallel="dsp4", threads=1) as pipe:
        with pytest.raises(RequestError, match="^2 token frames of 24 tokens cannot be shared by 4 devices; give"):
            pipe.plan(REQUEST.changed(num_frames=2))
        pipe.plan(REQUEST)
    with StivPipeline.from_bundle(halved, devices="cpu,cpu,cpu,cpu", threads=1) as pipe:
        pipe.plan(REQUEST.changed(num_frames=1))


def test_several_devices_have_to_be_named(halved: Path) -> None:
    for options in ({"parallel": "dsp2"}, {"processes": True}):
        with pytest.raises(
            BackendError, match="^--parallel, --processes and --nccl are for several devices; name them"
        ):
            StivPipeline.from_bundle(halved, **options)  # type: ignore[arg-type]


def test_a_pipeline_that_moves_lets_its_devices_go(halved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = StivPipeline.from_bundle(halved, devices=["cpu"] * 2, threads=1)
    team = pipe._team
    assert team is not None
    monkeypatch.setattr(pipelines, "_device", lambda _: ("onnxruntime", 0))
    pipe.backend.name = "another"
    pipe.to("cpu")
    assert pipe._team is None
    assert not team._members
    pipe.close()


def test_fewer_rows_than_graphs_take_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    bucket = BUCKET.model_copy(update={"batch": Range(min=2, typical=2, max=4)})
    bundle = make_bundle(tmp_path / "bundle", Toy(), mixing_graphs(), bucket)
    with StivPipeline.from_bundle(bundle, devices=["cpu"] * 2, parallel="cfg2", threads=1) as pipe:
        pipe.plan(REQUEST.changed(count=2))
        for changed in ({"guidance_mode": "none"}, {"guidance_until": 0.25}):
            with pytest.raises(RequestError, match="would have 1 of .* no fewer than 2; give --parallel dsp2, or more"):
                pipe.plan(REQUEST.changed(count=2, **changed))
