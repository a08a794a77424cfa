"""GPUs by name: how people write them, and what is said of names that are not known."""

import pytest

from stiv_deploy.export.engines.cli import target
from stiv_deploy.export.engines.gpus import FAMILIES, _plain, sm_of_gpu
from stiv_deploy.runtime.errors import RequestError


@pytest.mark.parametrize(
    ("text", "sm"),
    [
        ("RTX 5090", "120"),
        ("NVIDIA GeForce RTX 4090", "89"),
        ("rtx4070 ti super", "89"),
        ("L40S", "89"),
        ("RTX 6000 Ada Generation", "89"),
        ("Quadro RTX 6000", "75"),
        ("RTX PRO 6000 Blackwell", "120"),
        ("NVIDIA A100-SXM4-80GB", "80"),
        ("NVIDIA H100 80GB HBM3", "90"),
        ("DGX Spark", "121"),
        ("Tesla T4", "75"),
    ],
)
def test_names_as_people_and_drivers_write_them(text: str, sm: str) -> None:
    assert sm_of_gpu(text) == target(None, text) == sm


def test_no_two_gpus_are_called_alike() -> None:
    names = [_plain(name) for names in FAMILIES.values() for name in names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("text", "near"), [("RTX 4095", "RTX 4090"), ("L40X", "L40S"), ("", "RTX 4090, L40S")])
def test_unknown_names_are_told_what_is_like_them(text: str, near: str) -> None:
    with pytest.raises(RequestError, match=rf"--for '{text}': no GPU of this name is known; .*{near}.*with --sm$"):
        sm_of_gpu(text)


def test_one_of_both_ways() -> None:
    assert (target(None, None), target("SM89", None)) == ("auto", "89")
    with pytest.raises(RequestError, match="^--sm 89 and --for 'L40S' both name what to build for; give one of them$"):
        target("89", "L40S")
