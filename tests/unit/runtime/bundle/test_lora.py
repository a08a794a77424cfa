"""LoRA files: what they say, what is refused in one line, and what they add."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stiv_deploy.runtime.bundle.lora import check_lora, linears_of, merged, parse_lora, read_lora, read_loras
from stiv_deploy.runtime.errors import LoraError
from stiv_deploy.stiv_ref.lora import LoraSettings, save_lora

LINEARS = {"blocks.0.ffn.up": (6, 5), "patch": (5, 3)}
BASE = "b" * 64


def factors(rank: int = 2, name: str = "blocks.0.ffn.up") -> dict[str, torch.Tensor]:
    generator, (out, inner) = torch.Generator().manual_seed(0), LINEARS.get(name, (4, 4))
    return {
        f"transformer.{name}.lora_A.weight": torch.randn(rank, inner, generator=generator),
        f"transformer.{name}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def written(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any] | None = None) -> Path:
    path = folder / "lora.safetensors"
    save_file(tensors, path, None if settings is None else {"lora_adapter_metadata": json.dumps(settings)})
    return path


def test_what_the_trainer_writes_is_read(tmp_path: Path) -> None:
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in factors().items()}
    path = tmp_path / "lora.safetensors"
    save_lora(path, tensors, LoraSettings(rank=2, alpha=5.0), BASE)
    lora = read_lora(path, 0.5)
    assert (lora.base, lora.scale, linears_of([lora])) == (BASE, 0.5, ["blocks.0.ffn.up"])
    check_lora(lora, LINEARS, BASE)
    found = lora.factors["blocks.0.ffn.up"]
    assert (found.shape, found.alpha) == ((6, 5), 5.0)
    assert np.array_equal(found.down, tensors["blocks.0.ffn.up.lora_A.weight"].numpy())


@pytest.mark.parametrize(
    ("alpha", "settings", "wanted"),
    [
        (None, None, 2.0),
        (None, {"transformer.lora_alpha": 8}, 8.0),
        (torch.tensor(4.0), {"transformer.lora_alpha": 8}, 4.0),
    ],
)
def test_alpha_is_a_tensor_a_setting_or_the_rank(
    tmp_path: Path, alpha: torch.Tensor | None, settings: dict[str, Any] | None, wanted: float
) -> None:
    more = {} if alpha is None else {"transformer.blocks.0.ffn.up.alpha": alpha}
    path = written(tmp_path, {**factors(), **more}, settings)
    assert read_lora(path).factors["blocks.0.ffn.up"].alpha == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_several_are_added(tmp_path: Path, dtype: torch.dtype) -> None:
    """Against the formula in float64; float32 rounds products of two terms and two sums."""
    tensors = {name: tensor.to(dtype) for name, tensor in factors().items()}
    path = written(tmp_path, tensors, {"transformer.lora_alpha": 3.0})
    weight = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    loras = read_loras([f"{path}", f"{path}:-0.25"])
    down, up = (tensor.double().numpy() for tensor in tensors.values())
    wanted = weight + 0.75 * 3 / 2 * up @ down
    bound = 8 * 2**-24 * (np.abs(weight) + 1.25 * 3 / 2 * np.abs(up) @ np.abs(down))
    assert (np.abs(merged(weight, "blocks.0.ffn.up", loras) - wanted) <= bound).all()
    assert np.array_equal(merged(weight, "patch", loras), weight)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("c:a:-2", ("c:a", -2.0)),
        ("c:a.safetensors", ("c:a.safetensors", 1.0)),
    ],
)
def test_file_and_scale(text: str, wanted: tuple[str, float]) -> None:
    assert parse_lora(text) == (Path(wanted[0]), wanted[1])


@pytest.mark.parametrize("scale", ["nan", "inf", "101"])
def test_scales_that_are_none(scale: str) -> None:
    with pytest.raises(LoraError, match="the scale is .*; give one between -100 and 100"):
        parse_lora(f"a:{scale}")


UP, DOWN = (f"transformer.blocks.0.ffn.up.lora_{part}.weight" for part in "BA")


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({"blocks.0.ffn.up.lora_A.weight": torch.ones(2, 5)}, None, "unknown keys blocks.0.ffn.up.lora_A.weight; want"),
        ({"transformer.blocks.0.ffn.up.diff": torch.ones(2)}, None, "unknown keys transformer.blocks.0.ffn.up.diff"),
        ({"transformer.patch.lora_A.weight": torch.ones(2, 3)}, None, "transformer.patch has not both factors"),
        ({"transformer.patch.alpha": torch.ones(())}, None, "transformer.patch has not both factors"),
        (
            {DOWN: torch.ones(3, 5)},
            None,
            r"has lora_A \[3, 5\] and lora_B \[6, 2\]; want \[rank, in\] and \[out, rank\]",
        ),
        ({DOWN: torch.ones(2, 5, 1)}, None, r"has lora_A \[2, 5, 1\]"),
        ({DOWN: torch.ones(0, 5), UP: torch.ones(6, 0)}, None, r"has lora_A \[0, 5\]"),
        ({UP: torch.full((6, 2), torch.inf)}, None, "NaN or infinity in .*lora_B.weight; it has diverged"),
        ({UP: torch.ones(6, 2, dtype=torch.int64)}, None, "lora_B.weight is of type I64, weights are of"),
        (
            {"transformer.blocks.0.ffn.up.alpha": torch.ones(2)},
            None,
            "alpha of blocks.0.ffn.up is None; want one number",
        ),
        ({}, {"transformer.lora_alpha": "much"}, "alpha of blocks.0.ffn.up is 'much'; want one number"),
        ({}, {"transformer.use_dora": True}, "it uses use_dora, which cannot be merged here"),
        ({}, {"stiv.base": 5}, "has no hash under stiv.base"),
    ],
)
def test_files_that_are_none(
    tmp_path: Path, changes: dict[str, torch.Tensor], settings: dict[str, Any] | None, said: str
) -> None:
    with pytest.raises(LoraError, match=said) as caught:
        read_lora(written(tmp_path, {**factors(), **changes}, settings))
    assert "\n" not in str(caught.value)


def fault_of(path: Path) -> str:
    try:
        read_lora(path)
    except LoraError as error:
        return str(error)
    return ""


def test_damaged_files(tmp_path: Path) -> None:
    """Cut anywhere, or with another byte anywhere in the header: one line, or a file that says something else."""
    content = written(tmp_path, factors(), {"stiv.base": BASE}).read_bytes()
    path = tmp_path / "damaged.safetensors"
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        with pytest.raises(LoraError, match="not a readable safetensors file"):
            read_lora(path)
    for place in range(0, int.from_bytes(content[:8], "little") + 8):
        path.write_bytes(content[:place] + b"9" + content[place + 1 :])
        assert "\n" not in fault_of(path)
    with pytest.raises(LoraError, match=r"absent: cannot be read \(No such file or directory\); name a LoRA file"):
        read_lora(tmp_path / "absent")
    save_file({}, path)
    with pytest.raises(LoraError, match="no LoRA in it"):
        read_lora(path)


@pytest.mark.parametrize(
    ("name", "base", "said"),
    [
        ("blocks.0.ffn.up", "c" * 64, "trained for the checkpoint cccccccccccc, this one is bbbbbbbbbbbb"),
        ("blocks.9.ffn.up", BASE, "the model has no linears blocks.9.ffn.up; name a LoRA of this model"),
    ],
)
def test_loras_of_others(tmp_path: Path, name: str, base: str, said: str) -> None:
    lora = read_lora(written(tmp_path, factors(name=name), {"stiv.base": base}))
    with pytest.raises(LoraError, match=said):
        check_lora(lora, LINEARS, BASE)


def test_a_lora_of_another_width(tmp_path: Path) -> None:
    lora = read_lora(written(tmp_path, factors()))
    with pytest.raises(LoraError, match=r"blocks.0.ffn.up is \[6, 5\], this model's is \[6, 7\] \(out, in\)"):
        check_lora(lora, {"blocks.0.ffn.up": (6, 7)}, BASE)
