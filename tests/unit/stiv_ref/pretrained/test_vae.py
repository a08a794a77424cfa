"""VAEs of diffusers behind our interface: standardized as their own pipelines do, causal, frozen, stored whole."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stiv_deploy.stiv_ref.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    SamplingDefaults,
    checkpoint_hash,
    load_checkpoint,
    load_vae,
    save_checkpoint,
)
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.errors import CheckpointError, ConfigError
from stiv_deploy.stiv_ref.generation import generate, sampling_inputs
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.pretrained.vae import (
    CLASSES,
    WEIGHTS,
    PretrainedVae,
    PretrainedVaeConfig,
    config_of,
    load_pretrained_vae,
)
from stiv_deploy.stiv_ref.sampler import SamplingSettings
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, word_tokenizer

pytest.importorskip("diffusers")
KL, LTX = CLASSES
EPS = torch.finfo(torch.float32).eps
FolderFactory = Callable[..., Path]


@pytest.fixture(scope="module")
def per_frame(vae_folder: FolderFactory) -> PretrainedVae:
    return load_pretrained_vae(vae_folder(KL))


@pytest.fixture(scope="module")
def causal(vae_folder: FolderFactory) -> PretrainedVae:
    return load_pretrained_vae(vae_folder(LTX))


def video_of(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_facts(per_frame: PretrainedVae, causal: PretrainedVae) -> None:
    assert per_frame.config == PretrainedVaeConfig(class_name="AutoencoderKL", latent_channels=4, spatial_factor=2)
    assert causal.config == PretrainedVaeConfig(
        class_name="AutoencoderKLLTXVideo", latent_channels=4, spatial_factor=8, temporal_factor=4, causal=True
    )


@pytest.mark.parametrize(
    ("name", "changes", "facts"),
    [
        (KL, {"block_out_channels": (128, 256, 512, 512)}, (4, 8, 1)),
        (KL, {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "use_quant_conv": False}, (16, 8, 1)),
        (LTX, {}, (128, 32, 8)),
    ],
    ids=["stable-diffusion", "flux", "ltx-video"],
)
def test_facts_of_released_architectures(name: str, changes: dict[str, Any], facts: tuple[int, int, int]) -> None:
    import diffusers

    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    with torch.device("meta"):
        config = config_of(getattr(diffusers, name)(**(blocks if name == KL else {}), **changes))
    assert (config.latent_channels, config.spatial_factor, config.temporal_factor) == facts


@pytest.mark.parametrize(("batch", "frames", "rows", "columns"), [(1, 1, 1, 1), (2, 3, 2, 3), (3, 2, 5, 1)])
def test_shapes(
    per_frame: PretrainedVae, causal: PretrainedVae, batch: int, frames: int, rows: int, columns: int
) -> None:
    for vae in (per_frame, causal):
        factor, count = vae.config.spatial_factor, vae.video_frames(frames)
        video = video_of(batch, count, 3, rows * factor, columns * factor)
        latents = vae.encode(video)
        assert latents.shape == (batch, frames, 4, rows, columns)
        assert vae.latent_frames(count) == frames
        assert vae.decode(latents).shape == video.shape


def test_frames_that_can_be_coded(per_frame: PretrainedVae, causal: PretrainedVae) -> None:
    assert [per_frame.latent_frames(frames) for frames in (1, 2, 9)] == [1, 2, 9]
    assert [causal.latent_frames(frames) for frames in (1, 5, 9)] == [1, 2, 3]
    for frames in (0, 2, 4, 8):
        with pytest.raises(ConfigError, match=rf"{frames} frames, but .* codes 4 \* k \+ 1 frames \(1, 5, 9, \.\.\.\)"):
            causal.encode(torch.zeros(1, frames, 3, 8, 8))
    with pytest.raises(ConfigError, match="0 frames, but AutoencoderKL codes 1 or more"):
        per_frame.latent_frames(0)
    with pytest.raises(ConfigError, match="0 latent frames"):
        causal.video_frames(0)


def test_latents_are_standardized_as_diffusers_does(per_frame: PretrainedVae, causal: PretrainedVae) -> None:
    """Flux's formula for one shift, the LTX pipeline's own function for per-channel statistics."""
    from diffusers import LTXImageToVideoPipeline

    images = video_of(2, 3, 3, 8, 12)
    raw = per_frame.model.encode(images.flatten(0, 1)).latent_dist.mode()
    wanted = ((raw - 0.1) * 0.4).unflatten(0, (2, 3))
    torch.testing.assert_close(per_frame.encode(images), wanted, rtol=4 * EPS, atol=4 * EPS)

    video, model = video_of(2, 5, 3, 16, 8), causal.model
    raw = model.encode(video.transpose(1, 2)).latent_dist.mode()
    wanted = LTXImageToVideoPipeline._normalize_latents(raw, model.latents_mean, model.latents_std, 1.5).transpose(1, 2)
    torch.testing.assert_close(causal.encode(video), wanted, rtol=4 * EPS, atol=4 * EPS)


def test_latent_statistics_of_the_config(vae_folder: FolderFactory, per_frame: PretrainedVae) -> None:
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    vae = load_pretrained_vae(vae_folder(KL, latents_mean=mean, latents_std=std))
    raw = per_frame.model.encode(video_of(1, 3, 8, 8)).latent_dist.mode()
    wanted = (raw - torch.tensor(mean)[:, None, None]) * 0.4 / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(vae.encode(video_of(1, 1, 3, 8, 8))[0], wanted, rtol=4 * EPS, atol=4 * EPS)


def test_decode_undoes_the_standardization(per_frame: PretrainedVae, causal: PretrainedVae) -> None:
    raw = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    wanted = per_frame.model.decode(raw).sample.clamp(-1, 1)
    torch.testing.assert_close(per_frame.decode(((raw - 0.1) * 0.4)[None])[0], wanted, rtol=1e-5, atol=1e-5)

    raw = torch.randn(1, 4, 2, 2, 1, generator=torch.Generator().manual_seed(0))
    latents = (raw.transpose(1, 2) - causal.shift[:, None, None]) / causal.scale[:, None, None]
    wanted = causal.model.decode(raw).sample.transpose(1, 2).clamp(-1, 1)
    torch.testing.assert_close(causal.decode(latents), wanted, rtol=1e-5, atol=1e-5)


def test_decoded_values_stay_in_range(per_frame: PretrainedVae, causal: PretrainedVae) -> None:
    for vae in (per_frame, causal):
        out = vae.decode(1e3 * torch.randn(1, 2, 4, 2, 2))
        assert out.abs().max() <= 1


def test_frames_are_coded_on_their_own(per_frame: PretrainedVae) -> None:
    video = video_of(2, 3, 3, 8, 8)
    together = per_frame.encode(video)
    torch.testing.assert_close(together[1:, 2:], per_frame.encode(video[1:, 2:]), rtol=1e-5, atol=1e-6)


def test_no_latent_depends_on_a_later_frame(causal: PretrainedVae) -> None:
    """So the first frame alone has the latent that it has in the video, which is what frame replacement wants."""
    video = video_of(2, 9, 3, 16, 16)
    latents = causal.encode(video)
    rounding = {"rtol": 0, "atol": 16 * EPS * float(latents.abs().max())}
    torch.testing.assert_close(causal.encode(video[:, :1]), latents[:, :1], **rounding)
    torch.testing.assert_close(causal.encode(video[:, :5]), latents[:, :2], **rounding)
    for frame, first in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2)):
        changed = video.clone()
        changed[:, frame] += 0.5
        moved = (causal.encode(changed) - latents).abs().amax(dim=(0, 2, 3, 4))
        assert moved[:first].max() <= rounding["atol"] if first else True
        assert moved[first] > 1e-3


def test_it_is_frozen_and_stays_so(per_frame: PretrainedVae) -> None:
    assert not per_frame.train().training
    assert not any(module.training for module in per_frame.modules())
    assert not any(parameter.requires_grad for parameter in per_frame.parameters())


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_as_it_came(vae_folder: FolderFactory, tmp_path: Path, name: str, dtype: str) -> None:
    folder = vae_folder(name, dtype)
    vae = load_pretrained_vae(folder)
    assert {tensor.dtype for tensor in vae.state_dict().values()} == {torch.float32}
    vae.save(tmp_path / "copy")
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "copy" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert str(tmp_path.parent) not in (tmp_path / "copy" / "config.json").read_text()
    again = load_pretrained_vae(tmp_path / "copy")
    assert again.config == vae.config
    video = video_of(1, 1, 3, 8, 8)
    assert torch.equal(again.encode(video), vae.encode(video))


def test_attention_under_its_old_names(vae_folder: FolderFactory, per_frame: PretrainedVae, tmp_path: Path) -> None:
    """The released file of Stable Diffusion 1.x has them."""
    shutil.copytree(vae_folder(KL), tmp_path / "old")
    tensors = load_file(tmp_path / "old" / WEIGHTS)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in tensors.items()}
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, tmp_path / "old" / WEIGHTS, metadata={"format": "pt"})
    video = video_of(1, 1, 3, 8, 8)
    assert torch.equal(load_pretrained_vae(tmp_path / "old").encode(video), per_frame.encode(video))


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:400])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def more(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS) | {"surplus": torch.zeros(1)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no folder": (KL, shutil.rmtree, "no VAE here .no such folder.; give a folder"),
    "no config": (KL, lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "no JSON": (KL, lambda folder: (folder / "config.json").write_text("{"), "cannot be read as a diffusers config"),
    "no object": (KL, lambda folder: (folder / "config.json").write_text("[]"), "cannot be read as a diffusers config"),
    "other class": (
        KL,
        edited(_class_name="AutoencoderKLWan"),
        "'AutoencoderKLWan' is not supported; there are: AutoencoderKL, AutoencoderKLLTXVideo",
    ),
    "no weights": (KL, lambda folder: (folder / WEIGHTS).unlink(), f"no {WEIGHTS} here; write it"),
    "pickle": (KL, pickled, "diffusion_pytorch_model.bin is a pickle, which is never loaded"),
    "cut weights": (KL, cut, "not a readable safetensors file"),
    "missing weights": (KL, edited(layers_per_block=2), "does not fit its config.json: missing .* and [0-9]+ more"),
    "surplus weights": (KL, more, "does not fit its config.json: unexpected surplus"),
    "other sizes": (KL, edited(latent_channels=8), r"not a readable AutoencoderKL \(.* size mismatch for"),
    "grey": (LTX, edited(out_channels=3, in_channels=1), "not a readable AutoencoderKLLTXVideo"),
    "not causal": (LTX, edited(encoder_causal=False), "this AutoencoderKLLTXVideo cannot be used: its encoder is not"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_get_one_clear_line(vae_folder: FolderFactory, tmp_path: Path, case: str) -> None:
    name, spoil, message = BAD[case]
    folder = tmp_path / "vae"
    shutil.copytree(vae_folder(name), folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained_vae(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (LTX, {"timestep_conditioning": True}, "its decoder wants a timestep or noise"),
        (LTX, {"decoder_inject_noise": (True, False, False)}, "its decoder wants a timestep or noise"),
        (KL, {"in_channels": 4}, "it codes 4 channels to 3, wanted RGB"),
    ],
)
def test_what_cannot_be_used(vae_folder: FolderFactory, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"this {name} cannot be used: {message}"):
        load_pretrained_vae(vae_folder(name, **changes))


def test_without_diffusers(vae_folder: FolderFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = vae_folder(KL)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CheckpointError, match=r"needs the diffusers library; install stiv-deploy\[encoders\]"):
        load_pretrained_vae(folder)


def test_a_causal_vae_alone_may_code_several_frames_as_one() -> None:
    with pytest.raises(ValueError, match="temporal_factor 4 wants a causal VAE"):
        PretrainedVaeConfig(class_name="AutoencoderKL", latent_channels=4, spatial_factor=8, temporal_factor=4)


def checkpoint_of(vae: PretrainedVae, frames: int = 9) -> Checkpoint:
    """A small untrained STIV around ``vae``, with a velocity that is not zero."""
    generator = torch.Generator().manual_seed(0)
    model_config = StivConfig(
        name="small", blocks=1, width=16, heads=2, text_width=12, base_frames=4, base_grid=(2, 2), frequency_width=8
    )
    text_config = TextConfig(vocabulary=5, width=12, heads=2, layers=1, max_tokens=6)
    model = Stiv(model_config).initialize(generator)
    torch.nn.init.xavier_uniform_(model.head.out.weight, generator=generator)
    return Checkpoint(
        config=CheckpointConfig(
            model=model_config,
            text=text_config,
            vae=vae.config,
            sampling=SamplingDefaults(frames=frames, height=32, width=16, steps=2),
        ),
        model=model.eval().requires_grad_(False),
        text_encoder=TextEncoder(text_config).initialize(generator).eval(),
        vae=vae,
        tokenizer=word_tokenizer(("red", "digit"), 6),
    )


@pytest.mark.parametrize("name", CLASSES)
def test_checkpoints_hold_the_vae(vae_folder: FolderFactory, tmp_path: Path, name: str) -> None:
    vae = load_pretrained_vae(vae_folder(name, "float16"))
    save_checkpoint(tmp_path / "checkpoint", checkpoint_of(vae))
    loaded, alone = load_checkpoint(tmp_path / "checkpoint"), load_vae(tmp_path / "checkpoint")
    assert loaded.config.vae == vae.config
    video = video_of(1, 5, 3, 16, 16)
    assert torch.equal(loaded.vae.encode(video), vae.encode(video))
    assert torch.equal(alone.encode(video), vae.encode(video))
    before = checkpoint_hash(tmp_path / "checkpoint")
    edited(scaling_factor=2.0)(tmp_path / "checkpoint" / "vae")
    assert checkpoint_hash(tmp_path / "checkpoint") != before


def test_checkpoint_whose_vae_was_swapped(vae_folder: FolderFactory, tmp_path: Path, causal: PretrainedVae) -> None:
    save_checkpoint(tmp_path / "checkpoint", checkpoint_of(causal))
    shutil.rmtree(tmp_path / "checkpoint" / "vae")
    shutil.copytree(vae_folder(KL), tmp_path / "checkpoint" / "vae")
    message = r"holds AutoencoderKL of 4 channels, 1x2x2, .* says AutoencoderKLLTXVideo of 4 channels, 4x8x8"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "latent_channels", 8, "latent channels differ"),
        ("sampling", "frames", 8, r"sampling.frames in config.json: 8 frames, but .* codes 4 \* k \+ 1"),
        ("vae", "class_name", "Vae", r"vae.pretrained.class_name: Input should be"),
    ],
)
def test_checkpoint_whose_parts_do_not_fit(
    causal: PretrainedVae, tmp_path: Path, section: str, key: str, value: object, message: str
) -> None:
    save_checkpoint(tmp_path / "checkpoint", checkpoint_of(causal))
    path = tmp_path / "checkpoint" / "config.json"
    values = json.loads(path.read_text())
    values[section][key] = value
    path.write_text(json.dumps(values))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_checkpoint(tmp_path / "checkpoint")


def test_sampling_with_a_causal_vae(causal: PretrainedVae) -> None:
    checkpoint, first = checkpoint_of(causal), video_of(2, 3, 32, 16)
    inputs = sampling_inputs(checkpoint, ["red digit", "digit"], [1, 2], first)
    assert inputs.noise.shape == (2, 3, 4, 4, 2)
    assert inputs.frame_mask.tolist() == [[True, False, False]] * 2
    torch.testing.assert_close(inputs.clean[:, 0], causal.encode(first[:, None])[:, 0])
    assert inputs.micro[:, -1].tolist() == [9, 9]
    settings = SamplingSettings(steps=2)
    clip = generate(checkpoint, ["red digit", "digit"], [1, 2], settings, frames=5, first_frames=first)
    assert clip.shape == (2, 5, 3, 32, 16)
    with pytest.raises(ConfigError, match="8 frames, but AutoencoderKLLTXVideo codes"):
        generate(checkpoint, ["digit"], [1], settings, frames=8)
