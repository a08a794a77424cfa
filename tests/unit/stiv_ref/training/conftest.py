"""Short runs: made, stopped, poisoned."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from stiv_deploy.stiv_ref.data.open_source import open_source
from stiv_deploy.stiv_ref.data.source import Batch, Source
from stiv_deploy.stiv_ref.recipe import Recipe, Stage
from stiv_deploy.stiv_ref.training import trainer

At = tuple[int, int]


class Runs:
    """What finished and stopped runs left behind."""

    @staticmethod
    def losses(out: Path) -> dict[At, float]:
        """Loss by stage and step; where a step was done twice, the later one."""
        entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return {(entry["stage"], entry["step"]): entry["loss"] for entry in entries}

    @staticmethod
    def files(out: Path, *folders: str) -> dict[str, dict[str, torch.Tensor]]:
        """All tensors of the safetensors files in ``folders`` of a run."""
        found = [path for folder in folders for path in (out / folder).rglob("*.safetensors")]
        return {str(path.relative_to(out)): load_file(path) for path in found}

    @classmethod
    def assert_same(cls, out: Path, whole: Path) -> None:
        """Losses and everything that was written are equal, bit for bit."""
        assert cls.losses(out) == cls.losses(whole)
        folders = ("state", "stages", "checkpoint")
        got, wanted = cls.files(out, *folders), cls.files(whole, *folders)
        assert got.keys() == wanted.keys()
        for name, tensors in wanted.items():
            assert got[name].keys() == tensors.keys()
            assert all(torch.equal(got[name][key], tensors[key]) for key in tensors), name

    @staticmethod
    def interrupt() -> None:
        """What Ctrl-C does."""
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="session")
def runs() -> type[Runs]:
    return Runs


class Watched:
    """A source that calls ``before`` with (stage, step) before it gives the batch of that step."""

    def __init__(self, source: Source, number: int, before: Callable[[At], None]) -> None:
        self.source, self.number, self.before = source, number, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def batches(self, steps: range, parts: Sequence[range]) -> Iterator[list[Batch]]:
        for step, batches in zip(steps, self.source.batches(steps, parts), strict=True):
            self.before((self.number, step))
            yield batches


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[At, Callable[[], None]], None]:
    """Call something once, when the data of (stage, step) is asked for."""

    def arrange(at: At, action: Callable[[], None]) -> None:
        left = [action]

        def before(now: At) -> None:
            if now == at and left:
                left.pop()()

        def opened(recipe: Recipe, stage: Stage, number: int) -> Any:
            return Watched(open_source(recipe, stage, number), number, before)

        monkeypatch.setattr(trainer, "open_source", opened)

    return arrange


@pytest.fixture(scope="session")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def whole(_whole: Path, recipe: Recipe) -> Path:
    """The folder of one uninterrupted run of the short recipe, made once: compare with it, do not write into it."""
    if not (_whole / "checkpoint").exists():
        trainer.train(trainer.TrainRequest(recipe=recipe, out=_whole))
    return _whole


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone: the paths of sharded parameters, without a second process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
