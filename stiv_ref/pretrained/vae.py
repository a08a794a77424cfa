"""Pretrained VAEs of the diffusers library, frozen, behind the interface of :mod:`~stiv_deploy.stiv_ref.vae`.

``AutoencoderKL`` codes every frame on its own: the VAE of Stable Diffusion, SDXL, SD 3 and FLUX (latent diffusion,
arXiv 2112.10752). ``AutoencoderKLLTXVideo`` is a causal video VAE (LTX-Video, arXiv 2501.00103): the first frame
becomes latent frame 0 alone, each further latent frame codes ``temporal_factor`` frames, and no latent depends on a
later frame. Its norms look at one position only and it keeps no feature cache, so that it is exactly causal and one
graph serves every number of frames; norms over time (HunyuanVideo) break the first, caches (Wan) the second.

They are read from a local folder of config.json and safetensors, as ``save_pretrained`` writes it. Nothing is fetched.
"""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stiv_deploy.stiv_ref.bounds import Factor, Size
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.errors import CheckpointError, ConfigError
from stiv_deploy.stiv_ref.pretrained.folders import CONFIG, check_weights, read_config, silenced
from stiv_deploy.stiv_ref.weights import check_finite, save_tensors

ClassName = Literal["AutoencoderKL", "AutoencoderKLLTXVideo"]
CLASSES: tuple[ClassName, ...] = get_args(ClassName)
WEIGHTS = "diffusion_pytorch_model.safetensors"


class PretrainedVaeConfig(FrozenConfig):
    """What STIV must know of a pretrained VAE; the rest is in the VAE's own config.json."""

    kind: Literal["pretrained"] = "pretrained"
    class_name: ClassName
    latent_channels: Size
    spatial_factor: Factor
    temporal_factor: Factor = 1
    causal: bool = False

    @model_validator(mode="after")
    def _check(self) -> "PretrainedVaeConfig":
        if self.temporal_factor > 1 and not self.causal:
            raise ValueError(f"temporal_factor {self.temporal_factor} wants a causal VAE")
        return self

    def latent_frames(self, frames: int) -> int:
        """Latent frames of ``frames`` frames of video; :class:`ConfigError` naming the numbers that it can code."""
        if frames < 1 or (frames - 1) % self.temporal_factor:
            raise ConfigError(f"{frames} frames, but {self.class_name} codes {self.frame_counts}")
        return (frames - 1) // self.temporal_factor + 1

    def video_frames(self, latent_frames: int) -> int:
        """Frames of video that ``latent_frames`` latent frames make."""
        if latent_frames < 1:
            raise ConfigError(f"{latent_frames} latent frames, but a video has at least 1")
        return (latent_frames - 1) * self.temporal_factor + 1

    @property
    def frame_counts(self) -> str:
        """The numbers of frames that can be coded, in words."""
        factor = self.temporal_factor
        return "1 or more" if factor == 1 else f"{factor} * k + 1 frames (1, {1 + factor}, {1 + 2 * factor}, ...)"


class PretrainedVae(nn.Module):
    """A frozen VAE of diffusers; always in evaluation mode.

    ``shift`` and ``scale`` [C] standardize its latents as its own pipelines do. ``dtype`` is the type of its file.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: PretrainedVaeConfig, model: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.dtype = dtype
        shift, scale = standardization(model)
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "PretrainedVae":
        """Stay in evaluation mode: the VAE is frozen."""
        return super().train(False)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of ``frames`` frames of video; :class:`ConfigError` naming the numbers that it can code."""
        return self.config.latent_frames(frames)

    def video_frames(self, latent_frames: int) -> int:
        """Frames of video that ``latent_frames`` latent frames make."""
        return self.config.video_frames(latent_frames)

    def encode(self, video: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] (posterior mean, standardized) of video [B, F, 3, H, W] in [-1, 1].

        Raises :class:`ConfigError` for a number of frames that this VAE cannot code.
        """
        if not torch.compiler.is_exporting():  # an exported number of frames is a symbol
            self.latent_frames(video.shape[1])
        if self.config.causal:
            mean = self.model.encode(video.transpose(1, 2)).latent_dist.mean.transpose(1, 2)
        else:
            mean = self.model.encode(video.flatten(0, 1)).latent_dist.mean.unflatten(0, video.shape[:2])
        return (mean - self.shift[:, None, None]) / self.scale[:, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Video [B, F, 3, H, W] clamped to [-1, 1] from latents [B, T, C, h, w]."""
        raw = latents * self.scale[:, None, None] + self.shift[:, None, None]
        if self.config.causal:
            video = self.model.decode(raw.transpose(1, 2)).sample.transpose(1, 2)
        else:
            video = self.model.decode(raw.flatten(0, 1)).sample.unflatten(0, latents.shape[:2])
        return video.clamp(-1, 1)

    def save(self, folder: Path) -> None:
        """Write config.json and safetensors to the new folder ``folder``, in the type that the weights came in."""
        folder.mkdir()
        config = json.loads(self.model.to_json_string())
        config.pop("_name_or_path", None)  # a path of the machine that it was read on
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tensors = {name: tensor.to(self.dtype).contiguous() for name, tensor in self.model.state_dict().items()}
        save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})


def standardization(model: Any) -> tuple[Tensor, Tensor]:
    """``shift`` and ``scale`` fp32 [C]: raw latents = latents * scale + shift, as diffusers' pipelines have it.

    Per-channel mean and standard deviation where the VAE has them (LTX as buffers, others in the config), else the
    config's one shift; the scale is divided by ``scaling_factor``.
    """
    config = model.config
    known = dict(config) | dict(model.named_buffers(recurse=False))
    mean, std = known.get("latents_mean"), known.get("latents_std")
    shift = (known.get("shift_factor") or 0.0) if mean is None else mean
    parts = (torch.as_tensor(value, dtype=torch.float32) for value in (shift, 1.0 if std is None else std))
    shift, scale = (part.flatten().expand(config.latent_channels).clone() for part in parts)
    return shift, scale / config.scaling_factor


def config_of(model: Any) -> PretrainedVaeConfig:
    """What STIV must know of a VAE of diffusers; ValueError if it is of a kind that STIV cannot use."""
    config, name = model.config, type(model).__name__
    if (config.in_channels, config.out_channels) != (3, 3):
        raise ValueError(f"it codes {config.in_channels} channels to {config.out_channels}, wanted RGB")
    if name == "AutoencoderKL":
        factor = 2 ** (len(config.block_out_channels) - 1)
        return PretrainedVaeConfig(
            class_name="AutoencoderKL", latent_channels=config.latent_channels, spatial_factor=factor
        )
    if not config.encoder_causal:
        raise ValueError("its encoder is not causal, so that the first frame has no latent of its own")
    if config.timestep_conditioning or any(config.decoder_inject_noise):
        raise ValueError("its decoder wants a timestep or noise (timestep_conditioning, decoder_inject_noise)")
    return PretrainedVaeConfig(
        class_name="AutoencoderKLLTXVideo",
        latent_channels=config.latent_channels,
        spatial_factor=model.spatial_compression_ratio,
        temporal_factor=model.temporal_compression_ratio,
        causal=True,
    )


def load_pretrained_vae(folder: Path) -> PretrainedVae:
    """The frozen VAE of a diffusers folder, in fp32.

    Raises :class:`CheckpointError` for a missing folder or weights, weights that do not fit, a class or an option that
    is not supported, or without the diffusers library.
    """
    name = _read_class(folder)
    dtype = _stored_type(folder)
    model = _read_model(folder, name)
    try:
        config = config_of(model)
    except ValueError as error:
        raise CheckpointError(f"{folder}: this {name} cannot be used: {error}") from None
    return PretrainedVae(config, model, dtype)


def read_vae(folder: Path, config: PretrainedVaeConfig) -> PretrainedVae:
    """The VAE that :meth:`PretrainedVae.save` wrote; raises :class:`CheckpointError` if it is another."""
    vae = load_pretrained_vae(folder)
    if vae.config != config:
        raise CheckpointError(
            f"{folder} holds {_facts(vae.config)}, the checkpoint's config.json says {_facts(config)}"
        )
    return vae


def _facts(config: PretrainedVaeConfig) -> str:
    factors = f"{config.temporal_factor}x{config.spatial_factor}x{config.spatial_factor}"
    return f"{config.class_name} of {config.latent_channels} channels, {factors}"


def _read_class(folder: Path) -> ClassName:
    """The class of the VAE in ``folder``; its safetensors are there."""
    found = read_config(folder, "VAE", "diffusers", ", often called 'vae'").get("_class_name")
    known = next((name for name in CLASSES if name == found), None)
    if known is None:
        raise CheckpointError(f"{folder / CONFIG}: class {found!r} is not supported; there are: {', '.join(CLASSES)}")
    check_weights(folder, (WEIGHTS,))
    return known


def _stored_type(folder: Path) -> torch.dtype:
    """Type of the weights in the file."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return next((file.get_tensor(name).dtype for name in file.offset_keys()), torch.float32)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: not a readable safetensors file ({error})") from None


def _read_model(folder: Path, name: ClassName) -> Any:
    try:
        import diffusers
    except ImportError:
        raise CheckpointError(
            f"{folder}: a pretrained VAE needs the diffusers library; install stiv-deploy[encoders]"
        ) from None
    try:
        with silenced(diffusers.utils.logging):
            model, report = getattr(diffusers, name).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,  # which would want another library, accelerate
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, TypeError, KeyError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        line = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])  # the first fault comes after a headline
        raise CheckpointError(f"{folder}: not a readable {name} ({line})") from None
    faults = [f"{what} {key}" for what in ("missing", "unexpected") for key in sorted(report[f"{what}_keys"])]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{folder / WEIGHTS} does not fit its config.json: {'; '.join(faults[:3])}{more}")
    check_finite(model.state_dict(), folder / WEIGHTS)
    return model
