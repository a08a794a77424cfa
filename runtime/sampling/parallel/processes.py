"""Devices in processes of their own: started, watched, and ended by the leader."""

import secrets
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from stiv_deploy.runtime.bundle.verified import Machine
from stiv_deploy.runtime.errors import DeviceError, StivError
from stiv_deploy.runtime.sampling.parallel.messages import Message, receive, send
from stiv_deploy.runtime.sampling.parallel.sockets import Wires
from stiv_deploy.runtime.sampling.parallel.team import CODED, SETTLED, Member
from stiv_deploy.runtime.sampling.parallel.transport import AGAIN, STALL_SECONDS
from stiv_deploy.runtime.sampling.parallel.worker import DATA, ORDERS, Post, accept, listener

START_SECONDS = 300.0
"""How long processes may take to start and to open their backends."""
LAST_WORDS_SECONDS = 3.0
"""How long the cause is waited for when a device has gone: the first to be missed need not be the first that went."""
END_SECONDS = 10.0
COMMAND = (sys.executable, "-m", "stiv_deploy.runtime.sampling.parallel.worker")


class ProcessMember(Member):
    """A device with a process of its own."""

    def __init__(self, rank: int, process: "subprocess.Popen[str]", lost: Callable[[int], StivError]) -> None:
        self.rank, self.process = rank, process
        self.line: socket.socket | None = None
        self._lost = lost
        self.said: list[Message] = []

    def tell(self, message: Message) -> None:
        """As :meth:`Member.tell` says."""
        assert self.line is not None
        try:
            send(self.line, message)
        except OSError:
            raise self._lost(self.rank) from None

    def hear(self) -> list[Message]:
        """What it has said up to now."""
        while self.line is not None and select.select([self.line], [], [], 0)[0]:
            with suppress(OSError, StivError):
                message = receive(self.line)
                if message is not None:
                    self.said.append(message)
                    continue
            break
        return self.said

    def answer(self) -> Message:
        """As :meth:`Member.answer` says."""
        end = time.monotonic() + STALL_SECONDS
        while time.monotonic() < end:
            for message in self.hear():
                if message.command in (CODED, SETTLED):
                    self.said = [each for each in self.said if each is not message]
                    return message
                if message.command == "error":
                    raise self._lost(self.rank)
            if self.ended:
                raise self._lost(self.rank)
            if self.line is not None:
                select.select([self.line], [], [], 0.1)
        raise DeviceError(f"device {self.rank} has not answered for {STALL_SECONDS:g} s; {AGAIN}")

    def stop(self) -> None:
        """As :meth:`Member.stop` says: it ends when its line closes, or is ended."""
        if self.line is not None:
            self.line.close()
            self.line = None
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def ended(self) -> str | None:
        """How its process ended; None where it has not."""
        code = self.process.poll()
        if code is None:
            return None
        return f"ended with signal {-code}" if code < 0 else f"ended with exit code {code}"


class Crew:
    """The processes of the ranks from 1 on."""

    def __init__(
        self, bundle: Path, backend: str, devices: Sequence[int], threads: int | None, unique_id: bytes | None = None
    ) -> None:
        self._token = secrets.token_hex(32)
        self.members: list[ProcessMember] = []
        self.machines: list[Machine] = []
        self._listening = listener()
        self._listening.settimeout(0.2)
        port = self._listening.getsockname()[1]
        for rank, device in enumerate(devices[1:], 1):
            post = Post(
                bundle=str(bundle),
                backend=backend,
                device=device,
                threads=threads,
                rank=rank,
                size=len(devices),
                port=port,
                token=self._token,
                unique_id=None if unique_id is None else unique_id.hex(),
            )
            self.members.append(ProcessMember(rank, _started(post), self.lost))

    def meet(self) -> Wires:
        """Wait until all are ready; the data lines to them. :class:`DeviceError` where one is not."""
        try:
            return self._meet(time.monotonic() + START_SECONDS)
        except BaseException:
            self.kill()
            raise
        finally:
            self._listening.close()

    def _meet(self, end: float) -> Wires:
        peers: dict[int, socket.socket] = {}
        while len(peers) < len(self.members) or any(member.line is None for member in self.members):
            self._check(end)
            with suppress(TimeoutError):
                line, rank, kind = accept(self._listening, self._token)
                if kind == DATA:
                    peers[rank] = line
                elif kind == ORDERS:
                    self.members[rank - 1].line = line
        ports = {str(member.rank): self._answer(member, "listening", end).values["port"] for member in self.members}
        for member in self.members:
            member.tell(Message("peers", ports))
        for member in self.members:
            said = self._answer(member, "ready", end).values["machine"]
            self.machines.append(Machine.model_validate_json(str(said)))
        return Wires(peers, self.lost)

    def _answer(self, member: ProcessMember, command: str, end: float) -> Message:
        """Wait for what ``member`` is to say next."""
        while True:
            for message in member.hear():
                if message.command == command:
                    return message
            self._check(end)
            time.sleep(0.01)

    def _check(self, end: float) -> None:
        """:class:`DeviceError` if one has ended, or ``end`` has come."""
        for member in self.members:
            if member.ended or any(message.command == "error" for message in member.hear()):
                raise self.lost(member.rank)
        if time.monotonic() > end:
            raise DeviceError(f"the devices were not ready after {START_SECONDS:g} s; {AGAIN}")

    def lost(self, rank: int) -> StivError:
        """Why nothing more comes from ``rank``: what the first that stopped says, or how it ended."""
        end = time.monotonic() + LAST_WORDS_SECONDS
        while True:
            words = self._cause()
            if words is not None or time.monotonic() > end:
                return DeviceError(words or f"device {rank} of the clip has stopped; {AGAIN}")
            time.sleep(0.02)

    def _cause(self) -> str | None:
        """The error of a device's own, or the end of a process that said none."""
        errors = [message for member in self.members for message in member.hear() if message.command == "error"]
        own = [str(message.values["text"]) for message in errors if message.values["own"]]
        silent = [each for each in self.members if not any(message.command == "error" for message in each.said)]
        ended = [
            f"device {each.rank} of the clip stopped: its process {each.ended}; {AGAIN}"
            for each in silent
            if each.ended
        ]
        return next(iter((*own, *ended)), None)

    def kill(self) -> None:
        """End all processes."""
        for member in self.members:
            member.process.kill()
            member.stop()


def _started(post: Post) -> "subprocess.Popen[str]":
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    with suppress(OSError):  # what became of it is seen when it does not come
        process.stdin.write(f"{post.to_json()}\n")
        process.stdin.close()
    return process
