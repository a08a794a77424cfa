"""``stiv bench --nvtx``: phases and graphs are ranges, one in another, in the library's own calls."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from stiv_deploy.runtime.command.bench.ranges import DOMAIN, Ranges

Run = Callable[..., tuple[int, str, str]]
FEW = ("--percentile", "50", "--samples", "6", "--steps", "2", "--no-cold")


class Library:
    """``nvtx``, as far as it is used: keeps each range as the path of the ranges that it is in."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.paths: list[str] = []
        self.domains: list[str] = []

    def get_domain(self, name: str) -> "Library":
        self.domains.append(name)
        return self

    def get_event_attributes(self, message: str) -> SimpleNamespace:
        return SimpleNamespace(message=message)

    def push_range(self, attributes: SimpleNamespace) -> None:
        self.open.append(attributes.message)
        self.paths.append(" / ".join(self.open))

    def pop_range(self) -> None:
        self.open.pop()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setitem(sys.modules, "nvtx", found)
    return found


@pytest.mark.usefixtures("verified", "quiet")
def test_phases_and_graphs_are_ranges(run: Run, bundle_path: Path, library: Library) -> None:
    code, out, err = run("bench", bundle_path, *FEW, "--nvtx", "--json")
    assert (code, err) == (0, "")
    assert library.domains == [DOMAIN]
    assert library.open == []
    ranges = set(library.paths)
    phases = {"load", "text", "encode", "denoise", "decode", "write"}
    assert {f"sample / {phase}" for phase in phases} < ranges
    assert {f"warm-up / sample / {phase}" for phase in phases} < ranges
    graphs = {"embed", "block_00", "block_01", "head", "step"}
    assert {f"sample / denoise / {graph}" for graph in graphs} < ranges
    assert "sample / text / text_encoder" in ranges
    assert "sample / decode / decoder" in ranges
    report = json.loads(out)
    assert report["nvtx"] is True
    evaluations = report["points"][0]["work"]["evaluations"]
    made = library.paths.count("sample") + library.paths.count("warm-up / sample")
    steps = sum(path.endswith("denoise / step") for path in library.paths)
    assert steps == made * evaluations


@pytest.mark.usefixtures("verified", "quiet")
def test_without_it_there_are_none(run: Run, bundle_path: Path, library: Library) -> None:
    code, out, _ = run("bench", bundle_path, *FEW, "--json")
    assert (code, json.loads(out)["nvtx"]) == (0, False)
    assert library.domains == library.paths == []


def test_an_absent_library_is_one_line(run: Run, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr("stiv_deploy.runtime.command.bench.stage.too_few", None)
    code, _, err = run("bench", bundle_path, *FEW, "--nvtx")
    assert (code, err) == (2, "error: nvtx is not installed; run: pip install 'stiv-deploy[bench]'\n")


def test_a_range_ends_where_its_block_fails(library: Library) -> None:
    with pytest.raises(KeyError), Ranges()("sample"):
        raise KeyError
    assert (library.paths, library.open) == (["sample"], [])


def test_the_library_itself_takes_them() -> None:
    pytest.importorskip("nvtx", reason="nvtx has no wheel here, or the extra 'bench' is not installed")
    ranges = Ranges()
    with ranges("sample"), ranges("denoise"), ranges("sample"):
        pass
