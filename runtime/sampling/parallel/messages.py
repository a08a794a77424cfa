"""What the leader tells the other ranks: a line of JSON, and the bytes of arrays behind it. No pickles."""

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from stiv_deploy.runtime.errors import DeviceError

HEADER = struct.Struct("<I")
LINE_LIMIT = 2**20
"""Longest line; longer ones are no messages."""


@dataclass(frozen=True)
class Message:
    """``command`` with its numbers and words, and arrays of bytes by name."""

    command: str
    values: Mapping[str, int | float | str] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


def send(line: socket.socket, message: Message) -> None:
    """Write ``message`` to ``line``; ``OSError`` if nobody listens any more."""
    sizes = {name: array.nbytes for name, array in message.arrays.items()}
    head = json.dumps({"command": message.command, "values": dict(message.values), "arrays": sizes}).encode()
    line.sendall(HEADER.pack(len(head)) + head)
    for array in message.arrays.values():
        line.sendall(np.ascontiguousarray(array).data.cast("B"))


def receive(line: socket.socket) -> Message | None:
    """The next message on ``line``; None when the other end has closed it. :class:`DeviceError` for what is none."""
    start = exactly(line, HEADER.size)
    if start is None:
        return None
    (size,) = HEADER.unpack(start)
    head = exactly(line, size) if size <= LINE_LIMIT else None
    if head is None:
        raise DeviceError("a message between devices broke off")
    told = json.loads(bytes(head))
    arrays = {}
    for name, nbytes in told["arrays"].items():
        raw = exactly(line, nbytes)
        if raw is None:
            raise DeviceError("a message between devices broke off")
        arrays[name] = np.frombuffer(raw, np.uint8)
    return Message(told["command"], told["values"], arrays)


def exactly(line: socket.socket, nbytes: int) -> bytearray | None:
    """So many bytes of ``line``; None if it closes before."""
    raw = bytearray(nbytes)
    view, done = memoryview(raw), 0
    while done < nbytes:
        count = line.recv_into(view[done:])
        if not count:
            return None
        done += count
    return raw
