"""Processes that load ahead: signals are the parent's, what a worker lacks is one line, and none outlives its use."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Sampler, _utils

from stiv_deploy.stiv_ref.data.loader import Sample
from stiv_deploy.stiv_ref.data.workers import load_ahead, tensors_of
from stiv_deploy.stiv_ref.errors import DataError
from stiv_deploy.stiv_ref.text import TextStates


class Numbers(Dataset[torch.Tensor]):
    """Item k is [k]; the item ``slow`` takes for ever."""

    def __init__(self, slow: int = -1) -> None:
        self.slow = slow

    def __getitem__(self, number: int) -> torch.Tensor:
        if number == self.slow:
            time.sleep(600)
        return torch.tensor([number])


class Singles(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[number] for number in range(8)])


def ahead(dataset: Numbers, workers: int = 2) -> Iterator[torch.Tensor]:
    return load_ahead(dataset, workers, "clips", collate=torch.cat, batch_sampler=Singles())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_leave_signals_to_the_parent(number: signal.Signals) -> None:
    items = ahead(Numbers())
    found = [int(next(items))]
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, number)
    assert found + [int(item) for item in items] == list(range(8))
    assert not multiprocessing.active_children()


def test_a_worker_that_hangs_does_not_outlive_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # how long torch waits for it to end by itself
    items = ahead(Numbers(slow=1))
    assert int(next(items)) == 0
    items.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 30
    while multiprocessing.active_children():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("said", ["unable to allocate shared memory(shm) for file </torch_1>: No space left (28)", ""])
def test_what_a_worker_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def refused(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.Tensor, "share_memory_", refused)
    wanted = (
        r"shared memory \(/dev/shm has \d+ MiB free\); give more .* workers = 0" if said else "crashed: .* workers = 0"
    )
    with pytest.raises(DataError, match=f"^clips: .*{wanted}") as caught:
        list(ahead(Numbers()))
    assert "\n" not in str(caught.value)
    assert len(list(ahead(Numbers(), workers=0))) == 8, "without workers nothing is shared"


def test_all_tensors_of_a_sample_are_found() -> None:
    text = TextStates(torch.ones(1), torch.ones(2), torch.ones(3))
    sample = Sample(name="a", caption="b", micro=torch.ones(4), video=torch.ones(5), text=text)
    assert sorted(tensor.numel() for tensor in tensors_of([sample, "text", None])) == [1, 2, 3, 4, 5]


RECIPE = """
name = "short"
threads = 1
[efficiency]
workers = 2
[model]
base = "tiny"
blocks = 1
[vae]
channels = [4, 4]
steps = 100000
batch = 2
learning_rate = 1e-3
[data.clips]
kind = "videos"
path = "clips"
[[stages]]
task = "t2i"
steps = 1
batch = 2
learning_rate = 1e-3
"""


@pytest.mark.alone
@pytest.mark.slow
def test_sigterm_to_the_whole_group_saves_and_exits_130(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    """As batch systems and ``timeout`` send it: to the process, and to all its workers."""
    for number in range(4):
        video = write_video(f"clips/{number}.mkv", np.full((8, 32, 32, 3), 20 * number, np.uint8))
        video.with_suffix(".txt").write_text(f"clip {number}")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    program = "import sys; from stiv_deploy.runtime.command.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "train", "recipe.toml", "--out", "run", "--quiet"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline, log = time.monotonic() + 90, tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (130, False)
    assert "the same command goes on from" in errors
    assert (tmp_path / "run" / "state" / "position.json").is_file()
