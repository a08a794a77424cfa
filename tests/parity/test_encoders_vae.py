"""Pretrained VAEs as ONNX graphs: torch against ONNX Runtime, and image-to-video through the whole runtime.

The gate is derived: at most twice the error of torch in fp32, both against torch in fp64, plus one rounding of every
value.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stiv_deploy.export.bundle_from_checkpoint import default_bucket, export_bundle, validate_bucket
from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.graphs.check import check_sizes
from stiv_deploy.export.graphs.modules import model_facts
from stiv_deploy.export.parity.ladder import Subject, climb
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime import StivPipeline
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.contract import GraphSpec, dimensions, graph_specs
from stiv_deploy.runtime.bundle.manifest import Range
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.noise import draw_noise
from stiv_deploy.stiv_ref.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    SamplingDefaults,
    load_checkpoint,
    save_checkpoint,
)
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.pretrained.vae import CLASSES, PretrainedVae, PretrainedVaeConfig, load_pretrained_vae
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, sample
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, tokenize, word_tokenizer

pytest.importorskip("diffusers")

KL, LTX = CLASSES
FRAMES, HEIGHT, WIDTH, SEED = 9, 48, 32, 5  # 9 frames are 3 latent frames of the causal VAE
PROMPT = "digit three left"
UNIT = 2.0**-24


def checkpoint_of(vae: PretrainedVae) -> Checkpoint:
    """A small untrained STIV around ``vae``, with no weight at zero."""
    generator = torch.Generator().manual_seed(0)
    model_config = StivConfig(
        name="small", blocks=1, width=32, heads=2, text_width=16, base_frames=4, base_grid=(2, 3), frequency_width=16
    )
    text_config = TextConfig(vocabulary=6, width=16, heads=2, layers=1, max_tokens=6)
    model = Stiv(model_config).initialize(generator)
    torch.nn.init.xavier_uniform_(model.head.out.weight, generator=generator)
    for block in model.blocks:
        torch.nn.init.normal_(block.temporal_gate, generator=generator)
    return Checkpoint(
        config=CheckpointConfig(
            model=model_config,
            text=text_config,
            vae=vae.config,
            sampling=SamplingDefaults(frames=FRAMES, height=HEIGHT, width=WIDTH, steps=3, guidance_scale=3.0),
        ),
        model=model.eval().requires_grad_(False),
        text_encoder=TextEncoder(text_config).initialize(generator).eval().requires_grad_(False),
        vae=vae,
        tokenizer=word_tokenizer(("digit", "three", "left"), 6),
    )


@pytest.fixture(scope="module")
def exported(vae_folder: Callable[..., Path], once: Callable[[str, Callable[[Path], object]], Path]) -> Iterator[Any]:
    """By VAE class: the checkpoint, an fp64 copy, and the pipeline of its bundle."""
    pipes: list[StivPipeline] = []

    def export(name: str, folder: Path) -> None:
        save_checkpoint(folder / "checkpoint", checkpoint_of(load_pretrained_vae(vae_folder(name))))
        export_bundle(ExportRequest(checkpoint=folder / "checkpoint", out=folder / "bundle", check=False))

    @functools.cache
    def make(name: str) -> SimpleNamespace:
        folder = once(f"{name} pair", functools.partial(export, name))
        single = load_checkpoint(folder / "checkpoint")
        pipes.append(StivPipeline.from_bundle(folder / "bundle", "onnxruntime", 1))
        parts = {part: copy.deepcopy(getattr(single, part)).double() for part in ("model", "text_encoder", "vae")}
        double = Checkpoint(config=single.config, tokenizer=single.tokenizer, **parts)
        return SimpleNamespace(single=single, double=double, pipe=pipes[-1])

    yield make
    for pipe in pipes:
        pipe.close()


def allowed(exact: Tensor, plain: Tensor) -> float:
    """Twice the error of plain fp32, plus one rounding of every value."""
    return float(2 * (plain - exact).norm() + UNIT * exact.norm())


def run(backend: Backend, graph: str, spec: GraphSpec, dims: dict[str, int], given: Tensor) -> Tensor:
    source = backend.upload(given.numpy())
    target = backend.empty(spec.outputs[0].sized(dims), "float32")
    backend.bind(graph, {spec.inputs[0].name: source}, {spec.outputs[0].name: target})()
    return torch.from_numpy(backend.read(target))


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["image_encoder", "decoder"])
@pytest.mark.parametrize("name", CLASSES)
def test_graphs_at_every_kind_of_size(exported: Any, name: str, graph: str) -> None:
    """Batch, frames, height and width are dynamic; one latent frame of one token up to four, never square."""
    both = exported(name)
    model = both.pipe.bundle.manifest.model
    spec = graph_specs(model, "float32")[graph]
    for batch, frames, rows, columns in ((1, 1, 1, 1), (2, 3, 2, 1), (1, 4, 1, 3), (3, 2, 3, 2)):
        dims = dimensions(
            model,
            batch=batch,
            model_batch=1,
            video_frames=model.video_frames(frames),
            height=rows * model.pixel_multiple,
            width=columns * model.pixel_multiple,
            text_tokens=1,
        )
        shape = spec.inputs[0].sized(dims)
        given = torch.rand(shape, generator=torch.Generator().manual_seed(batch)) * 2 - 1
        with torch.no_grad():
            code = {"image_encoder": "encode", "decoder": "decode"}[graph]
            exact = getattr(both.double.vae, code)(given.double())
            plain = getattr(both.single.vae, code)(given)
        got = run(both.pipe.backend, graph, spec, dims, given)
        assert (got - exact).norm() <= allowed(exact, plain), shape
        # The gate is not blind: the next size of everything would move the result by far more.
        assert exact.std() > 1e-2


def image_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def pixels_of(*images: np.ndarray) -> Tensor:
    """Video [1, F, 3, H, W] in fp64."""
    return (torch.from_numpy(np.stack(images)).double().permute(0, 3, 1, 2) / 127.5 - 1)[None]


@torch.no_grad()
def oracle(checkpoint: Checkpoint, images: list[np.ndarray], frames: int) -> tuple[Tensor, Tensor]:
    """Latents and video of the reference in the checkpoint's own type, the first ``images`` given."""
    dtype, vae = checkpoint.model.patch.weight.dtype, checkpoint.vae
    size = (HEIGHT // vae.config.spatial_factor, WIDTH // vae.config.spatial_factor)
    noise = torch.from_numpy(draw_noise([SEED], (vae.latent_frames(frames), 4, *size))).to(dtype)
    clean, mask = torch.zeros_like(noise), torch.zeros(noise.shape[:2], dtype=torch.bool)
    if images:
        given = vae.encode(pixels_of(*images).to(dtype))
        clean[:, : given.shape[1]], mask[:, : given.shape[1]] = given, True
    micro = torch.tensor([[HEIGHT, WIDTH, 0, 0, 1, frames]], dtype=torch.float32)
    texts = [checkpoint.text_encoder(*tokenize(checkpoint.tokenizer, [prompt])) for prompt in (PROMPT, "")]
    settings = SamplingSettings(steps=3, guidance_scale=3.0)
    latents = sample(checkpoint.model, SamplingInputs(noise, clean, mask, *texts, micro), settings)
    return latents, vae.decode(latents)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("given", "frames"), [(0, FRAMES), (1, FRAMES), (5, FRAMES), (1, 5)])
def test_generation_end_to_end(exported: Any, name: str, given: int, frames: int) -> None:
    """Text-to-video, image-to-video, and prediction from the first five frames."""
    both, images = exported(name), [image_of(index) for index in range(given)]
    exact, video = oracle(both.double, images, frames)
    plain, _ = oracle(both.single, images, frames)
    out = both.pipe(PROMPT, seed=SEED, image=dict(enumerate(images)), num_frames=frames)
    assert (torch.from_numpy(out.latents) - exact).norm() <= allowed(exact, plain)
    pixels = ((video + 1) * 127.5).permute(0, 1, 3, 4, 2).numpy()
    assert out.frames.shape == (1, frames, HEIGHT, WIDTH, 3)
    assert np.abs(out.frames - pixels).max() <= 0.5 + 1e-2  # rounding to a pixel, and the latents' own error


@pytest.mark.slow
def test_first_frame_is_the_vaes_reconstruction(exported: Any) -> None:
    """Of a per-frame VAE pixel by pixel. (A decoder that sees later latents, as that of LTX, blends them in.)"""
    both, image = exported(KL), image_of(0)
    with torch.no_grad():
        decoded = both.double.vae.decode(both.double.vae.encode(pixels_of(image)))[0, 0]
    wanted = np.rint((decoded.permute(1, 2, 0).numpy() + 1) * 127.5)
    out = both.pipe(PROMPT, seed=SEED, image=image)
    assert np.abs(out.frames[0, 0] - wanted).max() <= 1

    def psnr(frame: np.ndarray) -> float:
        return float(-10 * np.log10(np.mean((frame.astype(float) - image) ** 2) / 255**2))

    assert psnr(out.frames[0, 0]) == pytest.approx(psnr(wanted), abs=0.01)


@pytest.mark.slow
def test_a_causal_vae_takes_what_it_can_code(exported: Any) -> None:
    pipe, image = exported(LTX).pipe, image_of(0)
    assert pipe.bundle.manifest.model.causal_vae
    for frames in (2, 8, 16):
        with pytest.raises(RequestError, match=f"frames is {frames}; this bundle takes 1 to 21 in steps of 4"):
            pipe(PROMPT, num_frames=frames)
    with pytest.raises(
        RequestError, match="images are given for frames 0, 8; .* give frame 0 alone, or the first 5, 9"
    ):
        pipe(PROMPT, image={0: image, -1: image})


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_tiles_differ_little_where_the_vae_sees_far(exported: Any, name: str) -> None:
    """Group norms and attention of AutoencoderKL see the whole frame, LTX further than a quarter of the overlap."""
    pipe = exported(name).pipe
    options: dict[str, Any] = {"seed": SEED, "image": image_of(0), "num_inference_steps": 1}
    whole, tiled = (pipe(PROMPT, **options, decode_tile=tile) for tile in (0, 32))
    difference = whole.frames.astype(float) - tiled.frames
    assert difference.any()
    assert difference.std() < 0.5 * whole.frames.std()


def facts_of(**changes: Any) -> Any:
    vae = PretrainedVaeConfig(
        class_name="AutoencoderKLLTXVideo", latent_channels=4, spatial_factor=8, temporal_factor=4, causal=True
    )
    model = StivConfig(name="small", blocks=1, width=16, heads=2, text_width=12, **changes)
    text, sampling = TextConfig(vocabulary=5, width=12, heads=2, max_tokens=6), SamplingDefaults(frames=13, height=64)
    config = CheckpointConfig(model=model, text=text, vae=vae, sampling=sampling)
    return model_facts(config), default_bucket(config.sampling, model_facts(config))


@pytest.mark.parametrize(("patch", "frames"), [((1, 2), (1, 13, 29)), ((2, 2), (5, 13, 29))])
def test_buckets_of_a_causal_vae(patch: tuple[int, int], frames: tuple[int, int, int]) -> None:
    """With two latent frames in a token, 2k latent frames are 4 * (2k - 1) + 1 frames: 5, 13, 21, 29."""
    facts, bucket = facts_of(patch=patch)
    assert bucket.frames == Range(min=frames[0], typical=frames[1], max=frames[2])
    validate_bucket(bucket, facts)
    for dims in check_sizes(bucket, facts).values():
        assert dims["video_frames"] == facts.video_frames(dims["frames"])
        assert dims["frames"] % patch[0] == 0
    some = ", ".join(str(4 * patch[0] * count - 3) for count in (1, 2, 3))
    with pytest.raises(ExportError, match=f"frames 13:13:16: this model takes {some}, ...; change --frames"):
        validate_bucket(bucket.model_copy(update={"frames": Range(min=13, typical=13, max=16)}), facts)


@pytest.mark.slow
def test_the_parity_ladder_of_a_causal_vae(exported: Any) -> None:
    both = exported(LTX)
    report = climb(Subject(bundle=both.pipe.bundle, checkpoint=both.single), ["onnxruntime"], 2)
    assert report.passed, [row for row in report.rows if not row.passed]
    assert {"image_encoder.latents", "decoder.video"} <= {row.name for row in report.rows}
