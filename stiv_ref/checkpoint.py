"""Checkpoints: a folder of safetensors and JSON, one file per component, written whole or not at all.

``config.json`` (architectures, sampling defaults), ``model.safetensors``, ``text_encoder.safetensors``,
``vae.safetensors`` and ``tokenizer.json``. A pretrained text encoder or VAE is a sub-folder ``text_encoder`` or ``vae``
instead, as its own library writes it (config.json and safetensors), so that a checkpoint needs nothing outside it.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Discriminator, Field, Tag
from tokenizers import Tokenizer
from torch import Tensor, nn

from stiv_deploy.stiv_ref.bounds import LateStretch, Scale, Size, Steps, Strides, TimeShift
from stiv_deploy.stiv_ref.config import FrozenConfig, StivConfig, read_config
from stiv_deploy.stiv_ref.errors import CheckpointError, ConfigError
from stiv_deploy.stiv_ref.files import is_file, replaced_folder, sha256, told
from stiv_deploy.stiv_ref.givings import GivingName
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.pretrained.text import PretrainedTextConfig, PretrainedTextEncoder, read_text_encoder
from stiv_deploy.stiv_ref.pretrained.vae import PretrainedVae, PretrainedVaeConfig, read_vae
from stiv_deploy.stiv_ref.sampler import Solver
from stiv_deploy.stiv_ref.tasks import TaskName
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, load_tokenizer
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig
from stiv_deploy.stiv_ref.weights import check_finite, check_fit, fill, load_tensors, save_tensors

Component = TypeVar("Component", bound=nn.Module)
STATED = {("model", "cross_qk_norm"): "false", ("text", "pooling"): '"mean"'}
"""What config.json must say itself, whatever its default is now, and what was so before it could be said."""
COMPONENTS = ("config.json", "model", "text_encoder", "vae", "tokenizer.json")
"""What a checkpoint consists of: files, and components that are a safetensors file or a folder of this name."""


def _origin(value: Any) -> str:
    """Which of two configs ``value`` is for: ``pretrained`` where its ``kind`` says so; without one ``own``."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "pretrained" if kind == "pretrained" else "own"


AnyTextConfig = Annotated[
    Annotated[TextConfig, Tag("own")] | Annotated[PretrainedTextConfig, Tag("pretrained")], Discriminator(_origin)
]
AnyTextEncoder = TextEncoder | PretrainedTextEncoder
AnyVaeConfig = Annotated[
    Annotated[VaeConfig, Tag("own")] | Annotated[PretrainedVaeConfig, Tag("pretrained")], Discriminator(_origin)
]
AnyVae = Vae | PretrainedVae


class SamplingDefaults(FrozenConfig):
    """What this checkpoint was trained for, and the sampling settings that suit it best.

    ``stride`` is the frame stride of clips; ``None``, in a recipe, is the one that its last stage has most often, and,
    in a checkpoint, 1.
    """

    frames: Size = 8
    height: Size = 32
    width: Size = 32
    frames_per_second: int = Field(default=8, gt=0, le=1_000)
    stride: Size | None = None
    steps: Steps = 30
    guidance_scale: Scale = 4.0
    image_scale: Scale = 1.5
    solver: Solver = Solver.EULER
    time_shift: TimeShift = 1.0
    late_stretch: LateStretch = 1.0


class TrainedOn(FrozenConfig):
    """What a model has seen, as video, or as stills if it has no temporal attention; each without repetition.

    ``tasks`` and their ``givings``, frame ``strides``, ``sizes`` (height, width) in pixels and numbers of ``frames``.
    """

    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1, max_length=100)]
    givings: Annotated[tuple[GivingName, ...], Field(min_length=1, max_length=1_000)]
    strides: Strides
    sizes: Annotated[tuple[tuple[Size, Size], ...], Field(min_length=1, max_length=1_000)]
    frames: Strides


class CheckpointConfig(FrozenConfig):
    """Contents of ``config.json``. Checkpoints of before this was kept have no ``trained``."""

    format: Literal["stiv-checkpoint"] = "stiv-checkpoint"
    format_version: Literal[1] = 1
    model: StivConfig
    text: AnyTextConfig
    vae: AnyVaeConfig
    sampling: SamplingDefaults
    trained: TrainedOn | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointFolder:
    """A checkpoint on disk of which only the config was read, so that all else can be checked before it is loaded."""

    path: Path
    config: CheckpointConfig

    @cached_property
    def sha256(self) -> str:
        """:func:`checkpoint_hash`, computed once; :class:`CheckpointError` if a file cannot be read."""
        try:
            return checkpoint_hash(self.path)
        except OSError as error:
            reason = f"{error.filename}: cannot be read ({error.strerror}); give a whole checkpoint"
            raise CheckpointError(reason) from None

    def load(self) -> "Checkpoint":
        """Everything in fp32, in evaluation mode; :class:`CheckpointError` on any misfit."""
        return Checkpoint(
            config=self.config,
            model=_read_model(self.path, self.config.model),
            text_encoder=_read_text_encoder(self.path, self.config.text),
            vae=_read_vae(self.path, self.config.vae),
            tokenizer=load_tokenizer(self.path / "tokenizer.json"),
            folder=self,
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained STIV with everything needed to run it, and the folder that it was loaded from, if it was."""

    config: CheckpointConfig
    model: Stiv
    text_encoder: AnyTextEncoder
    vae: AnyVae
    tokenizer: Tokenizer
    folder: CheckpointFolder | None = None

    @property
    def path(self) -> Path:
        """Where it was loaded from."""
        return self._loaded.path

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) over the files that it was loaded from, computed once."""
        return self._loaded.sha256

    @property
    def _loaded(self) -> CheckpointFolder:
        assert self.folder is not None, "a checkpoint that was never on disk has neither path nor hash"
        return self.folder


def stored(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """State dict of ``module`` with floating tensors in ``dtype``, contiguous, detached."""
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in module.state_dict().items()
    }


def finite(module: nn.Module, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    """As :func:`stored`; :class:`CheckpointError` naming ``name`` if a weight is not finite, or is not in ``dtype``."""
    tensors = stored(module, dtype)
    kind = str(dtype).removeprefix("torch.")
    remedy = f"it has diverged, or is too large for {kind}: train with a lower learning_rate, or store float32"
    check_finite(tensors, f"{name} as {kind}", remedy)
    return tensors


def save_checkpoint(path: Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    """Write ``checkpoint`` to the folder ``path``, replacing it; ``dtype`` is the stored type of the weights.

    Pretrained components are stored in the type that they came in. Raises :class:`CheckpointError` for weights that are
    not finite, or not in ``dtype``, :class:`~stiv_deploy.stiv_ref.errors.OutputError` if it cannot be written.
    """
    with told(path, "free some space, or choose another place"), replaced_folder(path) as folder:
        text = json.dumps(checkpoint.config.model_dump(mode="json"), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        for name in ("model", "text_encoder", "vae"):
            _save_component(folder, name, getattr(checkpoint, name), dtype)
        (folder / "tokenizer.json").write_text(checkpoint.tokenizer.to_str(pretty=True), encoding="utf-8")


def _save_component(folder: Path, name: str, module: nn.Module, dtype: torch.dtype) -> None:
    """Write one component: a pretrained one as a folder, any other as a safetensors file in ``dtype``."""
    if isinstance(module, PretrainedTextEncoder | PretrainedVae):
        module.save(folder / name)
    else:
        save_tensors(finite(module, dtype, name), folder / f"{name}.safetensors")


def open_checkpoint(path: Path) -> CheckpointFolder:
    """A checkpoint folder with its config read and checked; raises what :func:`read_checkpoint_config` does."""
    return CheckpointFolder(path=path, config=read_checkpoint_config(path))


def read_checkpoint_config(path: Path) -> CheckpointConfig:
    """The checked ``config.json`` of a checkpoint folder; raises :class:`CheckpointError` or :class:`ConfigError`."""
    if not is_file(path / "config.json"):
        raise CheckpointError(f"{path}: no checkpoint here (config.json is missing); train one with 'stiv train'")
    config = read_config(CheckpointConfig, path / "config.json")
    _check_stated(path, config)
    if config.model.text_width != config.text.width or config.model.latent_channels != config.vae.latent_channels:
        raise CheckpointError(f"{path}: the model's text width or latent channels differ from its text encoder or VAE")
    if config.model.temporal:
        try:
            config.vae.latent_frames(config.sampling.frames)
        except ConfigError as error:
            raise CheckpointError(f"{path}: sampling.frames in config.json: {error}") from None
    return config


def _check_stated(path: Path, config: CheckpointConfig) -> None:
    """:class:`CheckpointError` where config.json leaves out what was otherwise when checkpoints did not say it."""
    for (section, key), before in STATED.items():
        if key not in getattr(config, section).model_fields_set and hasattr(getattr(config, section), key):
            raise CheckpointError(
                f"{path}: config.json does not say {section}.{key}; in checkpoints older than this key it is {before}: "
                f'add "{key}": {before} to "{section}"'
            )


def _read(module: Component, source: Path) -> Component:
    """Fill ``module``, made on the meta device, from a safetensors file: fp32, frozen, in evaluation mode."""
    tensors = load_tensors(source)
    check_fit(module, tensors, source)  # before there is memory for what the config says
    fill(module.to_empty(device="cpu"), tensors, source)
    return module.eval().requires_grad_(False)


def _read_model(path: Path, config: StivConfig) -> Stiv:
    with torch.device("meta"):
        model = Stiv(config)
    return _read(model, path / "model.safetensors")


def _read_text_encoder(path: Path, config: TextConfig | PretrainedTextConfig) -> AnyTextEncoder:
    if isinstance(config, PretrainedTextConfig):
        return read_text_encoder(path / "text_encoder", config)
    with torch.device("meta"):
        encoder = TextEncoder(config)
    return _read(encoder, path / "text_encoder.safetensors")


def _read_vae(path: Path, config: VaeConfig | PretrainedVaeConfig) -> AnyVae:
    if isinstance(config, PretrainedVaeConfig):
        return read_vae(path / "vae", config)
    with torch.device("meta"):
        vae = Vae(config)
    return _read(vae, path / "vae.safetensors")


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint folder in fp32, in evaluation mode; raise :class:`CheckpointError` on any misfit."""
    return open_checkpoint(path).load()


def load_model(path: Path) -> Stiv:
    """The transformer alone of a checkpoint folder, as :func:`load_checkpoint` gives it; raises the same."""
    return _read_model(path, read_checkpoint_config(path).model)


def load_text_encoder(path: Path) -> tuple[AnyTextEncoder, Tokenizer]:
    """The frozen text encoder of a checkpoint folder, and its tokenizer; raises :class:`CheckpointError`."""
    config = read_checkpoint_config(path)
    return _read_text_encoder(path, config.text), load_tokenizer(path / "tokenizer.json")


def load_vae(path: Path) -> AnyVae:
    """The frozen VAE of a checkpoint folder; raises :class:`CheckpointError`."""
    return _read_vae(path, read_checkpoint_config(path).vae)


def checkpoint_files(path: Path) -> list[str]:
    """Names of a checkpoint's files, relative to its folder with forward slashes, in a fixed order."""
    names: list[str] = []
    for name in COMPONENTS:
        if (path / name).is_dir():
            names += sorted(file.relative_to(path).as_posix() for file in (path / name).rglob("*") if file.is_file())
        else:
            names.append(name if name.endswith(".json") else f"{name}.safetensors")
    return names


def checkpoint_hash(path: Path) -> str:
    """SHA-256 (hex) over the lines ``<sha256> <name>`` of the checkpoint's files."""
    digest = hashlib.sha256()
    for name in checkpoint_files(path):
        digest.update(f"{sha256(path / name)} {name}\n".encode())
    return digest.hexdigest()
