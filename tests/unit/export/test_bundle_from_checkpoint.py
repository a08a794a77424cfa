import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stiv_deploy.export import bundle_from_checkpoint
from stiv_deploy.export.bundle_from_checkpoint import (
    buckets_of,
    default_bucket,
    export_bundle,
    refuse_bad_target,
    sampling_defaults,
    trained_facts,
    validate_bucket,
)
from stiv_deploy.export.errors import CheckError, ExportError
from stiv_deploy.export.graphs import writer as graph_writer
from stiv_deploy.export.graphs.modules import model_facts
from stiv_deploy.export.graphs.onnx_from_module import structure_faults
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle import manifest as manifest_module
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import graph_specs
from stiv_deploy.runtime.bundle.manifest import MANIFEST, Bucket, Manifest, Range
from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.pipeline.plan import plan_generation
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.sampling.conditioning import frame_mask, scatter_frames
from stiv_deploy.runtime.sampling.noise import draw_noise
from stiv_deploy.stiv_ref.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    TrainedOn,
    checkpoint_hash,
    load_checkpoint,
    save_checkpoint,
)
from stiv_deploy.stiv_ref.checkpoint import SamplingDefaults as CheckpointDefaults
from stiv_deploy.stiv_ref.config import CONFIGS, StivConfig
from stiv_deploy.stiv_ref.data.source import Batch
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.generation import seeded_noise, settings_of
from stiv_deploy.stiv_ref.recipe import Logging, Stage
from stiv_deploy.stiv_ref.text import word_tokenizer
from stiv_deploy.stiv_ref.training import pictures
from stiv_deploy.stiv_ref.vae import VaeConfig


@pytest.fixture
def untraceable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input must be refused before the first expensive step."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the export began before its input was checked")

    monkeypatch.setattr(graph_writer, "trace", refuse)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("untraceable")
class TestBadInput:
    def test_missing_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            export_bundle(ExportRequest(checkpoint=tmp_path / "absent", out=tmp_path / "deep" / "bundle"))
        assert leftovers(tmp_path) == []

    def test_checkpoint_of_another_config(self, micro_path: Path, tmp_path: Path) -> None:
        other = tmp_path / "checkpoint"
        shutil.copytree(micro_path, other)
        config = json.loads((other / "config.json").read_text())
        config["model"]["width"] = 64
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"does not fit its config.json: .* is \(.*\), the config wants"):
            export_bundle(ExportRequest(checkpoint=other, out=tmp_path / "bundle"))
        assert leftovers(tmp_path) == ["checkpoint"]

    def test_tokenizer_of_another_model(self, micro_path: Path, tmp_path: Path) -> None:
        other = tmp_path / "checkpoint"
        shutil.copytree(micro_path, other)
        word_tokenizer([f"word{index}" for index in range(100)], 8).save(str(other / "tokenizer.json"))
        with pytest.raises(ExportError, match=r"tokenizer.json has 103 tokens, the text encoder 19; use the tokenizer"):
            export_bundle(ExportRequest(checkpoint=other, out=tmp_path / "bundle"))

    def test_damaged_weights(self, micro_path: Path, tmp_path: Path) -> None:
        other = tmp_path / "checkpoint"
        shutil.copytree(micro_path, other)
        with (other / "vae.safetensors").open("r+b") as file:
            file.truncate(100)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            export_bundle(ExportRequest(checkpoint=other, out=tmp_path / "bundle"))

    def test_out_is_a_file(self, micro_path: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("precious")
        with pytest.raises(OutputError, match="this is a file"):
            export_bundle(ExportRequest(checkpoint=micro_path, out=tmp_path / "file"))
        with pytest.raises(OutputError, match="cannot be written"):
            export_bundle(ExportRequest(checkpoint=micro_path, out=tmp_path / "file" / "bundle"))
        assert (tmp_path / "file").read_text() == "precious"

    def test_out_is_another_folder(self, micro_path: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(OutputError, match="is not a bundle and is not empty"):
            export_bundle(ExportRequest(checkpoint=micro_path, out=tmp_path))
        (tmp_path / MANIFEST).write_text('{"format": "a web app"}')
        with pytest.raises(OutputError, match="is not a bundle"):
            export_bundle(ExportRequest(checkpoint=micro_path, out=tmp_path))
        assert leftovers(tmp_path) == [MANIFEST, "thesis.tex"]

    @pytest.mark.parametrize("out", ["", ".", "..", "/", "/proc/bundle"])
    def test_out_is_no_place_for_a_bundle(
        self, micro_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
    ) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        with pytest.raises(OutputError, match="choose another --out"):
            export_bundle(ExportRequest(checkpoint=micro_path, out=Path(out)))
        assert leftovers(tmp_path) == ["here"]

    def test_out_would_replace_what_is_read(self, micro_path: Path, tmp_path: Path) -> None:
        (tmp_path / MANIFEST).write_text('{"format": "stiv-bundle"}')
        shutil.copytree(micro_path, tmp_path / "checkpoint")
        with pytest.raises(OutputError, match="would replace .*checkpoint, which is read"):
            export_bundle(ExportRequest(checkpoint=tmp_path / "checkpoint", out=tmp_path))
        assert (tmp_path / "checkpoint").is_dir()

    @pytest.mark.parametrize(
        ("ranges", "message"),
        [
            ({"height": Range(min=16, typical=30, max=64)}, r"height 16:30:64: this model takes multiples of 8"),
            ({"width": Range(min=4, typical=32, max=64)}, r"width 4:32:64: this model takes multiples of 8"),
        ],
    )
    def test_sizes_that_the_patch_does_not_divide(
        self, micro_path: Path, tmp_path: Path, ranges: dict[str, Range], message: str
    ) -> None:
        with pytest.raises(ExportError, match=message):
            export_bundle(ExportRequest(checkpoint=micro_path, out=tmp_path / "bundle", sizes=ranges))
        assert leftovers(tmp_path) == []


def test_frames_of_patched_and_image_models(micro: Checkpoint) -> None:
    facts = model_facts(micro.config)
    bucket = default_bucket(micro.config.sampling, facts)
    odd = bucket.model_copy(update={"frames": Range(min=1, typical=4, max=8)})
    with pytest.raises(ExportError, match="frames 1:4:8: this model takes multiples of 2"):
        validate_bucket(odd, facts.model_copy(update={"patch": (2, 2)}))
    with pytest.raises(ExportError, match="an image model makes one frame"):
        validate_bucket(bucket, facts.model_copy(update={"temporal": False}))


def test_the_default_bucket_of_tiny() -> None:
    facts = model_facts_of(CONFIGS["tiny"])
    bucket = default_bucket(CheckpointDefaults(), facts)
    assert bucket.batch == Range(min=1, typical=1, max=4)
    assert bucket.frames == Range(min=1, typical=8, max=16)
    assert bucket.height == bucket.width == Range(min=16, typical=32, max=64)
    validate_bucket(bucket, facts)


def model_facts_of(config: StivConfig) -> bundle_from_checkpoint.ModelFacts:
    values = {
        key: value
        for key, value in config.model_dump().items()
        if key in bundle_from_checkpoint.ModelFacts.model_fields
    }
    return bundle_from_checkpoint.ModelFacts(**values, max_text_tokens=16, spatial_factor=4, temporal_factor=1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("temporal", [False, True])
def test_default_buckets_are_possible_and_hold_the_defaults(config: StivConfig, temporal: bool) -> None:
    facts = model_facts_of(config.model_copy(update={"temporal": temporal}))
    sampling = CheckpointDefaults(frames=20, height=256, width=384)
    bucket = default_bucket(sampling, facts)
    validate_bucket(bucket, facts)
    assert bucket.holds(batch=1, frames=20 if temporal else 1, height=256, width=384)


def test_sizes_change_what_is_given(micro: Checkpoint) -> None:
    (bucket,) = buckets_of(asked(sizes={"frames": Range(min=2, typical=2, max=2)}), micro.config)
    assert bucket.frames == Range(min=2, typical=2, max=2)
    assert bucket.height == Range(min=16, typical=32, max=64)
    assert buckets_of(asked(buckets=(bucket,)), micro.config) == (bucket,)


def asked(**values: Any) -> ExportRequest:
    return ExportRequest(checkpoint=Path("checkpoint"), out=Path("bundle"), **values)


def test_sampling_defaults_lie_in_a_bucket(micro: Checkpoint) -> None:
    facts = model_facts(micro.config)
    bucket = default_bucket(micro.config.sampling, facts)
    own = sampling_defaults(micro.config.sampling, [bucket])
    assert (own.frames, own.height, own.steps) == (4, 32, 4)
    small = bucket.model_copy(update={"frames": Range(min=1, typical=2, max=3)})
    assert sampling_defaults(micro.config.sampling, [small]).frames == 2
    assert sampling_defaults(micro.config.sampling, [small, bucket]).frames == 4


def test_a_checkpoints_solver_goes_into_the_manifest(micro: Checkpoint) -> None:
    bucket = default_bucket(micro.config.sampling, model_facts(micro.config))
    values = micro.config.sampling.model_dump(mode="json")
    for name in ("euler", "heun", "ab2"):
        chosen = type(micro.config.sampling)(**values | {"solver": name})
        manifest = sampling_defaults(chosen, [bucket])
        assert manifest.solver == name
        assert settings_of(chosen).solver == name
        assert manifest_module.SamplingDefaults.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.fixture
def taught(micro: Checkpoint) -> CheckpointConfig:
    """The small checkpoint's config, of a model that was trained at stride 3 and on two givings."""
    trained = TrainedOn(
        tasks=("t2v", "mix"), givings=("none", "first", "ends"), strides=(3, 5), sizes=((32, 32),), frames=(4,)
    )
    sampling = micro.config.sampling.model_copy(update={"stride": 3})
    return micro.config.model_copy(update={"sampling": sampling, "trained": trained})


def test_what_a_checkpoint_was_trained_on_goes_into_the_manifest(micro: Checkpoint, taught: CheckpointConfig) -> None:
    assert trained_facts(micro.config) is None
    assert trained_facts(taught) == manifest_module.TrainedOn(**taught.trained.model_dump())
    bucket = default_bucket(taught.sampling, model_facts(taught))
    assert [sampling_defaults(each.sampling, [bucket]).stride for each in (micro.config, taught)] == [1, 3]


@pytest.mark.parametrize("clip_stride", [3, 5])
def test_a_sheet_of_training_and_a_clip_of_the_bundle_are_conditioned_alike(
    micro: Checkpoint, taught: CheckpointConfig, clip_stride: int
) -> None:
    """Bit by bit: noise, micro-conditions, frame mask and clean latents. The clip's own stride counts with its ends."""
    stage = Stage(
        name="mixed", givings=dict.fromkeys(("none", "first", "ends"), 1 / 3), steps=1, batch=3, frames=4,
        learning_rate=1e-3, resolution=(32, 32),
    )  # fmt: skip
    video = torch.rand(3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    seen = torch.tensor([[480.0, 854.0, 7.0, 9.0, clip_stride, 4.0]]).repeat(3, 1)
    batch = Batch(video=video, captions=["digit one", "digit two", "digit six"], micro=seen, names=["a", "b", "c"])
    stride = taught.sampling.stride or 1
    subjects = pictures.choose(stage, Logging(sample_count=3), batch, micro.vae, stride)
    sheet_noise = seeded_noise(range(3), subjects.shape)
    for number, prompt in enumerate(subjects.prompts):
        frames = subjects.given[number].nonzero().flatten().tolist()
        latents = {frame: subjects.clean[number, frame].numpy() for frame in frames}
        own = {"stride": clip_stride} if len(frames) > 1 else {}
        request = GenerationRequest(prompt=prompt, seed=number, latents=latents, **own)
        (planned,) = plan_generation(bundle_of(taught), request).videos
        assert np.array_equal(planned.micro, subjects.micro[number].numpy())
        assert np.array_equal(frame_mask(4, planned.given.latents), subjects.given[number].numpy())
        assert np.array_equal(scatter_frames(planned.given.latents, subjects.shape), subjects.clean[number].numpy())
        assert np.array_equal(draw_noise([planned.seed], subjects.shape)[0], sheet_noise[number].numpy())
        assert planned.warnings == ()


def bundle_of(config: CheckpointConfig) -> Bundle:
    """As much of the bundle of ``config`` as a plan looks at."""
    facts, nothing = model_facts(config), manifest_module.FileRecord(path="none", sha256="0" * 64, bytes=0)
    bucket = default_bucket(config.sampling, facts)
    manifest = Manifest(
        precision="float32", opset=23, model=facts, sampling=sampling_defaults(config.sampling, [bucket]),
        buckets=(bucket,), graphs={}, tokenizer=nothing, checkpoint="0" * 64, trained=trained_facts(config), tools={},
    )  # fmt: skip
    return Bundle(Path("none"), manifest)


def test_checkpoint_hash_sees_every_file(micro_path: Path, tmp_path: Path) -> None:
    copied = tmp_path / "checkpoint"
    shutil.copytree(micro_path, copied)
    assert checkpoint_hash(copied) == checkpoint_hash(micro_path)
    for name in ("model", "text_encoder", "vae"):
        path = copied / f"{name}.safetensors"
        before = checkpoint_hash(copied)
        tensors = load_file(path)
        first = next(iter(tensors))
        tensors[first] = tensors[first] + 1
        save_file(tensors, path)
        assert checkpoint_hash(copied) != before


def test_refusal_leaves_bundles_and_empty_folders_alone(tmp_path: Path) -> None:
    refuse_bad_target(tmp_path)
    refuse_bad_target(tmp_path / "a" / "b")
    (tmp_path / MANIFEST).write_text('{"format": "stiv-bundle"}')
    refuse_bad_target(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckError, OSError])
def test_a_failed_export_leaves_the_old_bundle(
    micro_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / MANIFEST).write_text('{"format": "stiv-bundle"}')

    def interrupted(writer: graph_writer.GraphWriter, *_: object) -> None:
        (writer.folder / "half.onnx").write_text("half")
        raise error

    monkeypatch.setattr(graph_writer.GraphWriter, "write_all", interrupted)
    with pytest.raises(OutputError if error is OSError else error):
        export_bundle(ExportRequest(checkpoint=micro_path, out=out))
    assert leftovers(tmp_path) == ["bundle"]
    assert leftovers(out) == [MANIFEST]


@pytest.mark.slow
def test_the_bundle_is_what_its_manifest_says(micro: Checkpoint, micro_path: Path, micro_bundle: Path) -> None:
    manifest = Manifest.model_validate_json((micro_bundle / MANIFEST).read_text())
    facts = model_facts(micro.config)
    assert (manifest.precision, manifest.opset, manifest.model) == ("float32", 23, facts)
    assert list(manifest.graphs) == list(graph_specs(facts, "float32"))
    assert {name: record.spec for name, record in manifest.graphs.items()} == graph_specs(facts, "float32")
    assert manifest.checkpoint == checkpoint_hash(micro_path)
    assert {"torch", "onnx", "onnxscript", "onnxruntime", "python"} <= set(manifest.tools)
    assert manifest.golden is not None
    files = [manifest.tokenizer, manifest.golden]
    files += [file for record in manifest.graphs.values() for file in (record.file, record.data) if file]
    for file in files:
        content = (micro_bundle / file.path).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    present = {str(path.relative_to(micro_bundle)) for path in micro_bundle.rglob("*") if path.is_file()}
    assert (micro_bundle / "README.md").read_text().startswith(f"# {manifest.model.name}: a bundle of stiv-deploy\n")
    assert present == {MANIFEST, "README.md", *(file.path for file in files)}
    assert (micro_bundle / "tokenizer.json").read_bytes() == (micro_path / "tokenizer.json").read_bytes()
    for name, record in manifest.graphs.items():
        assert structure_faults(micro_bundle / record.file.path, record.spec) == [], name


@pytest.mark.slow
def test_a_bundle_is_replaced_and_progress_is_told(micro_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    (out / "engines").mkdir(parents=True)
    (out / MANIFEST).write_text('{"format": "stiv-bundle"}')
    told: list[tuple[str, int, int]] = []
    export_bundle(ExportRequest(checkpoint=micro_path, out=out, precision="bfloat16"), lambda *step: told.append(step))
    assert Manifest.model_validate_json((out / MANIFEST).read_text()).precision == "bfloat16"
    assert not (out / "engines").exists(), "engines of the old graphs"
    counts = [done for _, done, _ in told]
    assert counts == sorted(counts)
    assert set(counts) == set(range(11))
    assert {total for *_, total in told} == {10}
    assert leftovers(tmp_path) == ["bundle"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"temporal": False}, {"patch": (2, 2)}])
def test_other_architectures(
    make_checkpoint: Callable[..., Checkpoint], micro: Checkpoint, tmp_path: Path, changes: dict[str, object]
) -> None:
    config = micro.config.model.model_copy(update=changes)
    save_checkpoint(tmp_path / "checkpoint", make_checkpoint(config, VaeConfig(latent_channels=4, channels=(8,))))
    export_bundle(ExportRequest(checkpoint=tmp_path / "checkpoint", out=tmp_path / "bundle"))
    manifest = Manifest.model_validate_json((tmp_path / "bundle" / MANIFEST).read_text())
    inputs = [tensor.name for tensor in manifest.graphs["block_00"].spec.inputs]
    assert ("temporal_cos" in inputs) == config.temporal


@pytest.mark.slow
def test_a_block_of_the_xl_model(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """Full width (1152, 18 heads of 64), one block: the sizes and the memory of the real thing."""
    config = CONFIGS["XL"].model_copy(update={"blocks": 1, "text_width": 64})
    save_checkpoint(tmp_path / "checkpoint", make_checkpoint(config), torch.float16)
    bucket = Bucket(
        name="small",
        batch=Range(min=1, typical=1, max=1),
        frames=Range(min=1, typical=2, max=4),
        height=Range(min=16, typical=24, max=32),
        width=Range(min=16, typical=24, max=32),
    )
    export_bundle(ExportRequest(checkpoint=tmp_path / "checkpoint", out=tmp_path / "bundle", buckets=(bucket,)))
    manifest = Manifest.model_validate_json((tmp_path / "bundle" / MANIFEST).read_text())
    record = manifest.graphs["block_00"]
    assert record.data is not None
    parameters = sum(tensor.numel() for tensor in load_checkpoint(tmp_path / "checkpoint").model.blocks[0].parameters())
    unused = 2 * 1152 * 1152 + 2 * 1152 + 64  # cross-attention's K and V, and the norm of K, are text_kv's
    assert parameters - unused <= record.data.bytes / 4 < 1.001 * parameters


def test_sizes_that_no_memory_holds_are_refused_before_anything_is_loaded(micro_path: Path, tmp_path: Path) -> None:
    sizes = {"batch": Range(min=1, typical=8, max=2**16), "height": Range(min=32, typical=32, max=2**15)}
    request = ExportRequest(checkpoint=micro_path, out=tmp_path / "bundle", sizes=sizes)
    with pytest.raises(ExportError, match="bucket default: its largest videos need .* GiB .* --no-check"):
        export_bundle(request)
    assert list(tmp_path.iterdir()) == []
