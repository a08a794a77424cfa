"""Previews: there while somebody looks, gone with their job."""

import os
from pathlib import Path

from stiv_deploy.serving.store.previews import Previews
from stiv_deploy.serving.store.results import Results


def test_a_look_is_good_for_a_moment(tmp_path: Path) -> None:
    previews = Previews(tmp_path)
    assert not previews.wanted("a")
    previews.want("a")
    assert (previews.wanted("a"), previews.wanted("b")) == (True, False)
    os.utime(tmp_path / "a.wanted", (0, 0))
    assert not previews.wanted("a")


def test_what_was_saved_last_is_shown_until_the_end(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert results.previews.get("a") is None
    for picture in (b"first", b"second"):
        results.previews.save("a", picture)
    assert results.previews.get("a") == b"second"
    results.remove("a")
    assert [*results.previews] == []
