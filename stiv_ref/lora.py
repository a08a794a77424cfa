"""LoRA: low-rank changes of a frozen transformer's linears, trained, and written in the layout of PEFT and diffusers.

A linear with the weight W [out, in] computes W x + alpha / r * B (A x), where A is [r, in] and B [out, r]
(Hu et al., arXiv 2106.09685, section 4.1). A starts random and B at zero, so that training begins at the base model.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stiv_deploy.stiv_ref.bounds import Name
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.files import replaced_file, told
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.weights import save_tensors

DOWN, UP = "lora_A.weight", "lora_B.weight"
PREFIX = "transformer."
METADATA, BASE = "lora_adapter_metadata", "stiv.base"
"""The one key of a file's metadata (safetensors has no order of several): settings as JSON, as diffusers reads them.
Among them, under a name that diffusers passes over, is the hash of the checkpoint that the file is for."""
RANK_LIMIT = 1_024


class LoraSettings(FrozenConfig):
    """``[lora]`` of a recipe: its ``rank``, ``alpha`` (by default the rank, so that B A counts once), and its targets.

    ``targets`` are linears by name, or by the end of it, as ``target_modules`` in PEFT (``spatial.qkv`` is that of all
    blocks); by default all linears of the blocks.
    """

    rank: int = Field(default=8, ge=1, le=RANK_LIMIT)
    alpha: float | None = Field(default=None, gt=0, le=1e6)
    targets: tuple[Name, ...] | None = Field(default=None, min_length=1, max_length=1_000)

    @property
    def factor(self) -> float:
        """What B A is multiplied with."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


class LoraLinear(nn.Linear):
    """A linear whose own parameters are frozen, with factors ``lora_A`` and ``lora_B`` that are not."""

    def __init__(self, base: nn.Linear, settings: LoraSettings) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        linear = partial(nn.Linear, bias=False, device=base.weight.device, dtype=base.weight.dtype)
        self.lora_A = linear(base.in_features, settings.rank)
        self.lora_B = linear(settings.rank, base.out_features)
        self.factor = settings.factor

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` [..., in] to [..., out]."""
        change: Tensor = self.lora_B(self.lora_A(input))
        return F.linear(input, self.weight, self.bias) + self.factor * change

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """A uniform within 1 / sqrt(in), as PEFT has it; B zero."""
        bound = self.in_features**-0.5
        self.lora_A.weight.uniform_(-bound, bound, generator=generator)
        self.lora_B.weight.zero_()


def target_names(model: Stiv, settings: LoraSettings) -> list[str]:
    """Names of the linears of ``model`` that ``settings`` mean; :class:`ConfigError` for a target that is none."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if settings.targets is None:
        return [name for name in linears if name.startswith("blocks.")]

    def meant(target: str) -> list[str]:
        return [name for name in linears if f".{name}".endswith(f".{target}")]

    if unknown := [target for target in settings.targets if not meant(target)]:
        raise ConfigError(
            f"lora.targets: the model has no linear {unknown[0]!r}; name linears such as spatial.qkv, cross.q, ffn.up"
        )
    wanted = {name for target in settings.targets for name in meant(target)}
    return [name for name in linears if name in wanted]


def attach(model: Stiv, settings: LoraSettings, generator: torch.Generator | None = None) -> Stiv:
    """Freeze ``model`` and give its targets factors, initialized if there is a ``generator``; raises as above."""
    names = target_names(model, settings)
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        adapted = LoraLinear(linear, settings)
        if generator is not None:
            adapted.initialize(generator)
        setattr(model.get_submodule(parent), child, adapted)
    return model


def is_factor(name: str) -> bool:
    """Whether the parameter ``name`` is one of a LoRA."""
    return name.endswith((f".{DOWN}", f".{UP}"))


@torch.no_grad()
def merged(base: Mapping[str, Tensor], factors: Mapping[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """Weights of a model whose frozen ones are ``base`` and whose ``factors`` are trained, as one without LoRA."""
    weights = dict(base)
    for down in (name for name in factors if name.endswith(f".{DOWN}")):
        linear = down.removesuffix(f".{DOWN}")
        change = settings.factor * (factors[f"{linear}.{UP}"] @ factors[down])
        weights[f"{linear}.weight"] = weights[f"{linear}.weight"] + change
    return weights


def save_lora(path: Path, factors: Mapping[str, Tensor], settings: LoraSettings, base: str) -> None:
    """Write ``factors``, by their names in the model, for the checkpoint with the hash ``base``.

    The layout is that of PEFT and diffusers: ``transformer.<linear>.lora_A.weight`` [r, in], ``.lora_B.weight``
    [out, r], alpha in the metadata. Raises :class:`~stiv_deploy.stiv_ref.errors.OutputError`.
    """
    linears = [name.removesuffix(f".{DOWN}") for name in factors if name.endswith(f".{DOWN}")]
    tensors = {f"{PREFIX}{name}": value.contiguous() for name, value in factors.items()}
    with told(path, "free some space, or choose another place"), replaced_file(path) as temporary:
        save_tensors(tensors, temporary, _metadata(settings, linears, base))


def _metadata(settings: LoraSettings, linears: Sequence[str], base: str) -> dict[str, str]:
    own = {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.factor * settings.rank,
        "target_modules": list(linears),
    }
    return {METADATA: json.dumps({BASE: base} | {f"{PREFIX}{key}": value for key, value in own.items()})}
