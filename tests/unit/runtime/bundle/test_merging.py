"""Which initializer is which linear's weight, and what a bundle with LoRAs is."""

from pathlib import Path

import pytest

from stiv_deploy.runtime import backends
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.lora import Lora
from stiv_deploy.runtime.bundle.merging import linear_of
from stiv_deploy.runtime.errors import BackendError, LoraError
from stiv_deploy.runtime.sampling.parallel.opening import open_team


@pytest.mark.parametrize(
    ("graph", "initializer", "wanted"),
    [
        ("block_03", "spatial.qkv.weight", "blocks.3.spatial.qkv"),
        ("spatial_12", "spatial.out.weight", "blocks.12.spatial.out"),
        ("mixed_00", "ffn.up.weight", "blocks.0.ffn.up"),
        ("text_kv", "blocks.1.cross.kv.weight", "blocks.1.cross.kv"),
        ("embed", "singleton.micro.crop.inner.weight", "singleton.micro.crop.inner"),
        ("head", "head.out.weight", "head.out"),
        ("block_03", "table", None),
        ("decoder", "out.weight", None),
        ("text_encoder", "embedding.weight", None),
    ],
)
def test_linears_by_graph_and_initializer(graph: str, initializer: str, wanted: str | None) -> None:
    assert linear_of(graph, initializer) == wanted


def lora(digest: str, scale: float = 1.0) -> Lora:
    return Lora(path=Path("a"), sha256=digest, scale=scale, base=None, factors={})


def test_each_choice_of_loras_has_a_hash_of_its_own(bundle_path: Path) -> None:
    bundle = Bundle.open(bundle_path)
    one, other = lora("a" * 64), lora("b" * 64)
    choices = ([], [one], [other], [one, other], [other, one], [lora("a" * 64, 0.5)])
    assert len({bundle.with_loras(choice).hash for choice in choices}) == len(choices)
    assert bundle.with_loras([]).hash == bundle.hash
    assert bundle.with_loras([one]).with_engines([]).loras == (one,)


def test_engines_refuse_them(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(bundle_path).with_loras([lora("a" * 64)])
    monkeypatch.setattr(backends, "unavailable_reason", lambda *_: None)
    with pytest.raises(
        LoraError, match=r"engines have their weights in them, .* 'stiv export CHECKPOINT --out BUNDLE --lora FILE'"
    ):
        backends.open_backend("tensorrt-rtx", bundle)


def test_processes_refuse_them(bundle_path: Path) -> None:
    bundle = Bundle.open(bundle_path).with_loras([lora("a" * 64)])
    with pytest.raises(BackendError, match="--lora is merged in this process, --processes have weights of their own"):
        open_team(bundle, ["cpu", "cpu"], parallel="cfg2", processes=True)
