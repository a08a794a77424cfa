"""Which devices make a clip together: words in, groups out, and what is refused."""

import pytest
from toys import FACTS

from stiv_deploy.runtime.bundle.contract import Student
from stiv_deploy.runtime.errors import BackendError, RequestError
from stiv_deploy.runtime.sampling.parallel.placement import Placement, parse_devices, parse_parallel, place


@pytest.mark.parametrize(
    ("count", "mode", "form"),
    [
        (1, "jit", "cfg1xdsp1"),
        (2, "jit", "cfg2xdsp1"),
        (3, "jit", "cfg1xdsp3"),
        (4, "sit", "cfg2xdsp2"),
        (8, "jit", "cfg2xdsp4"),
        (4, "none", "cfg1xdsp4"),
    ],
)
def test_guidance_is_split_first(count: int, mode: str, form: str) -> None:
    assert str(place(["cpu"] * count, None, FACTS, mode)) == form


def test_a_student_has_one_row_to_share() -> None:
    student = FACTS.model_copy(update={"student": Student(guidance=(1.0, 4.0))})
    assert str(place(["0", "1"], None, student, "jit")) == "cfg1xdsp2"


def test_groups_are_of_neighbours() -> None:
    placement = place(["0", "1", "2", "3", "4", "5"], "cfg2xdsp3", FACTS, "jit")
    assert placement.groups == ((0, 1, 2), (3, 4, 5))
    assert [placement.group_of(rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "names"), [("0,1,2", ("0", "1", "2")), (" CPU , cpu", ("cpu", "cpu")), ("07", ("7",))]
)
def test_devices_by_name(text: str, names: tuple[str, ...]) -> None:
    assert parse_devices(text) == names


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "--devices: ''; give at most 64 indices of GPUs, or cpu, as --devices 0,1,2,3, or cpu,cpu"),
        ("0,-1,x", "--devices: '-1', 'x'; give"),
        ("0,0", "--devices 0,0: GPU 0 is named twice; name each once"),
        ("0,00", "GPU 0 is named twice"),
        ("0,cpu", "--devices 0,cpu: devices must be alike, all GPUs or all cpu"),
        (",".join(["cpu"] * 65), "--devices: 65 devices; give at most 64"),
        ("1" * 90, "give at most 64"),
    ],
)
def test_what_are_no_devices(text: str, fault: str) -> None:
    with pytest.raises(BackendError) as caught:
        parse_devices(text)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "count", "found"),
    [("cfg2xdsp2", 4, (2, 2)), ("cfg2", 2, (2, 1)), ("dsp4", 4, (1, 4)), ("CFG3xDSP1", 3, (3, 1)), ("dsp1", 1, (1, 1))],
)
def test_forms(text: str, count: int, found: tuple[int, int]) -> None:
    assert parse_parallel(text, count) == found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "--parallel '': no such form; give cfg2, dsp4 or cfg2xdsp2"),
        ("tp4", "no such form"),
        ("x", "no such form"),
        ("cfg4", "a clip has 1 to 3 guidance branches"),
        ("cfg0xdsp4", "1 to 3 guidance branches"),
        ("dsp0", "dsp1 or more"),
        ("cfg2xdsp2", "--parallel cfg2xdsp2 is of 4 devices, --devices names 3; make them agree"),
    ],
)
def test_what_is_no_form(text: str, fault: str) -> None:
    with pytest.raises(BackendError) as caught:
        parse_parallel(text, 3)
    assert fault in str(caught.value)


def test_more_shares_than_frames_or_positions() -> None:
    chosen = Placement(devices=("cpu",) * 4, guidance=1, sequence=4, chosen=True)
    assert chosen.fitting(4, 9) == chosen
    with pytest.raises(
        RequestError, match="^3 token frames of 16 tokens cannot be shared by 4 devices; give --parallel "
    ):
        chosen.fitting(3, 16)
    with pytest.raises(RequestError, match="with dsp2 or less, or leave it out$"):
        chosen.fitting(8, 2)
    automatic = place(["cpu"] * 8, None, FACTS, "jit")
    assert str(automatic.fitting(3, 16)) == "cfg2xdsp3"
    assert automatic.fitting(3, 16).groups == ((0, 1, 2), (3, 4, 5))
    assert str(automatic.fitting(1, 16)) == "cfg2xdsp1"


@pytest.mark.parametrize(("guidance", "rungs", "least"), [(2, (2,), 2), (2, (3,), 2), (2, (4, 2), 2), (3, (4,), 2)])
def test_fewer_rows_than_graphs_take(guidance: int, rungs: tuple[int, ...], least: int) -> None:
    placement = Placement(devices=("cpu",) * guidance, guidance=guidance, sequence=1)
    with pytest.raises(RequestError, match=f"would have 1 of .* no fewer than {least}; give --parallel dsp{guidance},"):
        placement.check_rows(rungs, least)
    placement.check_rows(rungs, 1)
    placement.check_rows((guidance * least, 2 * guidance * least), least)
    Placement(devices=("cpu",) * 2, guidance=1, sequence=2).check_rows(rungs, least)


def test_a_group_without_rows_has_nothing_to_take() -> None:
    Placement(devices=("cpu",) * 3, guidance=3, sequence=1).check_rows((2,), 1)
