"""How much memory does training the large models take per GPU? A plan, made without a GPU.

    python benchmarks/training_memory.py --out benchmarks/results/training-memory-DATE

The trainer's own code (its blocks, activation checkpoints and FSDP2 sharding) runs one step, forward and backward, on
fake tensors and a fake process group, and every byte alive is counted: sharded weights with their padding, gathered
blocks, activations, gradients. Optimizer states are those that the trainer's optimizers make. Types and saved tensors
are those of CUDA: bf16 autocast, flash attention, fused RMS norm. Not counted: allocator fragments, communication
buffers and the CUDA context, for which RESERVE and SLACK are set aside; frozen text encoder and VAE, whose outputs are
taken to be pre-computed.
"""

import json
import logging
import multiprocessing
import platform
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from in_turn import InTurn
from live_bytes import LiveBytes, Saved, gpu_kernels, storage_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from stiv_deploy.stiv_ref.config import StivConfig, model_config
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.objective import Draws, kept_tokens, training_loss
from stiv_deploy.stiv_ref.recipe import Efficiency, Optimizer, Stage
from stiv_deploy.stiv_ref.text import TextStates
from stiv_deploy.stiv_ref.training.efficiency import make_efficient
from stiv_deploy.stiv_ref.training.optimizer import make_optimizer
from stiv_deploy.stiv_ref.training.parallel import Team, shard

GIB = 2**30
WORLDS = (8, 64, 256)
ACTIVATION_WORLD = 8
"""Number of GPUs of the simulated steps; what is alive beside the shards is the same with more of them."""
FEW_BLOCKS = (3, 6)
FULL_BLOCKS = 2
TEXT_TOKENS = 77
GPUS = {"80 GB": 80e9, "141 GB": 141e9}
RESERVE, SLACK = 3 * GIB, 1.05
"""Set aside on a GPU: bytes for the CUDA context and communication, and the share that allocators waste."""


Checkpointing = Literal[False, "blocks", "attention"]
WORDS: dict[Checkpointing, str] = {
    False: "",
    "blocks": ", checkpointing of blocks",
    "attention": ", of all but self-attention",
}


@dataclass(frozen=True)
class Variant:
    """A way to train: masked or not, and what is computed again in the backward pass."""

    masked: bool
    checkpointing: Checkpointing

    @property
    def name(self) -> str:
        """In words."""
        return ("MaskDiT" if self.masked else "all tokens") + WORDS[self.checkpointing]


VARIANTS = [Variant(masked, checkpointing) for masked in (False, True) for checkpointing in WORDS]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Bytes of one simulated step beside sharded weights, optimizer and averages.

    ``peak`` of all, with gradients; ``kept`` for the backward pass when it begins; ``gradients`` sharded, at the end.
    """

    peak: int
    kept: int
    gradients: int


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Bytes of a GPU's share: weights with padding, moments of AdamW and of Adafactor, averages."""

    weights: int
    adamw: int
    adafactor: int
    averages: int


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that ``tensors`` lie in, padding included; of sharded ones the local share."""
    storages = [storage_of(tensor) for tensor in tensors]
    return sum({each._cdata: each.nbytes() for each in storages}.values())


@contextmanager
def fake_team(world: int) -> Iterator[Team]:
    """Rank 0 of ``world`` processes that do not exist, on fake tensors: nothing is sent, no memory is taken."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        device = torch.device("cpu")
        mesh = init_device_mesh("cpu", (world,)) if world > 1 else None
        with FakeTensorMode():
            yield Team(rank=0, world=world, device=device, mesh=mesh)
    finally:
        dist.destroy_process_group()


def masked_config(config: StivConfig, masked: bool) -> StivConfig:
    """``config``, for MaskDiT with its two extra blocks that see all tokens."""
    return config.model_copy(
        update={"blocks": config.blocks + FULL_BLOCKS, "full_blocks": FULL_BLOCKS} if masked else {}
    )


def sharded_model(config: StivConfig, team: Team, checkpointing: Checkpointing) -> Stiv:
    """The model as the trainer places it."""
    make_efficient(model := Stiv(config), Efficiency(activation_checkpointing=checkpointing))
    shard(model, team, "bfloat16")
    return model


def loss_of(model: Stiv, batch: int, frames: int, size: int, masked: bool) -> Tensor:
    """The trainer's loss on ``batch`` clips of latents that a VAE with 8 pixels a latent gives."""
    config = model.config
    latents = torch.zeros(batch, frames, config.latent_channels, size // 8, size // 8)
    _, rows, columns = model.token_grid(tuple(latents.shape))
    tokens = rows * columns
    text = TextStates(
        torch.zeros(batch, TEXT_TOKENS, config.text_width),
        torch.ones(batch, TEXT_TOKENS, dtype=torch.int64),
        torch.zeros(batch, config.text_width),
    )
    draws = Draws(
        timestep=torch.zeros(batch),
        noise=torch.zeros_like(latents),
        given=torch.zeros(batch, frames, dtype=torch.bool),
        zeroed=torch.zeros(batch, frames, dtype=torch.bool),
        drop_text=torch.zeros(batch, dtype=torch.bool),
        keep=torch.zeros(batch, kept_tokens(tokens, 0.5), dtype=torch.int64) if masked else None,
    )
    return training_loss(model, latents, text, torch.zeros(batch, 6), draws).mean()


def simulate(config: StivConfig, variant: Variant, world: int, batch: int, frames: int, size: int) -> Step:
    """One step of one of ``world`` GPUs with micro-batches of ``batch``."""
    with fake_team(world) as team:
        model = sharded_model(masked_config(config, variant.masked), team, variant.checkpointing)
        with LiveBytes(model.parameters()) as live, gpu_kernels(torch.bfloat16):
            loss = loss_of(model, batch, frames, size, variant.masked)
            kept = live.now
            loss.backward()
        gradients = bytes_of(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
        return Step(peak=live.peak, kept=kept, gradients=gradients)


def extrapolate(config: StivConfig, variant: Variant, world: int, batch: int, frames: int, size: int) -> Step:
    """:func:`simulate`, without checkpointing from two models of few blocks, to save time.

    There the peak is where the backward pass begins and every block adds the same; with checkpointing it moves.
    """
    if variant.checkpointing:
        return simulate(config, variant, world, batch, frames, size)
    few, more = (
        asdict(simulate(config.model_copy(update={"blocks": blocks}), variant, world, batch, frames, size))
        for blocks in FEW_BLOCKS
    )
    ratio = (config.blocks - FEW_BLOCKS[0]) / (FEW_BLOCKS[1] - FEW_BLOCKS[0])
    return Step(**{key: round(value + ratio * (more[key] - value)) for key, value in few.items()})


def block_saves(config: StivConfig, batch: int, frames: int, size: int) -> int:
    """Bytes that one block saves for its backward pass, by autograd's hooks: what models of two and one differ by."""
    saved = []
    with FakeTensorMode():
        for blocks in (1, 2):
            torch.set_default_dtype(torch.bfloat16)  # weights as they are gathered: no copies of them are saved
            try:
                model = Stiv(config.model_copy(update={"blocks": blocks}))
            finally:
                torch.set_default_dtype(torch.float32)
            with gpu_kernels(torch.bfloat16), Saved(model) as hooks:
                loss = loss_of(model, batch, frames, size, masked=False)
                saved.append(hooks.bytes)
            del loss
    return saved[1] - saved[0]


def moment_bytes(optimizer: str, parameters: dict[str, nn.Parameter]) -> int:
    """Bytes of the moments that ``optimizer`` makes for ``parameters``, of sharded ones the local share."""
    stage = Stage(task="t2v", steps=1, batch=1, frames=2, learning_rate=1e-4)
    settings = Optimizer.model_validate({"name": optimizer})
    state = make_optimizer(settings, stage, parameters).state
    return bytes_of([each for moments in state.values() for each in moments.values() if each.dim()])


def share(config: StivConfig, world: int) -> Shards:
    """What each of ``world`` GPUs holds all the time."""
    with fake_team(world) as team:
        parameters = dict(sharded_model(config, team, False).named_parameters())
        weights = bytes_of(list(parameters.values()))
        adamw, adafactor = (moment_bytes(name, parameters) for name in ("adamw", "adafactor"))
        averages = bytes_of([parameter.detach().clone() for parameter in parameters.values()])
    return Shards(weights=weights, adamw=adamw, adafactor=adafactor, averages=averages)


def total(shards: Shards, step: Step, *, simulated: Shards, optimizer: str = "adamw", averages: bool = True) -> float:
    """Bytes per GPU: shards, and the step's peak with the gradients of this share instead of the simulated one."""
    peak = step.peak - simulated.weights + shards.weights  # gradients are sharded as the weights are
    return shards.weights + getattr(shards, optimizer) + averages * shards.averages + peak


def fits(needed: float, gpu: float) -> bool:
    """Whether ``needed`` bytes of tensors go on a GPU of ``gpu`` bytes."""
    return needed * SLACK + RESERVE <= gpu


def plan(config: StivConfig, batch: int, frames: int, sizes: list[int], pool: Executor) -> dict[str, Any]:
    """Shards by number of GPUs, and steps by size and variant, of one model; ``pool`` does the work."""
    worlds = sorted({*WORLDS, ACTIVATION_WORLD})
    coming = {
        size: {
            each.name: pool.submit(extrapolate, config, each, ACTIVATION_WORLD, batch, frames, size)
            for each in VARIANTS
        }
        for size in sizes
    }
    saves = {size: pool.submit(block_saves, config, batch, frames, size) for size in sizes}
    shares = {world: pool.submit(share, config, world) for world in worlds}
    shards = {world: each.result() for world, each in shares.items()}
    steps = {size: {name: each.result() for name, each in row.items()} for size, row in coming.items()}
    totals = {
        size: {
            name: {world: total(shards[world], step, simulated=shards[ACTIVATION_WORLD]) for world in WORLDS}
            for name, step in by_variant.items()
        }
        for size, by_variant in steps.items()
    }
    return {
        "parameters": parameter_count(config),
        "shards": {world: asdict(shards[world]) for world in WORLDS},
        "block_saves": {size: each.result() for size, each in saves.items()},
        "steps": {size: {name: asdict(step) for name, step in each.items()} for size, each in steps.items()},
        "totals": totals,
    }


def _quiet() -> None:
    """FSDP warns of views that nobody writes to."""
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def parameter_count(config: StivConfig) -> int:
    """Parameters of the whole model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Stiv(config).parameters())


def gib(number: float) -> str:
    """``number`` bytes as GiB with at most three digits."""
    value = number / GIB
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def shard_table(models: dict[str, Any]) -> str:
    """What each GPU holds all the time, as Markdown."""
    lines = [
        "| model | parameters | GPUs | weights fp32 | gradients fp32 | AdamW | Adafactor | EMA fp32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in models.items():
        for world, shards in row["shards"].items():
            cells = [
                name,
                f"{row['parameters'] / 1e9:.2f} B",
                str(world),
                gib(shards["weights"]),
                gib(shards["weights"]),
            ]
            cells += [gib(shards[key]) for key in ("adamw", "adafactor", "averages")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def step_table(models: dict[str, Any]) -> str:
    """Steps and totals, as Markdown: the total in bold on 141 GB only, struck out where not even that is enough."""
    heads = "".join(f" {world} GPUs |" for world in WORLDS)
    lines = [
        f"| model | size | training | one block saves | kept for backward | peak of the step |{heads}",
        "|---|---|---|---|---|---|" + "---|" * len(WORLDS),
    ]
    for name, row in models.items():
        for size, by_variant in row["steps"].items():
            for variant, step in by_variant.items():
                totals = [_total_cell(row["totals"][size][variant][world]) for world in row["shards"]]
                saves = gib(row["block_saves"][size])
                cells = [name, f"{size} px", variant, saves, gib(step["kept"]), gib(step["peak"]), *totals]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _total_cell(needed: float) -> str:
    text, (small, large) = gib(needed), GPUS.values()
    return text if fits(needed, small) else f"**{text}**" if fits(needed, large) else f"~~{text}~~"


def report(result: dict[str, Any]) -> str:
    """The whole result as a Markdown page."""
    return f"""# Memory of training per GPU: a plan ({result["date"]})

Made by `{result["command"]}` with torch {result["versions"]["torch"]}, in {result["seconds"]:.0f} s on a CPU, without
a GPU: one step of the trainer's own code under FSDP2 (`fully_shard`) on fake tensors and a fake process group, every
byte alive counted. Micro-batch {result["batch"]} per GPU, {result["frames"]} frames, latents of 8 pixels, patch
(1, 2, 2), {TEXT_TOKENS} text tokens. All numbers are GiB per GPU.

## Always there

{shard_table(result["models"])}

Weights, gradients and averages are fp32 shards, padding included. Blocks are gathered in bf16 when they are used, which
is in the peaks below. Adafactor has the paper's first moment, as large as the weights. `ema_device = "cpu"` takes the
averages off the GPU.

## One step, and all together with AdamW and EMA on the GPU

{step_table(result["models"])}

Plain totals fit {list(GPUS)[0]}, **bold ones** {list(GPUS)[1]} only, ~~struck-out ones~~ neither; a GPU must hold
{SLACK} times the total (allocator) and {RESERVE // GIB} GiB (CUDA context, communication). "Kept for backward" is what
is alive between forward and backward pass; "one block saves" is autograd's own count for a block with all tokens and
without checkpointing. "Peak of the step" is all but the shards of weights, optimizer and EMA: activations, gathered
blocks, gradients on {ACTIVATION_WORLD} GPUs. Frozen encoders are not on the GPU: latents and text states pre-computed.
MaskDiT has {FULL_BLOCKS} more blocks, which see all tokens, and half the spatial tokens in all others.

Without checkpointing the steps of {FEW_BLOCKS[0]} and {FEW_BLOCKS[1]} blocks were simulated and continued to the whole
depth, with it the whole depth was.

Assumed of the GPU: CUDA autocast's lists of bf16 and fp32 operators (fp32 norms and residuals), attention kernels that
save q, k, v, output and one number per row (flash), the fused RMS norm, no `torch.compile` (which would save less).
"""


def main(
    out: Annotated[Path | None, typer.Option(help="Write NAME.json and NAME.md here.", metavar="NAME")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Configs; repeatable.", show_default="XL, XXL and M")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Clips that a GPU trains on at a time.")] = 1,
    frames: Annotated[int, typer.Option(min=2, help="Frames of a clip.")] = 20,
    size: Annotated[list[int] | None, typer.Option(help="Pixels; repeatable.", show_default="256 and 512")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that simulate.")] = 1,
) -> None:
    """Plan the memory of training and say what fits where."""
    _quiet()
    started = time.perf_counter()
    models, sizes = model or ["XL", "XXL", "M"], size or [256, 512]
    repeated = [("--model", each) for each in models] + [("--size", str(each)) for each in sizes]
    options = " ".join(f"{key} {value}" for key, value in repeated)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/training_memory.py --micro-batch {micro_batch} --frames {frames} {options}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "batch": micro_batch,
        "frames": frames,
        "models": {},
    }
    with InTurn() if jobs == 1 else ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _quiet) as pool:
        for name in models:
            typer.echo(f"{time.perf_counter() - started:.0f} s: {name}", err=True)
            result["models"][name] = plan(model_config(name), micro_batch, frames, sizes, pool)
            result["seconds"] = round(time.perf_counter() - started, 1)
            if out is not None:  # after every model: large ones take minutes
                out.with_name(out.name + ".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                out.with_name(out.name + ".md").write_text(report(result), encoding="utf-8")
    typer.echo(report(result))


if __name__ == "__main__":
    from command import run

    run(main)
