"""LoRA files merged for good: what bundles then hold, what they say of it, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.graphs.lora import linear_shapes
from stiv_deploy.export.parity.files import Sources, open_subject
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime import StivPipeline
from stiv_deploy.runtime.bundle.bundle import Bundle, write_manifest
from stiv_deploy.runtime.bundle.merging import replacements, with_loras
from stiv_deploy.runtime.errors import BundleError, LoraError
from stiv_deploy.runtime.files import sha256
from stiv_deploy.runtime.pipeline.pictures import read_picture
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, checkpoint_hash

LINEARS = ("blocks.1.spatial.qkv", "blocks.0.cross.kv", "patch", "head.out")
RANK, ALPHA, SCALE = 2, 3.0, 0.5


def write_lora(
    path: Path, checkpoint: Checkpoint, base: str, linears: tuple[str, ...] = LINEARS, size: float = 0.1
) -> Path:
    shapes, generator = linear_shapes(checkpoint.config.model), torch.Generator().manual_seed(1)
    tensors = {}
    for name in linears:
        out, inner = shapes[name]
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) * inner**-0.5
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * size
    settings = {"stiv.base": base, "transformer.lora_alpha": ALPHA}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
    return path


@pytest.fixture(scope="module")
def lora(micro: Checkpoint, micro_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("lora") / "some.safetensors", micro, checkpoint_hash(micro_path))


def changed(micro: Checkpoint, lora: Path, name: str) -> np.ndarray:
    """The merged weight float64 [out, in] of a linear."""
    factors = load_file(lora)
    down, up = (factors[f"transformer.{name}.lora_{part}.weight"].double() for part in "AB")
    weight = micro.model.get_parameter(f"{name}.weight").double() + SCALE * ALPHA / RANK * up @ down
    return weight.detach().numpy()


def stored(bundle: Path, graph: str, name: str) -> np.ndarray:
    """A weight of a bundle as it is stored, [in, out]."""
    model = onnx.load(bundle / "onnx" / f"{graph}.onnx")
    return numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == name))


@pytest.fixture(scope="module")
def bundle(micro_path: Path, lora: Path, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A float32 bundle with the LoRA merged."""
    request = {"checkpoint": micro_path, "loras": (f"{lora}:{SCALE}",), "check": False}
    return once("lora bundle", lambda folder: export_bundle(ExportRequest(out=folder, **request)))


@pytest.mark.slow
def test_the_bundle_holds_the_merged_weights_and_says_so(micro: Checkpoint, bundle: Path, lora: Path) -> None:
    for graph, name, linear in (
        ("block_01", "spatial.qkv.weight", "blocks.1.spatial.qkv"),
        ("text_kv", "blocks.0.cross.kv.weight", "blocks.0.cross.kv"),
        ("embed", "patch.weight", "patch"),
        ("head", "head.out.weight", "head.out"),
    ):
        # Roundings of a float32 sum of two terms, each below 1 here, of a product with the scale, and of the sum.
        assert np.abs(stored(bundle, graph, name).T - changed(micro, lora, linear)).max() <= 5 * 2**-24
    untouched = micro.model.get_parameter("blocks.0.spatial.qkv.weight").detach().numpy()
    assert np.array_equal(stored(bundle, "block_00", "spatial.qkv.weight").T, untouched)
    (record,) = Bundle.open(bundle).manifest.lora
    assert (record.name, record.sha256, record.scale) == ("some.safetensors", sha256(lora), SCALE)
    assert f"some.safetensors, merged with scale 0.5, SHA-256 `{record.sha256}`" in (bundle / "README.md").read_text()


@pytest.mark.slow
def test_parity_compares_with_what_was_merged(
    micro: Checkpoint, micro_path: Path, bundle: Path, lora: Path, tmp_path: Path
) -> None:
    """With the file that is named, or beside the bundle; another one, or none, is refused."""
    place = tmp_path / "bundle"
    shutil.copytree(bundle, place)
    opened = Bundle.open(place)

    def subject(*loras: Path) -> Any:
        return open_subject(opened, Sources(checkpoint=micro_path, loras=loras))

    with pytest.raises(
        BundleError, match=r"the LoRA some.safetensors \(SHA-256 .*\) that was merged into it is neither"
    ):
        subject()
    other = write_lora(tmp_path / "other.safetensors", micro, "", LINEARS[:1])
    with pytest.raises(BundleError, match=r"other.safetensors: no LoRA that was merged into"):
        subject(lora, other)
    shutil.copy(lora, tmp_path / "again.safetensors")
    for found in (subject(), subject(lora)):
        weight = found.checkpoint.model.get_parameter("patch.weight").numpy()
        assert np.array_equal(weight, stored(bundle, "embed", "patch.weight").T)


@pytest.mark.slow
def test_gates_hold_the_merged_model_and_no_other(
    stiv: Callable[..., tuple[int, str]], micro_path: Path, bundle: Path, lora: Path, tmp_path: Path
) -> None:
    """``stiv parity`` passes with the file beside the bundle; the reference without it fails where it was merged."""
    place, report = shutil.copytree(bundle, tmp_path / "bundle"), tmp_path / "parity.json"
    shutil.copy(lora, tmp_path)
    options = ("--checkpoint", micro_path, "--backend", "onnxruntime", "--steps", 2, "--json", report)
    code, text = stiv("parity", place, *options)
    assert code == 0, text
    assert {row.level for row in Bundle.open(place).manifest.parity} >= {"block", "step", "free_run"}
    hidden = Bundle.open(place).manifest.model_copy(update={"lora": ()})
    write_manifest(place, hidden)
    assert stiv("parity", place, *options)[0] == 1
    rows = json.loads(report.read_text())["rows"]
    failed = {row["name"] for row in rows if row["level"] in ("op", "block") and not row["passed"]}
    assert failed == {"text_kv.text_k", "text_kv.text_v", "embed.x", "block_01", "head.velocity"}
    assert not any(row["passed"] for row in rows if row["level"] == "step")


def clip(bundle: Path, *loras: str) -> np.ndarray:
    """Pixels of a clip, made in two steps."""
    with StivPipeline.from_bundle(bundle, backend="onnxruntime", threads=1, loras=loras) as pipe:
        return np.asarray(pipe("a digit moving left", seed=1, num_inference_steps=2).frames)


@pytest.mark.slow
def test_at_load_base_a_b_and_base_again(
    micro: Checkpoint, micro_bundle: Path, bundle: Path, lora: Path, tmp_path: Path
) -> None:
    """Base is the same, bit by bit, before and after; and what is merged at load is what is merged for good."""
    base_hash = Bundle.open(micro_bundle).manifest.checkpoint
    other = write_lora(tmp_path / "b.safetensors", micro, base_hash, ("blocks.0.ffn.down", "modulation"))
    manifest = (micro_bundle / "manifest.json").read_bytes()
    base, one, two = clip(micro_bundle), clip(micro_bundle, f"{lora}:{SCALE}"), clip(micro_bundle, str(other))
    assert np.array_equal(one, clip(bundle))
    assert np.array_equal(clip(micro_bundle), base)
    assert np.array_equal(clip(micro_bundle, f"{lora}:0", f"{other}:0"), base)
    assert not np.array_equal(one, base)
    assert not np.array_equal(two, base)
    assert not np.array_equal(two, one)
    assert (micro_bundle / "manifest.json").read_bytes() == manifest


@pytest.mark.slow
def test_both_passes_of_an_upsampled_clip_have_it(
    stiv: Callable[..., tuple[int, str]], micro_bundle: Path, bundle: Path, lora: Path, tmp_path: Path
) -> None:
    """Frames of the clip and those between are the merged bundle's; without it, none is."""
    words = ("--prompt", "a digit moving left", "--seed", 1, "--steps", 2, "--backend", "onnxruntime", "--threads", 1)

    def frames(name: str, *more: object) -> np.ndarray:
        code, text = stiv("generate", *more, *words, "--out", tmp_path / name)
        assert code == 0, text
        return np.stack([read_picture(path) for path in sorted((tmp_path / name).glob("*.png"))])

    base, merged = frames("base", micro_bundle, "--upsample", 2), frames("good", bundle, "--upsample", 2)
    loaded = frames("load", micro_bundle, "--upsample", 2, "--lora", f"{lora}:{SCALE}")
    assert len(loaded) == 7
    assert np.array_equal(loaded, merged)
    assert np.array_equal(loaded[::2], frames("clip", micro_bundle, "--lora", f"{lora}:{SCALE}"))
    assert not any(np.array_equal(one, other) for one, other in zip(loaded, base, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_at_load_in_sixteen_bits(
    micro: Checkpoint, micro_path: Path, lora: Path, tmp_path: Path, precision: Any
) -> None:
    """The stored weight in float32, the change added in float64, is at most half a unit of the type away."""
    out = tmp_path / "bundle"
    export_bundle(ExportRequest(checkpoint=micro_path, out=out, precision=precision, check=False))
    opened = with_loras(Bundle.open(out), [f"{lora}:{SCALE}"])
    replaced = replacements(opened, "block_01")
    assert list(replaced) == ["spatial.qkv.weight"]
    values, _ = replaced["spatial.qkv.weight"]
    dtype, bits = (torch.float16, 11) if precision == "float16" else (torch.bfloat16, 8)
    got = torch.from_numpy(values.view(np.int16)).view(dtype).double().numpy().T
    weight = micro.model.get_parameter("blocks.1.spatial.qkv.weight")
    stored_weight = weight.to(dtype).double().detach().numpy()
    wanted = stored_weight + changed(micro, lora, "blocks.1.spatial.qkv") - weight.double().detach().numpy()
    assert (np.abs(got - wanted) <= 2.0**-bits * np.abs(wanted) + 5 * 2**-24).all()
    if precision == "float16":
        assert not np.array_equal(clip(out, f"{lora}:{SCALE}"), clip(out))
    if precision == "float16":
        write_lora(tmp_path / "huge", micro, opened.manifest.checkpoint, LINEARS, 1e6)
        huge = with_loras(Bundle.open(out), [f"{tmp_path / 'huge'}:100"])
        with pytest.raises(
            LoraError, match="huge: blocks.1.spatial.qkv is too large once merged; give a smaller scale"
        ):
            replacements(huge, "block_01")


@pytest.mark.slow
def test_eight_bits_are_of_the_merged_weights_by_the_stored_scales(
    micro: Checkpoint, micro_path: Path, lora: Path, tmp_path: Path, quantize: Any, saved: Any
) -> None:
    """E4M3 has 3 bits behind the point: at most half a unit of 2^-3 of the value, and of the least normal 2^-6."""
    out, quantization = tmp_path / "bundle", quantize("fp8")
    options = saved(quantization)
    export_bundle(ExportRequest(checkpoint=micro_path, out=out, loras=(f"{lora}:{SCALE}",), check=False, **options))
    scale = float(quantization.scales.amax["block_01.spatial.qkv.weight"]) / 448
    wanted = changed(micro, lora, "blocks.1.spatial.qkv").clip(-448 * scale, 448 * scale)
    found = stored(out, "block_01", "spatial.qkv.weight").astype(np.float64).T * scale
    assert (np.abs(found - wanted) <= 2**-4 * np.maximum(np.abs(wanted), 2**-6 * scale) + 1e-6).all()
    base = micro.model.get_parameter("blocks.1.spatial.qkv.weight").detach().numpy()
    assert np.abs(found - wanted).mean() < 0.5 * np.abs(base - wanted).mean()
    with pytest.raises(
        LoraError, match="blocks.1.spatial.qkv is stored in 8 bits, a LoRA is merged before that; merge"
    ):
        with_loras(Bundle.open(out), [str(lora)])


@pytest.mark.parametrize(
    ("base", "linears", "said"),
    [
        ("c" * 64, LINEARS, "trained for the checkpoint cccccccccccc, this one is"),
        (None, ("nowhere",), "cannot be read"),
    ],
)
def test_nothing_is_written_with_a_lora_of_others(
    micro: Checkpoint, micro_path: Path, tmp_path: Path, base: str | None, linears: tuple[str, ...], said: str
) -> None:
    file = tmp_path / "a.safetensors"
    if base is not None:
        write_lora(file, micro, base, linears)
    with pytest.raises(LoraError, match=said):
        export_bundle(ExportRequest(checkpoint=micro_path, out=tmp_path / "bundle", loras=(str(file),)))
    assert not (tmp_path / "bundle").exists()
