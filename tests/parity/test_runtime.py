"""The shipped loop against the oracle, end to end: prompts and an image in, latents and frames out.

The gate is the error of the reference itself in fp32, both measured against the reference in fp64: the runtime may
err at most twice as much, plus one rounding of the largest value (rule 10 of the house: tolerance is derived).
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime import StivPipeline
from stiv_deploy.runtime.sampling.noise import draw_noise
from stiv_deploy.stiv_ref.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    SamplingDefaults,
    load_checkpoint,
    save_checkpoint,
)
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.guidance import GuidanceMode, Unseen
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, Solver, sample
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, tokenize, word_tokenizer
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig

pytestmark = pytest.mark.slow

WORDS = ("digit", "three", "seven", "moving", "left", "up")
PROMPTS = ["digit three moving left", "digit seven moving up"]
FRAMES, HEIGHT, WIDTH, SEED = 6, 16, 24, 5  # more frames than the model's base, and not square
EPS = float(np.finfo(np.float32).eps)


def random_checkpoint() -> Checkpoint:
    """A small untrained model with no weight at zero, so that every path of every block moves the result."""
    generator = torch.Generator().manual_seed(0)
    model_config = StivConfig(
        name="small", blocks=3, width=32, heads=2, text_width=16, base_frames=4, base_grid=(2, 3), frequency_width=16
    )
    text_config, vae_config = (
        TextConfig(vocabulary=3 + len(WORDS), width=16, heads=2, layers=1, max_tokens=8),
        VaeConfig(channels=(8, 8)),
    )
    model, vae = Stiv(model_config).initialize(generator), Vae(vae_config)
    torch.nn.init.xavier_uniform_(model.head.out.weight, generator=generator)
    for block in model.blocks:
        torch.nn.init.normal_(block.temporal_gate, generator=generator)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return Checkpoint(
        config=CheckpointConfig(
            model=model_config,
            text=text_config,
            vae=vae_config,
            sampling=SamplingDefaults(frames=FRAMES, height=HEIGHT, width=WIDTH, steps=6, guidance_scale=3.0),
        ),
        model=model,
        text_encoder=TextEncoder(text_config).initialize(generator),
        vae=vae,
        tokenizer=word_tokenizer(WORDS, 8),
    )


@dataclass(frozen=True)
class Pair:
    """The oracle in fp32 and fp64, and the runtime on its bundle."""

    single: Checkpoint
    double: Checkpoint
    pipe: StivPipeline


def doubled(checkpoint: Checkpoint) -> Checkpoint:
    modules = {name: copy.deepcopy(getattr(checkpoint, name)).double() for name in ("model", "text_encoder", "vae")}
    return Checkpoint(config=checkpoint.config, tokenizer=checkpoint.tokenizer, **modules)


def exported(folder: Path) -> None:
    save_checkpoint(folder / "checkpoint", random_checkpoint())
    export_bundle(ExportRequest(checkpoint=folder / "checkpoint", out=folder / "bundle", check=False))


@pytest.fixture(scope="module")
def pair(once: Callable[[str, Callable[[Path], object]], Path]) -> Iterator[Pair]:
    folder = once("pair", exported)
    single = load_checkpoint(folder / "checkpoint")
    with StivPipeline.from_bundle(folder / "bundle", "onnxruntime") as pipe:
        yield Pair(single, doubled(single), pipe)


def image_of(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@torch.no_grad()
def oracle(checkpoint: Checkpoint, images: dict[int, np.ndarray], settings: SamplingSettings) -> tuple[Any, Any]:
    """Latents [B, T, C, h, w] and video [B, F, 3, H, W] of the reference, in the checkpoint's own precision."""
    dtype, batch = checkpoint.model.patch.weight.dtype, len(PROMPTS)
    noise = torch.from_numpy(draw_noise([SEED, SEED + 1], (FRAMES, 4, HEIGHT // 4, WIDTH // 4))).to(dtype)
    clean, mask = torch.zeros_like(noise), torch.zeros(batch, FRAMES, dtype=torch.bool)
    for index, image in images.items():
        pixels = torch.from_numpy(image).to(dtype).permute(2, 0, 1) / 127.5 - 1
        clean[:, index], mask[:, index] = checkpoint.vae.encode(pixels[None, None])[0, 0], True
    micro = torch.tensor([[HEIGHT, WIDTH, 0, 0, 1, FRAMES]], dtype=torch.float32).repeat(batch, 1)
    texts = [checkpoint.text_encoder(*tokenize(checkpoint.tokenizer, prompts)) for prompts in (PROMPTS, ["", ""])]
    latents = sample(checkpoint.model, SamplingInputs(noise, clean, mask, *texts, micro), settings)
    return latents.numpy(), checkpoint.vae.decode(latents).numpy()


def generate(pair: Pair, images: dict[int, np.ndarray], settings: SamplingSettings) -> Any:
    return pair.pipe(
        PROMPTS,
        seed=SEED,
        image=images or None,
        num_inference_steps=settings.steps,
        guidance_mode=settings.guidance_mode,
        guidance_scale=settings.guidance_scale,
        image_guidance_scale=settings.image_scale,
        guidance_renorm=settings.renorm,
        solver=settings.solver,
        time_shift=settings.time_shift,
        unseen=settings.unseen,
    )


def settings_of(**changes: Any) -> SamplingSettings:
    base = SamplingSettings(steps=6, guidance_scale=3.0, image_scale=1.5, time_shift=2.0)
    return SamplingSettings(**(asdict(base) | changes))


def allowed(exact: np.ndarray, plain: np.ndarray) -> float:
    """Twice the error of plain fp32, plus one rounding of the largest value everywhere."""
    return float(2 * np.linalg.norm(plain - exact) + EPS * np.abs(exact).max() * np.sqrt(exact.size))


@pytest.mark.parametrize("given", [(), (0,), (0, FRAMES - 1)], ids=["t2v", "ti2v", "interpolation"])
@pytest.mark.parametrize("mode", list(GuidanceMode))
@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize("renorm", [False, True], ids=["plain", "renorm"])
def test_free_run(pair: Pair, given: tuple[int, ...], mode: GuidanceMode, solver: Solver, renorm: bool) -> None:
    check_free_run(pair, given, settings_of(guidance_mode=mode, solver=solver, renorm=renorm))


@pytest.mark.parametrize(("mode", "solver"), [(GuidanceMode.JIT, Solver.EULER), (GuidanceMode.SIT, Solver.HEUN)])
def test_free_run_with_zero_latents_in_the_unconditional_branch(pair: Pair, mode: GuidanceMode, solver: Solver) -> None:
    check_free_run(pair, (0,), settings_of(guidance_mode=mode, solver=solver, unseen=Unseen.ZERO))


def check_free_run(pair: Pair, given: tuple[int, ...], settings: SamplingSettings) -> None:
    images = {index: image_of(index) for index in given}
    exact, video = oracle(pair.double, images, settings)
    plain, _ = oracle(pair.single, images, settings)
    out = generate(pair, images, settings)
    assert np.linalg.norm(out.latents - exact) <= allowed(exact, plain)
    pixels = np.clip((video.transpose(0, 1, 3, 4, 2) + 1) * 127.5, 0, 255)
    assert np.abs(out.frames - pixels).max() <= 0.5 + 1e-2  # rounding to a pixel, and the latents' own error


def test_the_settings_make_a_difference_that_the_gate_would_see(pair: Pair) -> None:
    """The gate above is some 1e-6 of the values; every setting moves the oracle by far more, so it is not blind."""
    images = {0: image_of(0)}
    base, _ = oracle(pair.single, images, settings_of())
    for change in (
        {"guidance_mode": GuidanceMode.NONE},
        {"guidance_mode": GuidanceMode.SIT},
        {"renorm": False},
        {"solver": Solver.HEUN},
        {"solver": Solver.AB2},
        {"time_shift": 1.0},
        {"unseen": Unseen.ZERO},
    ):
        other, _ = oracle(pair.single, images, settings_of(**change))
        assert np.linalg.norm(other - base) > 1e-3 * np.linalg.norm(base), change


def test_first_frame_is_the_decoded_clean_latent(pair: Pair) -> None:
    out = generate(pair, {0: image_of(0)}, settings_of())
    pixels = torch.from_numpy(image_of(0)).float().permute(2, 0, 1) / 127.5 - 1
    with torch.no_grad():
        decoded = pair.single.vae.decode(pair.single.vae.encode(pixels[None, None]))[0, 0]
    wanted = np.rint((decoded.numpy().transpose(1, 2, 0) + 1) * 127.5)
    assert np.abs(out.frames[0, 0] - wanted).max() <= 1


def test_smaller_request_goes_through_the_same_graphs(pair: Pair) -> None:
    """One Euler step from t = 0 without guidance is noise + velocity; RoPE tables are made for this size."""
    out = pair.pipe(
        "digit three", num_frames=3, height=8, width=16, num_inference_steps=1, seed=0, guidance_mode="none"
    )

    def wanted(checkpoint: Checkpoint) -> np.ndarray:
        noise = torch.from_numpy(draw_noise([0], (3, 4, 2, 4))).to(checkpoint.model.patch.weight.dtype)
        with torch.no_grad():
            text = checkpoint.text_encoder(*tokenize(checkpoint.tokenizer, ["digit three"]))
            return (
                noise + checkpoint.model(noise, torch.zeros(1), torch.tensor([[8, 16, 0, 0, 1, 3.0]]), *text)
            ).numpy()

    exact, plain = wanted(pair.double), wanted(pair.single)
    assert np.linalg.norm(out.latents - exact) <= allowed(exact, plain)
