"""A bundle on the CPU against diffusers' Latte at equal size, tokens and work: eager, compiled, exported to ONNX.

    python benchmarks/peers.py BUNDLE --threads 1 --out benchmarks/results/peers-DATE.json

Latte (diffusers' ``LatteTransformer3DModel``) attends in space and time by turns too, with the same width, heads, text
and tokens; its weights are random. It gets the number of layers whose arithmetic is nearest to that of the bundle's
model, and nothing is timed unless both are within 10 % by PyTorch's own count. One evaluation is all that a model does
in a step: of the bundle ``embed``, the blocks and ``head``, whose text keys and values are there from before the first
step; of Latte a forward pass, which projects the text each time. Contestants take turns after a warm-up, in one process
with as many threads; ratios are medians over the rounds. ``per_operation`` is the ratio at exactly equal work.
"""

import json
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from arithmetic import flops, stiv_operations
from cpu_int8 import cpu, in_turns, speed_rows
from torch import Tensor, nn

from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.graphs.check import relative_error
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import ModelFacts
from stiv_deploy.runtime.sampling.denoiser import Denoiser
from stiv_deploy.runtime.sampling.text_stage import TextRow
from stiv_deploy.stiv_ref.config import StivConfig

BUNDLE = "bundle"
WAYS = ("eager", "compiled", "onnx")
"""Latte's."""
EQUAL = 0.1
"""Largest difference in arithmetic of what is compared."""
SAME = 1e-4
"""Largest relative L2 error of Latte compiled or exported, in float32, against eager."""
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an evaluation works on: ``rows`` of ``frames`` of tokens, ``side`` latents square, and ``text`` tokens."""

    rows: int
    frames: int
    side: int
    text: int


def config_of(facts: ModelFacts) -> StivConfig:
    """The reference's config of a bundle's model."""
    shared = StivConfig.model_fields.keys() & ModelFacts.model_fields.keys()
    return StivConfig(**{name: getattr(facts, name) for name in shared})


def latte(facts: ModelFacts, work: Work, layers: int) -> nn.Module:
    """Latte with the width, heads, patch, text and tokens of the bundle's model; weights are drawn from seed 0."""
    from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel

    torch.manual_seed(0)
    return LatteTransformer3DModel(
        num_attention_heads=facts.heads,
        attention_head_dim=facts.width // facts.heads,
        in_channels=facts.latent_channels,
        out_channels=facts.latent_channels,
        num_layers=layers,
        cross_attention_dim=facts.width,
        attention_bias=True,
        sample_size=work.side,
        patch_size=facts.patch[1],
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=facts.text_width,
        video_length=work.frames,
    ).eval()


def latte_inputs(facts: ModelFacts, work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [rows, C, T, h, w], timestep int64 [rows], text states [rows, L, Dt]."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(work.rows, facts.latent_channels, work.frames, work.side, work.side, generator=generator)
    text = torch.randn(work.rows, work.text, facts.text_width, generator=generator)
    return latents, torch.full((work.rows,), 500), text


class Peer(nn.Module):
    """Latte with tensors in and one tensor out, as ``torch.onnx.export`` wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The prediction [rows, C, T, h, w]."""
        return self.model(latents, timestep, encoder_hidden_states=text, return_dict=False)[0]


def latte_operations(facts: ModelFacts, work: Work, layers: int) -> int:
    """Floating-point operations of one evaluation of Latte; nothing is computed."""
    peer = Peer(latte(facts, work, layers)).to("meta")
    inputs = [tensor.to("meta") for tensor in latte_inputs(facts, work)]
    return flops(lambda: peer(*inputs))


def equal_layers(facts: ModelFacts, work: Work, wanted: int) -> int:
    """How many of Latte's layers, a spatial and a temporal block each, come nearest to ``wanted`` operations."""
    one, two = (latte_operations(facts, work, layers) for layers in (1, 2))
    return max(1, round(1 + (wanted - one) / (two - one)))


def check_equal(ours: int, theirs: int) -> None:
    """Raise :class:`ExportError` if both differ by more than :data:`EQUAL`: their times would say nothing."""
    if abs(theirs / ours - 1) > EQUAL:
        raise ExportError(
            f"not equal work: {theirs / 1e9:.3g} GFLOP of Latte against {ours / 1e9:.3g} of the bundle's model; "
            "give a bundle with more blocks, of which Latte's layers are a finer measure"
        )


def bundle_call(backend: OnnxRuntimeBackend, bundle: Bundle, dims: Mapping[str, int]) -> Call:
    """One evaluation of the bundle's model over random rows."""
    denoiser = Denoiser(backend, bundle.manifest, dict(dims))
    draws, facts = np.random.default_rng(0), bundle.manifest.model

    def drawn(*shape: int) -> np.ndarray:
        return draws.standard_normal(shape, np.float32)

    keys = (facts.blocks, facts.heads, dims["text_tokens"], facts.width // facts.heads)
    parts = (drawn(facts.text_width), np.zeros((1, 1, dims["text_tokens"]), np.float32), drawn(*keys), drawn(*keys))
    text = TextRow(*map(backend.upload, parts))
    for row in range(dims["model_batch"]):
        denoiser.set_row(row, text, np.ones(6, np.float32))
    backend.write(denoiser.model_input, drawn(*denoiser.model_input.shape))
    backend.write(denoiser.timed["timestep"], np.full(dims["model_batch"], 0.5, np.float32))
    calls = list(denoiser.calls(dims["model_batch"]).values())
    return lambda: [call() for call in calls]


def onnx_call(peer: nn.Module, inputs: tuple[Tensor, ...], folder: Path, threads: int) -> Call:
    """Latte as ``torch.onnx.export`` writes it with its own defaults, in ONNX Runtime."""
    import onnxruntime as ort

    path = folder / "latte.onnx"
    torch.onnx.export(peer, inputs, path, dynamo=True, verbose=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {each.name: tensor.numpy() for each, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, feeds)[0]


def peer_calls(
    peer: nn.Module, inputs: tuple[Tensor, ...], ways: tuple[str, ...], folder: Path, threads: int
) -> dict[str, Call]:
    """Latte's ways to run, by name; raise :class:`ExportError` for one that computes something else than eager."""
    makers: dict[str, Callable[[], Call]] = {
        "eager": lambda: lambda: peer(*inputs),
        "compiled": lambda: _called(torch.compile(peer), inputs),
        "onnx": lambda: onnx_call(peer, inputs, folder, threads),
    }
    right, calls = peer(*inputs).numpy(), {f"latte {way}": makers[way]() for way in ways}
    for name, call in calls.items():
        error = relative_error(np.asarray(call()), right)
        if not error <= SAME:
            raise ExportError(f"{name} is wrong: relative L2 error {error:.2g} against eager, wanted {SAME:g} or less")
    return calls


def _called(model: Any, inputs: tuple[Tensor, ...]) -> Call:
    return lambda: model(*inputs)


def measure(bundle: Bundle, ways: tuple[str, ...], threads: int, repeats: int) -> dict[str, Any]:
    """Work and times of the bundle and of Latte at the typical size of the bundle's first bucket."""
    facts = bundle.manifest.model
    dims = bundle.manifest.buckets[0].dims(facts, "typical")
    side, rows = dims["latent_height"], dims["model_batch"]
    work = Work(rows=rows, frames=dims["token_frames"], side=side, text=dims["text_tokens"])
    ours = (
        rows * stiv_operations(config_of(facts), (dims["frames"], facts.latent_channels, side, side), work.text).total
    )
    layers = equal_layers(facts, work, ours)
    theirs = latte_operations(facts, work, layers)
    check_equal(ours, theirs)
    peer, inputs = Peer(latte(facts, work, layers)).eval(), latte_inputs(facts, work)
    with ExitStack() as stack:
        backend = stack.enter_context(OnnxRuntimeBackend(bundle, threads=threads))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        calls = {BUNDLE: bundle_call(backend, bundle, dims), **peer_calls(peer, inputs, ways, folder, threads)}
        rows_of = speed_rows(in_turns(calls, repeats), BUNDLE)
    return {
        "size": {**vars(work), "blocks": facts.blocks, "latte_layers": layers, "width": facts.width},
        "gflop": {BUNDLE: ours / 1e9, "latte": theirs / 1e9},
        "rows": {name: with_ratio(row, 1 if name == BUNDLE else theirs / ours) for name, row in rows_of.items()},
    }


def with_ratio(row: dict[str, float], work: float) -> dict[str, float]:
    """``row`` by the bundle's, as it is and per operation, where ``work`` is how much more arithmetic it has."""
    ratio = 1 / row["speedup"]
    return {"milliseconds": row["milliseconds"], "ratio": round(ratio, 3), "per_operation": round(ratio / work, 3)}


def chosen_ways(text: str) -> tuple[str, ...]:
    """Latte's ways that are asked for; :class:`typer.BadParameter` for others."""
    ways = tuple(each.strip() for each in text.split(",") if each.strip())
    if not ways or not set(ways) <= set(WAYS):
        raise typer.BadParameter(f"{text!r}: give some of {','.join(WAYS)}")
    return ways


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, in float32 without 8 bits.")],
    ways: Annotated[str, typer.Option(help="How Latte runs, with commas.")] = ",".join(WAYS),
    threads: Annotated[int, typer.Option(min=1, help="Threads of each.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
) -> None:
    """Time one evaluation of BUNDLE's model and of Latte, print it, and write it as JSON."""
    opened, asked = Bundle.open(bundle), chosen_ways(ways)
    if opened.manifest.precision != "float32" or opened.manifest.quantization is not None:
        raise ExportError(
            f"{bundle}: is not in float32, and Latte is; give a bundle of 'stiv export' without --precision"
        )
    torch.set_num_threads(threads)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python {shlex.join(sys.argv)}",
        "cpu": cpu(),
        "threads": threads,
        "repeats": repeats,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "onnxruntime", "onnx")},
        },
        "bundle": opened.hash,
        **measure(opened, asked, threads, repeats),
    }
    typer.echo(json.dumps(result, indent=2))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from command import run

    run(main)
