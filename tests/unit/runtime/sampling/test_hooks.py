from stiv_deploy.runtime.sampling.hooks import GraphClock


def test_clock_sums_seconds_by_graph_and_can_wait_for_the_device() -> None:
    waits: list[int] = []
    clock = GraphClock(lambda: waits.append(1))
    call = clock("head", lambda: None)
    call()
    call()
    assert len(waits) == 2
    assert clock.seconds["head"] == clock.total > 0
    assert (clock.bound, clock.calls) == ({"head": 1}, {"head": 2})
