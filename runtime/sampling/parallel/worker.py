"""The process of one device: finds the others, opens its backend, and does what the leader says until it hangs up.

Sockets are of this machine alone, and whoever connects has to know the token that the leader made for this team.
"""

import hmac
import json
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass

from stiv_deploy.runtime.backends import Backend, open_backend
from stiv_deploy.runtime.backends.nccl import load_nccl
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import BackendError, DeviceError
from stiv_deploy.runtime.sampling.parallel.collective import NcclTransport
from stiv_deploy.runtime.sampling.parallel.messages import Message, exactly, receive, send
from stiv_deploy.runtime.sampling.parallel.sockets import SocketTransport, Wires, stopped
from stiv_deploy.runtime.sampling.parallel.team import Worker, fault
from stiv_deploy.runtime.sampling.parallel.transport import Transport

HOST = "127.0.0.1"
HELLO = struct.Struct("<32sIB")
ORDERS, DATA = 0, 1
"""What a connection to the leader is for; between others all are for data."""
GREETING_SECONDS = 60.0
"""How long one who has connected, or is to connect, may take."""


@dataclass(frozen=True, kw_only=True)
class Post:
    """Where a process is to work: rank of so many, which device with which backend, and the leader's port and token.

    Processes with a ``unique_id``, in hex, exchange by NCCL.
    """

    bundle: str
    backend: str
    device: int
    threads: int | None
    rank: int
    size: int
    port: int
    token: str
    unique_id: str | None = None

    @property
    def nccl_id(self) -> bytes | None:
        """``unique_id`` as it was."""
        return None if self.unique_id is None else bytes.fromhex(self.unique_id)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def listener() -> socket.socket:
    """A socket that listens on a port of its own, for this machine."""
    return socket.create_server((HOST, 0), backlog=128)


def connect(port: int, token: str, rank: int, kind: int) -> socket.socket:
    """A connection to a listener of this team."""
    line = _plain(socket.create_connection((HOST, port), GREETING_SECONDS))
    line.sendall(HELLO.pack(bytes.fromhex(token), rank, kind))
    return line


def accept(listening: socket.socket, token: str) -> tuple[socket.socket, int, int]:
    """The next connection of this team, with the rank and the kind that it says; strangers are hung up on."""
    while True:
        line, _ = listening.accept()
        line.settimeout(GREETING_SECONDS)
        with suppress(OSError):
            hello = exactly(line, HELLO.size)
            if hello is not None:
                secret, rank, kind = HELLO.unpack(hello)
                if hmac.compare_digest(secret, bytes.fromhex(token)):
                    return _plain(line), rank, kind
        line.close()


def _plain(line: socket.socket) -> socket.socket:
    """``line``, that blocks, and sends at once what is small."""
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


def meet(post: Post) -> tuple[socket.socket, dict[int, socket.socket]]:
    """The line of orders to the leader, and data lines to all others, by rank."""
    with listener() as listening:
        listening.settimeout(GREETING_SECONDS)
        orders = connect(post.port, post.token, post.rank, ORDERS)
        send(orders, Message("listening", {"port": listening.getsockname()[1]}))
        peers = {0: connect(post.port, post.token, post.rank, DATA)}
        told = receive(orders)
        if told is None:
            raise DeviceError("the leading device hung up")
        for rank in range(1, post.rank):
            peers[rank] = connect(int(told.values[str(rank)]), post.token, post.rank, DATA)
        while len(peers) < post.size - 1:
            line, rank, _ = accept(listening, post.token)
            peers[rank] = line
    return orders, peers


def orders_of(line: socket.socket) -> Iterator[Message]:
    """What the leader says, until it hangs up."""
    with suppress(ConnectionError):
        while (message := receive(line)) is not None:
            yield message


def transport_of(rank: int, backend: Backend, wires: Wires, unique_id: bytes | None) -> Transport:
    """The way to the other processes: over ``wires``, or with a ``unique_id`` by NCCL.

    Which only engines have: :class:`BackendError` for another backend.
    """
    if unique_id is None:
        return SocketTransport(rank, backend, wires)
    if not isinstance(backend, TensorRTBackend):
        raise BackendError(f"--nccl is for engines on GPUs, not for {backend.name}; leave it out, or build engines")
    return NcclTransport(rank, backend, wires, load_nccl(), unique_id)


def work(post: Post) -> int:
    """Do the work of ``post``; returns the exit code."""
    orders, peers = meet(post)
    wires = Wires(peers)
    try:
        with open_backend(post.backend, Bundle.open(post.bundle), post.threads, post.device) as backend:
            send(orders, Message("ready", {"machine": backend.machine.model_dump_json()}))
            transport = transport_of(post.rank, backend, wires, post.nccl_id)
            worker = Worker(backend, Bundle.open(post.bundle).manifest, transport)
            try:
                for message in orders_of(orders):
                    if (answer := worker(message)) is not None:
                        send(orders, answer)
            finally:
                transport.fail(stopped(post.rank))
    except Exception as error:
        told = Message("error", {"text": str(fault(post.rank, error)), "own": int(not isinstance(error, DeviceError))})
        with suppress(OSError):
            send(orders, told)
        return 1
    finally:
        wires.close()
    return 0


def main() -> int:
    """Work where the line on standard input says. The leader ends this process; Ctrl-C is for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return work(Post(**json.loads(sys.stdin.readline())))


if __name__ == "__main__":
    sys.exit(main())
