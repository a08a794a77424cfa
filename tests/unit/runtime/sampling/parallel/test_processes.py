"""Clips made by several processes over sockets, and what is said when one of them goes."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from engine_clips import finish, sample_of, settings_of
from teams import CLIPS, assert_same, clips_of, cpus, engine_over, evaluation_bytes

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import DeviceError
from stiv_deploy.runtime.sampling.parallel import messages, processes, worker
from stiv_deploy.runtime.sampling.parallel.messages import Message
from stiv_deploy.runtime.sampling.parallel.sockets import SocketTransport, Wires


def pairs(count: int) -> list[dict[int, socket.socket]]:
    """Sockets of each rank to every other."""
    lines: list[dict[int, socket.socket]] = [{} for _ in range(count)]
    for low in range(count):
        for high in range(low + 1, count):
            lines[low][high], lines[high][low] = socket.socketpair()
    return lines


def test_messages_arrive_as_they_were_sent() -> None:
    one, other = socket.socketpair()
    sent = Message(
        "row", {"key": 3, "row": 1, "text": "a\nb"}, {"k": np.arange(300_000, dtype=np.float32), "e": np.empty(0)}
    )
    thread = threading.Thread(target=messages.send, args=(one, sent))
    thread.start()
    got = messages.receive(other)
    thread.join()
    assert got is not None
    assert (got.command, got.values) == (sent.command, sent.values)
    np.testing.assert_array_equal(got.arrays["k"].view(np.float32), sent.arrays["k"])
    assert got.arrays["e"].size == 0
    one.close()
    assert messages.receive(other) is None


def test_a_message_that_breaks_off() -> None:
    one, other = socket.socketpair()
    one.sendall(messages.HEADER.pack(100) + b"{")
    one.close()
    with pytest.raises(DeviceError, match="broke off"):
        messages.receive(other)


def test_all_send_much_to_all_and_nobody_waits_for_one_who_waits() -> None:
    """More than a socket holds, so that whoever sent first and read afterwards would hang."""
    lines, size = pairs(3), 3_000_000
    got: dict[tuple[int, int], np.ndarray] = {}

    def swap(rank: int) -> None:
        out = {peer: np.full(size, 10 * rank + peer, np.uint8) for peer in lines[rank]}
        back = {peer: np.zeros(size, np.uint8) for peer in lines[rank]}
        views = [{peer: memoryview(array) for peer, array in each.items()} for each in (out, back)]
        Wires(lines[rank]).swap(*views)
        got.update({(peer, rank): array for peer, array in back.items()})

    threads = [threading.Thread(target=swap, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(got) == 6
    assert all((array == 10 * source + target).all() for (source, target), array in got.items())


def test_one_who_hangs_up_and_one_who_says_nothing() -> None:
    lines = pairs(2)
    wires = Wires(lines[0], stall=0.05)
    back = {1: memoryview(bytearray(4))}
    with pytest.raises(DeviceError, match="^device 1 has not answered for 0.05 s; run it again"):
        wires.swap({}, back)
    lines[1][0].close()
    with pytest.raises(DeviceError, match="^device 1 of the clip has stopped; run it again, or name fewer --devices$"):
        wires.swap({}, back)
    with pytest.raises(DeviceError, match="device 1"):
        wires.swap({1: memoryview(bytes(1 << 24))}, {})


def test_strangers_are_hung_up_on() -> None:
    token = "ab" * 32
    with worker.listener() as listening:
        port = listening.getsockname()[1]
        for hello in (b"GET / HTTP/1.1\r\n", worker.HELLO.pack(bytes(32), 1, 0)):
            stranger = socket.create_connection((worker.HOST, port))
            stranger.sendall(hello)
            stranger.shutdown(socket.SHUT_WR)
        friend = worker.connect(port, token, 5, worker.DATA)
        line, rank, kind = worker.accept(listening, token)
        assert (rank, kind) == (5, worker.DATA)
        friend.close()
        line.close()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "form"), [(2, "dsp2"), (3, "dsp3"), (4, "cfg2xdsp2"), (8, None)])
def test_clips_of_several_processes_are_those_of_one(mixing_path: Path, count: int, form: str | None) -> None:
    bundle = Bundle.open(mixing_path)
    alone = clips_of(None, bundle)
    team = cpus(bundle, count, form, processes=True)
    found = clips_of(team, bundle)
    for slot, latents in alone.items():
        assert_same(found[slot], latents)
    wire = team.transport
    assert isinstance(wire, SocketTransport)
    before = wire.sent + wire.received
    engine = engine_over(team, bundle)
    engine.admit(sample_of(settings_of("sit", steps=2)))
    finish(engine)
    guidance = team.placement.guidance
    if count == 2:  # all that moves is the leader's to send or to get
        assert wire.sent + wire.received - before == 2 * evaluation_bytes(3, guidance, team.placement.sequence)
    team.settle()
    members = [member.process for member in team._members.values()]  # type: ignore[attr-defined]
    team.close()
    assert [process.returncode for process in members] == [0] * (count - 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "fails"])
def test_a_process_that_goes_in_the_middle(mixing_path: Path, how: str) -> None:
    bundle = Bundle.open(mixing_path)
    team = cpus(bundle, 4, "cfg2xdsp2", processes=True)
    engine = engine_over(team, bundle)
    engine.admit(CLIPS[0])
    engine.tick()
    member = team._members[3]  # the other group: the leader gets nothing from it but velocities
    processes_ = [each.process for each in team._members.values()]  # type: ignore[attr-defined]
    if how == "killed":
        os.kill(member.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        said = f"^device 3 of the clip stopped: its process ended with signal {signal.SIGKILL.value}; run it again"
    else:
        member.tell(Message("run", {"key": 99, "rows": 1}))
        said = "^device 3 of the clip stopped .KeyError: 99.; run it again, or name fewer --devices$"
    started = time.monotonic()
    with pytest.raises(DeviceError, match=said):
        finish(engine)
    assert time.monotonic() - started < 20
    with pytest.raises(DeviceError, match=said):
        engine_over(team, bundle)
    team.close()
    assert all(process.poll() is not None for process in processes_), "nobody is left behind"


@pytest.mark.slow
def test_a_process_that_cannot_open_its_backend(mixing_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = processes._started

    def elsewhere(post: worker.Post) -> object:
        return started(worker.Post(**{**post.__dict__, "device": 5 if post.rank == 2 else 0}))

    monkeypatch.setattr(processes, "_started", elsewhere)
    with pytest.raises(DeviceError, match="^device 2 of the clip stopped .backend onnxruntime does not work here"):
        cpus(Bundle.open(mixing_path), 3, "dsp3", processes=True)
