"""The page of a measurement."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from measured import SECONDS, a_point, a_report

from stiv_deploy.runtime.command.bench.page import bench_page

Run = Callable[..., tuple[int, str, str]]


def test_every_sample_is_a_dot_and_all_of_it_is_there() -> None:
    text = bench_page(a_report((a_point(SECONDS), a_point([2 * each for each in SECONDS]))))
    parser = HTMLParser()
    parser.feed(text)
    parser.close()
    assert text.count("<circle") == 2 * len(SECONDS)
    assert 'class="badge">fair' in text
    places = [float(each) for each in re.findall(r'(?:cx|x)="([\d.]+)%"', text)]
    assert places
    assert 0 <= min(places) <= max(places) <= 100
    assert "http:" not in text
    assert "https:" not in text


def test_what_is_invalid_is_called_so() -> None:
    text = bench_page(a_report(invalid=("too <loud>",)))
    assert 'class="badge missed">INVALID' in text
    assert "INVALID: too &lt;loud&gt;" in text


@pytest.mark.usefixtures("quiet", "verified")
def test_the_command_writes_it(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    few = ("--percentile", 50, "--backend", "onnxruntime", "--threads", 1, "--no-cold", "--steps", 1)
    assert run("bench", bundle_path, *few, "--html", tmp_path / "a.html")[0] == 0
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    for options, words in (
        (("--html", "a.htm"), "the page is an HTML file; give a name that ends in .html"),
        (("--html", tmp_path / "b.html", "--json", tmp_path / "b.html"), "named by both --html and --json"),
    ):
        code, _, err = run("bench", bundle_path, *few, *options)
        assert (code, words in err) == (2, True)
