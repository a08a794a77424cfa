"""Contestants in processes of their own, so that neither memory nor threads nor libraries are shared."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np

from stiv_deploy.runtime.backends import BACKENDS
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import MeasurementError, RequestError, briefly, few, one_line
from stiv_deploy.runtime.pipeline.request import GenerationRequest

CHILD = "stiv_deploy.runtime.command.bench.rival_process"
BUNDLE = "stiv_deploy.runtime.command.bench.bundle_rival"
REFERENCE = "stiv_deploy.stiv_ref.rival"
TORCH = {"torch-eager": False, "torch-compile": True}
"""Baselines by the reference, and whether they are compiled."""
NAMES = (*TORCH, *BACKENDS)
Order = Mapping[str, Any]


def is_bundle(name: str) -> bool:
    """Whether a baseline is the folder of another bundle."""
    return name not in NAMES and Path(name).is_dir()


def check_names(names: Sequence[str]) -> None:
    """:class:`RequestError` for an unknown baseline or none; ``ModuleNotFoundError`` where torch is missing."""
    if not names:
        raise RequestError(
            f"nothing to measure against; give --baseline, one or more of {', '.join(NAMES)}, or the folder of a bundle"
        )
    for name in names:
        if name not in NAMES and not is_bundle(name):
            raise RequestError(f"--baseline {briefly(name)}: there are {', '.join(NAMES)}, or the folder of a bundle")
    if set(names) & set(TORCH) and find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


def check_merged(names: Sequence[str], bundle: Bundle) -> None:
    """:class:`RequestError` where LoRAs were merged into ``bundle`` and the reference, which has none, is to run."""
    loras = [each.name for each in bundle.manifest.lora]
    if loras and set(names) & set(TORCH):
        raise RequestError(
            f"{bundle.folder}: {few(loras)} was merged into it, and PyTorch runs the checkpoint without, which makes "
            "other clips; measure a bundle without LoRA, which takes as long, or give other baselines"
        )


class Rival:
    """One of them, from the order that its process got. It is asked for clips, and answers with seconds."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.name, self._process = name, process
        self.cpu_seconds = 0.0
        """Of all threads of its process, from its start to its last answer."""

    def start(self, order: Order) -> Self:
        """Hand out ``order``, and wait until it is ready; :class:`MeasurementError` with what it says otherwise."""
        self._ask(order)
        return self

    def make(self, requests: Sequence[GenerationRequest], keep: Path | None = None) -> float:
        """Seconds from the prompts of ``requests`` to frames in memory; these go into the .npy file ``keep``."""
        asked = {
            "prompts": [each.prompt for each in requests],
            "seeds": [each.seed for each in requests],
            "keep": None if keep is None else str(keep),
        }
        answer = self._ask(asked)
        self.cpu_seconds = answer["cpu_seconds"]
        return float(answer["seconds"])

    def clips(self, requests: Sequence[GenerationRequest], folder: Path) -> np.ndarray:
        """Frames uint8 [B, F, H, W, 3]."""
        path = folder / "clips.npy"
        self.make(requests, path)
        return np.asarray(np.load(path))

    def _ask(self, asked: Order) -> dict[str, Any]:
        source, target = self._process.stdin, self._process.stdout
        assert source is not None
        assert target is not None
        try:
            source.write(json.dumps(asked) + "\n")
            source.flush()
            line = target.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"it ended with {self._process.wait()}"}
        if "error" in answer:
            raise MeasurementError(f"{self.name} failed: {one_line(answer['error'], 300)}")
        return answer


@contextmanager
def rival(name: str, order: Order) -> Iterator[Rival]:
    """The contestant of ``order``, ready; it ends with the block, however that ends."""
    command = [sys.executable, "-m", CHILD]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield Rival(name, process).start(order)
        finally:
            process.kill()
