"""The processes of a training run: who they are, what each of them does, how parameters are sharded over them.

One process needs nothing. ``torchrun --nproc-per-node N --no-python stiv train RECIPE`` starts N of them; parameters,
gradients, optimizer moments and averages are then sharded over all by FSDP2 (``torch.distributed.fsdp.fully_shard``),
over NCCL on GPUs and Gloo on CPUs.
"""

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from stiv_deploy.stiv_ref.block import StivBlock
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.model import Stiv

TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others, for example while the first one writes a checkpoint."""
REST = 0.1
"""Seconds that a process rests when it leaves the others.

Gloo's threads let go of the last tensors a moment *after* their collective has returned, and need the interpreter for
it. Torch's caches of sharded operations keep these threads alive beyond the process group, and an interpreter that
ends in that moment ends the process by a signal (``terminate called without an active exception``).
"""


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Team:
    """This process (``rank``) among all (``world``), its device, and the mesh that parameters are sharded over."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=_default_device)
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes logs and checkpoints."""
        return self.rank == 0

    def check(self, what: str, batch: int) -> None:
        """:class:`ConfigError` unless ``batch`` samples can be dealt out evenly."""
        if batch % self.world:
            raise ConfigError(
                f"{what}: batch {batch} is not divisible by {self.world} processes; "
                f"make it a multiple of {self.world} or start another number of processes"
            )

    def parts(self, batch: int, micro_batch: int | None) -> list[range]:
        """The samples of this process in a global batch, in micro-batches of at most ``micro_batch``."""
        own = batch // self.world
        start, size = self.rank * own, micro_batch or own
        return [range(at, min(at + size, start + own)) for at in range(start, start + own, size)]

    def gather(self, values: Tensor) -> Tensor:
        """``values`` [..., n] of all processes, in their order: [..., world * n]."""
        if self.world == 1:
            return values
        received = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(received, values.contiguous())
        return torch.cat(received, dim=-1)

    def gather_names(self, names: Sequence[str]) -> list[str]:
        """``names`` of all processes, in their order."""
        received: list[list[str]] = [[]] * self.world
        if self.world == 1:
            return list(names)
        dist.all_gather_object(received, list(names))
        return [name for each in received for name in each]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process; all of them learn the same."""
        if self.world == 1:
            return flag
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients of parameters that every process holds whole by their mean over the processes."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined() -> Iterator[Team]:
    """The team of this process: what torchrun's environment says, else one process on its own.

    A process group that was made outside is used and left as it is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    device, own = _default_device(), not dist.is_initialized()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if own:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        with warnings.catch_warnings():
            # It warns of in-place operations on what a sharded linear returns; the model has none.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield Team(rank=dist.get_rank(), world=dist.get_world_size(), device=device, mesh=mesh)
    finally:
        if own:
            dist.destroy_process_group()
            time.sleep(REST)


def shard(module: nn.Module, team: Team, precision: str) -> None:
    """Shard ``module`` over ``team`` in place; without a mesh nothing is done.

    Every block of a :class:`Stiv` is gathered on its own, just in time, all else at once. Keys and values of the text
    are computed for all blocks in front of them, so what makes them is a group. In bfloat16 blocks are *gathered* in
    bfloat16, as autocast would round their weights anyhow; the weights and all sums over gradients stay fp32. What was
    gathered is freed after every forward pass, the root's too: no copy outlives a change of the weights.
    """
    if team.mesh is None:
        return
    if isinstance(module, Stiv):
        blocks = [cast("StivBlock", block) for block in module.blocks]
        policy = MixedPrecisionPolicy()
        if precision == "bfloat16":
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        text: list[nn.Module] = [module for block in blocks for module in (block.cross.kv, block.cross.k_norm)]
        fully_shard(text, mesh=team.mesh, mp_policy=policy)
        for block in blocks:
            fully_shard(block, mesh=team.mesh, mp_policy=policy)
    fully_shard(module, mesh=team.mesh, reshard_after_forward=True)


@contextmanager
def sampled(model: Stiv) -> Iterator[None]:
    """While a sharded ``model`` is sampled from: its parameters are gathered for :meth:`Stiv.text_kv` alone too.

    Not while it is trained: there the forward pass calls that method, and would lose what it had gathered.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    register_fsdp_forward_method(model, "text_kv")
    try:
        yield
    finally:
        del model.__dict__["text_kv"]


def sync_gradients(modules: Iterable[nn.Module], wanted: bool) -> None:
    """Whether the next backward pass reduces gradients over processes: only that of the last micro-batch does."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(wanted)


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds, sharing its memory."""
    return cast("Any", tensor).to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, device: torch.device) -> Tensor:
    """All of ``tensor``, in every process; all processes must call it together."""
    return cast("Any", tensor.to(device)).full_tensor() if isinstance(tensor, DTensor) else tensor
