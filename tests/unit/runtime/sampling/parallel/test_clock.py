"""Seconds in exchanges, by a clock that is moved by hand, and as every transport counts them."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest
from engine_clips import finish, sample_of, settings_of
from teams import cpus, engine_over

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.sampling.parallel import clock
from stiv_deploy.runtime.sampling.parallel.clock import ExchangeClock, Spent
from stiv_deploy.runtime.sampling.parallel.sockets import Wires


def test_what_is_not_waiting_is_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    counted = ExchangeClock()
    for fetch, wait, put in ((1.0, 2.0, 4.0), (0.5, 0.0, 0.25)):
        with counted.exchange():
            now[0] += fetch
            with counted.waiting():
                now[0] += wait
            now[0] += put
        now[0] += 64.0  # between exchanges
    assert counted.spent == Spent(2.0, 5.75)
    assert counted.spent.total == 7.75
    assert counted.spent.since(Spent(2.0, 5.0)) == Spent(0.0, 0.75)


def test_an_exchange_that_fails_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    counted = ExchangeClock()

    def broken() -> None:
        with counted.exchange(), counted.waiting():
            now[0] += 3.0
            raise ValueError("gone")

    with pytest.raises(ValueError, match="gone"):
        broken()
    assert counted.spent == Spent(3.0, 0.0)


def test_a_socket_waits_for_who_sends_late() -> None:
    ours, theirs = socket.socketpair()
    wires, back = Wires({1: ours}), bytearray(4)
    late = threading.Timer(0.1, theirs.sendall, [b"abcd"])
    late.start()
    started = time.perf_counter()
    wires.swap({}, {1: memoryview(back)})
    took = time.perf_counter() - started
    late.join()
    assert back == b"abcd"
    assert 0.05 < wires.clock.spent.waiting <= took


def test_every_device_tells_what_it_has_spent(mixing: Bundle) -> None:
    """The leader is slow before it gives its part in every exchange: the other waits for as long, and it does not."""
    team = cpus(mixing, 2, "dsp2")
    begun = team.settle()
    assert begun == [Spent(), Spent()]
    meet, delays = team.transport._hub.meet, []  # type: ignore[attr-defined]

    def slow(ranks: frozenset[int]) -> None:
        if threading.current_thread() is threading.main_thread():
            delays.append(0.03)
            time.sleep(0.03)
        meet(ranks)

    team.transport._hub.meet = slow  # type: ignore[attr-defined]
    engine = engine_over(team, mixing)
    engine.admit(sample_of(settings_of("sit", steps=2)))
    finish(engine)
    leader, other = team.settle()
    team.close()
    assert len(delays) == 2 * (2 * 2 + 2), "two switches a block, inputs and velocity, of two evaluations"
    assert other.waiting > 0.5 * sum(delays)
    assert leader.copying > 0
    assert other.copying > 0
