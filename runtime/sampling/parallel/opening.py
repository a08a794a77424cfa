"""From devices by name to a team of them."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import permutations
from typing import Any

from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.backends.nccl import load_nccl, new_id
from stiv_deploy.runtime.backends.onnxruntime import thread_count
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.errors import BackendError
from stiv_deploy.runtime.sampling.parallel.peers import Offer, PeerTransport
from stiv_deploy.runtime.sampling.parallel.placement import CPU, Placement, check_devices, place
from stiv_deploy.runtime.sampling.parallel.processes import Crew
from stiv_deploy.runtime.sampling.parallel.team import Team, ThreadMember, check_alike, check_halves
from stiv_deploy.runtime.sampling.parallel.transport import HostOffers, HostTransport, Hub, Transport
from stiv_deploy.runtime.sampling.parallel.worker import transport_of

CPU_BACKEND = "onnxruntime"
Open = Callable[[str | None, int], Backend]
"""Opens the backend of a name, by default the best one, on the device of an index."""


def open_team(
    bundle: Bundle,
    devices: Sequence[str],
    *,
    parallel: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    processes: bool = False,
    nccl: bool = False,
) -> Team:
    """The devices of these names, each with ``backend``, a thread of this process for each, or a process.

    On CPUs they share out ``threads``. With ``nccl`` they are processes that exchange by NCCL, GPUs with engines all of
    them; else processes exchange over sockets. Everything is checked before the first is opened, where that is
    possible: raises :class:`BackendError` for devices that are not there, are unlike each other or do not fit
    ``parallel``, where NCCL is not installed or not for them, and for a bundle without halves where frames are to be
    shared; else what :func:`~stiv_deploy.runtime.backends.open_backend` does.
    """
    manifest = bundle.manifest
    check_devices(devices)
    api = _loaded_nccl(devices) if nccl else None
    placement = place(devices, parallel, manifest.model, manifest.sampling.guidance_mode)
    check_halves(manifest, placement, bundle.folder)
    shared = shared_threads(placement, threads)
    if not (processes or nccl):
        return _in_threads(bundle, placement, backend, shared)
    if bundle.loras:
        raise BackendError("--lora is merged in this process, --processes have weights of their own; leave one out")
    return _in_processes(bundle, placement, backend, shared, api)


def _loaded_nccl(devices: Sequence[str]) -> Any:
    if CPU in devices:
        raise BackendError("--nccl is between GPUs, --devices names CPUs; leave it out, --processes use sockets")
    return load_nccl()


def _in_threads(bundle: Bundle, placement: Placement, name: str | None, threads: int | None) -> Team:
    def opened(chosen: str | None, index: int) -> Backend:
        return open_backend(chosen, bundle, threads, index)

    return team_of(bundle.manifest, placement, open_each(placement, name, opened))


def team_of(manifest: Manifest, placement: Placement, backends: Sequence[Backend]) -> Team:
    """``backends`` of this process by rank, as :func:`open_each` opens them, with a thread for each but the first.

    Closing the team closes those of the threads.
    """
    transports = transports_of(backends)
    members = [ThreadMember(rank, backends[rank], manifest, transports[rank]) for rank in range(1, len(backends))]
    return Team(placement, backends[0], manifest, transports[0], members)


def transports_of(backends: Sequence[Backend]) -> Sequence[Transport]:
    """The way between devices of this process: engines copy from GPU to GPU, others through the host's memory."""
    engines = [each for each in backends if isinstance(each, TensorRTBackend)]
    if len(engines) < len(backends):
        hub: Hub[HostOffers] = Hub()
        return [HostTransport(rank, each, hub) for rank, each in enumerate(backends)]
    for one, other in permutations(engines, 2):
        one.cuda.reach(other.cuda)
    peers: Hub[Offer] = Hub()
    return [PeerTransport(rank, each, peers) for rank, each in enumerate(engines)]


def open_each(placement: Placement, name: str | None, opening: Open) -> list[Backend]:
    """A backend for each device, all of one kind: ``name``, or what is ``opening`` for the first one.

    Raises :class:`BackendError` for devices that are unlike each other, and what ``opening`` does; none is then open.
    """
    with ExitStack() as opened:
        backends: list[Backend] = []
        for device in placement.devices:
            chosen, index = where(device, backends[0].name if backends else name)
            backends.append(opened.enter_context(opening(chosen, index)))
        check_alike([each.machine for each in backends], placement)
        opened.pop_all()
    return backends


def _in_processes(
    bundle: Bundle, placement: Placement, name: str | None, threads: int | None, nccl: Any | None
) -> Team:
    chosen, index = where(placement.devices[0], name)
    with ExitStack() as opened:
        backend = opened.enter_context(open_backend(chosen, bundle, threads, index))
        indices = [where(device, backend.name)[1] for device in placement.devices]
        unique_id = None if nccl is None else new_id(nccl)
        crew = Crew(bundle.folder, backend.name, indices, threads, unique_id)
        wires = crew.meet()
        opened.callback(crew.kill)
        check_alike([backend.machine, *crew.machines], placement)
        transport = transport_of(0, backend, wires, unique_id)
        opened.pop_all()
    return Team(placement, backend, bundle.manifest, transport, crew.members)


def shared_threads(placement: Placement, threads: int | None) -> int | None:
    """CPU threads of each device: its share of ``threads``, or of all cores; of a GPU's what was asked for."""
    if placement.devices[0] != CPU:
        return threads
    total = thread_count(threads) or os.cpu_count() or 1
    return max(1, total // len(placement.devices))


def where(device: str, name: str | None) -> tuple[str | None, int]:
    """The backend to open for ``device``, and the index that it takes; :class:`BackendError` where they do not fit."""
    if device != CPU:
        if name == CPU_BACKEND:
            raise BackendError(f"--devices {device} is a GPU, --backend {name} runs on the CPU; leave one of them out")
        return name, int(device)
    if name not in (None, "auto", CPU_BACKEND):
        raise BackendError(f"--devices {CPU} and --backend {name} do not fit; leave out --backend, or name GPUs")
    return CPU_BACKEND, 0
