"""``stiv bench plan --gpus``: volumes and times are those derived by hand, and what the runtime moves."""

import json
from collections.abc import Callable

import pytest

from stiv_deploy.runtime.command.bench.plan import Plan
from stiv_deploy.runtime.command.bench.predict import PAPER, Load, Shape, predicted
from stiv_deploy.runtime.command.bench.scale import (
    Link,
    bandwidth,
    compute_seconds,
    memory_bytes,
    parse_counts,
    scaled,
    sent_bytes,
)
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.parallel.placement import Layout, layout
from stiv_deploy.runtime.sampling.parallel.shards import switch_bytes

Run = Callable[..., tuple[int, str, str]]
M, LARGE = PAPER["M"], Load(2, 20, 1024)
"""STIV-M at 512 pixels, two rows."""


@pytest.mark.parametrize(
    ("plan", "sent", "milliseconds"),
    [
        (Layout(2, 1), 0.0, 0),
        (Layout(1, 2), 5.8, 18),
        (Layout(2, 2), 2.9, 9),
        (Layout(1, 4), 4.3, 14),
        (Layout(2, 4), 2.2, 7),
    ],
)
def test_volumes_and_times_of_the_sheet(plan: Layout, sent: float, milliseconds: int) -> None:
    """GB that an H100 sends in a step, and what that takes at 70 % of NVLink."""
    found = sent_bytes(M, LARGE, plan)
    speed = bandwidth("H100", "nvlink")
    assert speed is not None
    assert found / 1e9 == pytest.approx(sent, abs=0.06)
    assert round(1e3 * found / speed) == milliseconds


@pytest.mark.parametrize("sequence", [2, 4, 5, 10])
def test_even_shares_are_the_runtimes_bytes(sequence: int) -> None:
    load = Load(2, 20, 1000)
    whole = 2 * M.blocks * switch_bytes(sequence, 2, 20, 1000, 2 * M.width)
    assert sent_bytes(M, load, Layout(1, sequence)) * sequence == whole


def test_guidance_is_split_first_and_speed_is_near_the_number() -> None:
    assert [str(layout(gpus, branches=True)) for gpus in (1, 2, 3, 4, 8)] == [
        "cfg1xdsp1",
        "cfg2xdsp1",
        "cfg1xdsp3",
        "cfg2xdsp2",
        "cfg2xdsp4",
    ]
    assert str(layout(4, branches=False)) == "cfg1xdsp4"
    one = predicted("H100", M, LARGE, "bfloat16", "native")
    assert one is not None
    found = scaled(one, M, LARGE, (1, 2, 4, 8), "nvlink")
    assert [each.speedup for each in found] == pytest.approx([1, 2, 3.9, 7.7], abs=0.05)
    assert all(each.pays for each in found)
    slow = scaled(one, M, LARGE, (1, 2, 4, 8), "pcie4")
    assert [each.speedup for each in slow] == pytest.approx([1, 2, 2.87, 5.04], abs=0.05)


def test_where_it_stops_to_pay_and_where_it_ends() -> None:
    one = predicted("B200", PAPER["XL"], Load(1, 5, 64), "fp8", "plugins")
    assert one is not None
    found = scaled(one, PAPER["XL"], Load(1, 5, 64), (1, 2, 4, 5, 8), "pcie4")
    assert [each.gpus for each in found] == [1, 2, 4, 5], "8 GPUs cannot share 5 frames"
    assert not found[1].pays


def test_uneven_shares_wait_for_the_largest() -> None:
    one = predicted("H100", M, LARGE, "bfloat16", "native")
    assert one is not None
    third = compute_seconds(one, M, Load(2, 20, 1024), Layout(1, 8)) / one.seconds
    assert 1 / 8 < third < 3 / 20


def test_memory_is_weights_and_a_share_of_the_rest() -> None:
    shape, load = Shape(8, 2), Load(2, 4, 6)
    assert memory_bytes(shape, load, Layout(1, 1), 2) == 18 * 64 * 2 * 2 + 2 * 24 * 8 * 2 * (2 + 4)
    assert memory_bytes(shape, load, Layout(2, 2), 1) == 18 * 64 * 2 + 12 * 8 * 2 * (4 + 4)


@pytest.mark.parametrize(("text", "counts"), [("1,2,4,8", (1, 2, 4, 8)), (" 4, 2,2", (2, 4)), ("64", (64,))])
def test_counts(text: str, counts: tuple[int, ...]) -> None:
    assert parse_counts(text) == counts


@pytest.mark.parametrize("text", ["", "0", "65", "a", "1;2", "1,", "-1", "9" * 50])
def test_what_are_no_counts(text: str) -> None:
    with pytest.raises(RequestError, match="give numbers of GPUs from 1 to 64, as in 1,2,4,8$"):
        parse_counts(text)


def test_the_command_says_that_it_is_no_measurement(run: Run) -> None:
    asked = (
        "bench",
        "plan",
        "M",
        "--size",
        "20x512x512",
        "--gpu",
        "H100",
        "--precision",
        "bfloat16",
        "--form",
        "native",
    )
    code, out, _ = run(*asked, "--gpus", "1,4")
    assert code == 0
    assert "PREDICTED, not measured: one clip on several GPUs, by nvlink" in out
    assert "predicted" in out.split("several GPUs")[1]
    assert "cfg2xdsp2" in out
    found = Plan.model_validate(json.loads(run(*asked, "--gpus", "1,4", "--link", "pcie5", "--json")[1]))
    assert (found.link, [each.gpus for each in found.scaled]) == ("pcie5", [1, 4])
    assert Plan.model_validate(json.loads(run(*asked, "--json")[1])).scaled == ()


def test_a_gpu_without_the_link(run: Run) -> None:
    code, _, error = run("bench", "plan", "XL", "--gpu", "L40S", "--gpus", "2")
    assert code == 2
    assert "L40S has no NVLink; give --link pcie5 or pcie4, or a --gpu of A100, H100, H200, B200" in error
    link: Link = "pcie4"
    assert bandwidth("L40S", link) == 20e9
