"""A checkpoint small enough to trace in a test, ``stiv`` as typed, and a bundle where no builder looks at the graphs.

The checkpoint has random values in every parameter: an untrained model would hide mistakes, as its temporal gates and
its velocity are zero, its norms one.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import nn

from stiv_deploy.runtime.bundle.bundle import file_record, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.contract import GraphSpec, ModelFacts, graph_specs
from stiv_deploy.runtime.bundle.manifest import Bucket, Fp4Form, GraphRecord, Manifest, Range
from stiv_deploy.runtime.bundle.manifest import SamplingDefaults as BundleDefaults
from stiv_deploy.runtime.command.main import main
from stiv_deploy.stiv_ref.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    SamplingDefaults,
    checkpoint_hash,
    save_checkpoint,
)
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.data.moving_digits import WORDS
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, word_tokenizer
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig

if TYPE_CHECKING:
    from stiv_deploy.export.graphs.onnx_from_module import Template
    from stiv_deploy.export.graphs.quantization import Quantization

sys.path.append(str(Path(__file__).parents[1]))  # for the toy bundle

MAX_TOKENS = 8
MICRO = StivConfig(
    name="micro", blocks=2, width=32, heads=2, text_width=24, base_frames=4, base_grid=(4, 4), frequency_width=16
)


def randomized(module: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer: matrices to keep the scale of what they map, vectors around their default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            spread = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1
            center = 1.0 if name.endswith("norm.weight") or name == "scale" else 0.0
            tensor.copy_(center + spread * noise)


@pytest.fixture(scope="session", autouse=True)
def _traced_once(traced_once: None) -> None:
    """For all tests of this package."""


class TracedGraph(NamedTuple):
    """A graph's template with the module that it came from and its contract."""

    template: "Template"
    module: nn.Module
    spec: GraphSpec


def traced_graph(checkpoint: Checkpoint, name: str) -> TracedGraph:
    """Trace one float32 graph of a checkpoint."""
    from stiv_deploy.export.graphs.modules import graph_modules, model_facts
    from stiv_deploy.export.graphs.onnx_from_module import trace

    facts = model_facts(checkpoint.config)
    spec, module = graph_specs(facts, "float32")[name], graph_modules(checkpoint)[name]
    return TracedGraph(trace(module, name, spec, facts), module, spec)


def random_checkpoint(config: StivConfig, vae: VaeConfig | None = None) -> Checkpoint:
    """An untrained checkpoint of any architecture, in memory."""
    tokenizer = word_tokenizer(WORDS, MAX_TOKENS)
    text = TextConfig(
        vocabulary=tokenizer.get_vocab_size(), width=config.text_width, heads=2, layers=1, max_tokens=MAX_TOKENS
    )
    vae = vae or VaeConfig(latent_channels=config.latent_channels, channels=(8, 8))
    modules = (Stiv(config), TextEncoder(text), Vae(vae))
    for seed, module in enumerate(modules):
        randomized(module, seed)
        module.eval().requires_grad_(False)
    model, text_encoder, decoder = modules
    sampling = SamplingDefaults(frames=4, height=32, width=32, steps=4)
    return Checkpoint(
        config=CheckpointConfig(model=config, text=text, vae=vae, sampling=sampling),
        model=model,
        text_encoder=text_encoder,
        vae=decoder,
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="session")
def micro() -> Checkpoint:
    """The small checkpoint in memory; do not change it."""
    return random_checkpoint(MICRO)


@pytest.fixture(scope="session")
def micro_path(micro: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint on disk; do not write into it."""
    path = tmp_path_factory.mktemp("micro") / "checkpoint"
    save_checkpoint(path, micro)
    return path


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Checkpoint]:
    """Makes checkpoints of other architectures."""
    return random_checkpoint


@pytest.fixture(scope="session")
def micro_bundle(micro_path: Path, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The small checkpoint's float32 bundle, exported once without the comparison; takes seconds, for slow tests."""
    from stiv_deploy.export.bundle_from_checkpoint import export_bundle
    from stiv_deploy.export.request import ExportRequest

    return once(
        "micro bundle", lambda folder: export_bundle(ExportRequest(checkpoint=micro_path, out=folder, check=False))
    )


@pytest.fixture(scope="session")
def quantize(micro: Checkpoint, micro_path: Path) -> Callable[..., "Quantization"]:
    """Makes quantizations of the small checkpoint: true weight ranges, 5 for every activation, the default plan.

    ``checkpoint`` is the hash that the scales claim to be of; ``smooth`` names layers to smooth.
    """
    from stiv_deploy.calibration.layers import OPERANDS, Format, model_layers
    from stiv_deploy.calibration.plan import PrecisionPlan, default_plan
    from stiv_deploy.calibration.scales import Provenance, Scales
    from stiv_deploy.export.graphs.quantization import Quantization

    config = micro.config.model

    def make(
        quantization: Format,
        plan: PrecisionPlan | None = None,
        per_channel: bool | None = None,
        checkpoint: str | None = None,
        smooth: tuple[str, ...] = (),
    ) -> Quantization:
        amax: dict[str, torch.Tensor] = {}
        channels = quantization == "int8" if per_channel is None else per_channel
        for layer in model_layers(config):
            if layer.kind == "attention":
                amax |= {f"{layer.name}.{part}": torch.tensor(5.0) for part in OPERANDS}
                continue
            weight = micro.model.get_parameter(f"{layer.module}.weight")
            if layer.name in smooth:
                amax[f"{layer.name}.smooth"] = torch.linspace(0.5, 2.0, weight.shape[1])
                weight = weight * amax[f"{layer.name}.smooth"]
            amax[f"{layer.name}.input"] = torch.tensor(5.0)
            amax[f"{layer.name}.weight"] = weight.abs().amax(1) if channels else weight.abs().max()
        provenance = Provenance(
            quantization=quantization,
            checkpoint=checkpoint or checkpoint_hash(micro_path),
            model=config,
            recipe={},
            prompts="",
            tools={},
        )
        return Quantization(
            scales=Scales(provenance=provenance, amax=amax),
            plan=plan or default_plan(config, quantization),
            sha256="0" * 64,
        )

    return make


@pytest.fixture
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[["Quantization"], dict[str, Any]]:
    """Writes a quantization to files and returns the fields of an export's request that name them."""
    from stiv_deploy.calibration.plan import save_plan
    from stiv_deploy.calibration.scales import save_scales

    def save(quantization: "Quantization") -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("quantization")
        save_scales(folder / "scales.safetensors", quantization.scales)
        save_plan(folder / "plan.json", quantization.plan)
        return {
            "format": quantization.format,
            "scales": folder / "scales.safetensors",
            "plan": folder / "plan.json",
        }

    return save


@pytest.fixture
def fp4_form() -> Callable[[Path, str], None]:
    """Gives a graph of a bundle of words a form for engines in NVFP4."""

    def add(bundle: Path, name: str) -> None:
        (bundle / f"onnx/{name}.nvfp4.onnx").write_text(f"graph over {name}.nvfp4.onnx.data")
        (bundle / f"onnx/{name}.nvfp4.onnx.data").write_text("4 bits")
        file, data = (file_record(bundle, f"onnx/{name}.nvfp4.onnx{suffix}") for suffix in ("", ".data"))
        manifest = read_manifest(bundle)
        form = Fp4Form(file=file, data=data, topology="2" * 64)
        graphs = {**manifest.graphs, name: manifest.graphs[name].model_copy(update={"fp4": form})}
        write_manifest(bundle, manifest.model_copy(update={"graphs": graphs}))

    return add


@pytest.fixture(scope="session")
def head(micro: Checkpoint) -> TracedGraph:
    """The smallest graph with a linear, traced once."""
    return traced_graph(micro, "head")


FACTS = ModelFacts(
    name="toy",
    blocks=3,
    width=8,
    heads=2,
    patch=(1, 1),
    latent_channels=4,
    text_width=4,
    max_text_tokens=5,
    base_frames=2,
    base_grid=(2, 2),
    rope_theta=100.0,
    temporal=True,
    spatial_factor=2,
    temporal_factor=1,
)
SAMPLING = BundleDefaults(
    frames=4, height=8, width=8, frames_per_second=8, steps=4, guidance_scale=3.0, image_scale=1.5, time_shift=1.0
)


def bucket(name: str, frames: int) -> Bucket:
    side, one = Range(min=4, typical=8, max=12), Range(min=1, typical=1, max=2)
    return Bucket(name=name, batch=one, frames=Range(min=1, typical=2, max=frames), height=side, width=side)


@pytest.fixture
def stiv(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Runs ``stiv`` with arguments; returns its exit code and standard error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["stiv", *map(str, arguments)])
        code = main()
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def words_bundle(tmp_path: Path) -> Path:
    """A bundle whose graph files are words: no builder looks at them here. Blocks 1 and 2 have equal contents."""
    path = tmp_path / "bundle"
    (path / "onnx").mkdir(parents=True)
    (path / "tokenizer.json").write_text("{}")
    graphs = {}
    for name, spec in graph_specs(FACTS, "float32").items():
        twins = ("block_01", "block_02")
        weights = [f"{each}.onnx.data" for each in (twins if name in twins else (name,))]
        (path / f"onnx/{name}.onnx").write_text(f"graph over {' or '.join(weights)}")
        (path / f"onnx/{name}.onnx.data").write_text("weights")
        graphs[name] = GraphRecord(
            file=file_record(path, f"onnx/{name}.onnx"),
            data=file_record(path, f"onnx/{name}.onnx.data"),
            topology="0" * 64,
            spec=spec,
        )
    manifest = Manifest(
        precision="float32",
        opset=23,
        model=FACTS,
        sampling=SAMPLING,
        buckets=(bucket("short", 4), bucket("long", 9)),
        graphs=graphs,
        tokenizer=file_record(path, "tokenizer.json"),
        checkpoint="0" * 64,
        tools={},
    )
    write_manifest(path, manifest)
    return path
