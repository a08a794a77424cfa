"""Tallies: what is counted, and times by how long they were."""

from stiv_deploy.serving.store.tallies import SUM, Key, Tallies


def test_what_was_taken_is_not_taken_again() -> None:
    tallies = Tallies()
    tallies.count("a")
    tallies.count("a", amount=2)
    tallies.count("a", "x", 0.5)
    assert tallies.take() == {Key("a"): 3, Key("a", "x"): 0.5}
    assert tallies.take() == {}


def test_a_time_is_counted_at_the_bound_that_it_does_not_pass() -> None:
    tallies = Tallies()
    for seconds in (0.0, 0.005, 0.0051, 1e9):
        tallies.time("t", seconds, "x")
    assert tallies.take() == {
        Key("t", "x", "0.005"): 2,
        Key("t", "x", "0.01"): 1,
        Key("t", "x", "+Inf"): 1,
        Key("t", "x", SUM): 1e9 + 0.0101,
    }
