"""The training log: lines, bands of the timestep, resuming, TensorBoard, and silence on other ranks."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from stiv_deploy.stiv_ref.errors import StivRefError
from stiv_deploy.stiv_ref.recipe import Logging
from stiv_deploy.stiv_ref.training.log import Log, loss_by_t

VALUES = {"loss": 0.5, "gradient_norm": 2.0, "learning_rate": 1e-3}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_line_says_what_a_step_was(tmp_path: Path) -> None:
    with Log(tmp_path, Logging()) as log:
        for step in log.steps("1 t2i", range(3, 5)):
            time.sleep(0.01)
            log.step(
                *(1, "low", "t2i", step, VALUES),
                timesteps=torch.tensor([0.05, 0.25, 0.29, 1.0]),
                losses=torch.tensor([1.0, 2.0, 4.0, 8.0]),
                tokens=100,
            )
    first, second = lines(tmp_path)
    assert first.items() >= {"stage": 1, "name": "low", "task": "t2i", "step": 3, "samples": 4, **VALUES}.items()
    assert first["loss_by_t"] == {"0.0": 1.0, "0.2": 3.0, "0.9": 8.0}
    assert 0 < first["tokens_per_second"] <= 100 / 0.01
    assert second["step"] == 4
    assert second["seconds"] >= first["seconds"] >= 0.01


@pytest.mark.alone
def test_throughput_leaves_out_what_came_between_steps(tmp_path: Path) -> None:
    with Log(tmp_path, Logging()) as log:
        for step in log.steps("1 t2i", range(2)):
            log.step(1, "low", "t2i", step, VALUES, tokens=1000)
            time.sleep(0.2)  # saving, sampling
    assert all(line["tokens_per_second"] > 1000 / 0.2 for line in lines(tmp_path))


def test_tenths_of_the_timestep() -> None:
    edges = torch.tensor([0.0, 0.0999, 0.1, 0.5, 0.9999, 1.0])
    got = loss_by_t(edges, torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0], dtype=torch.bfloat16))
    assert got == {"0.0": 2.0, "0.1": 5.0, "0.5": 7.0, "0.9": 10.0}


def test_a_resumed_run_goes_on_counting_after_a_torn_line(tmp_path: Path) -> None:
    whole = json.dumps({"stage": 1, "task": "t2i", "step": 7, "loss": 1.0, "seconds": 1000.0})
    (tmp_path / "log.jsonl").write_text(whole + '\n{"stage": 1, "task": "t')
    with Log(tmp_path, Logging()) as log:
        log.step(1, "low", "t2i", 8, VALUES)
    text = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(text) == 3
    assert 1000.0 <= json.loads(text[2])["seconds"] < 1010.0


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, Logging(tensorboard=True), pytest.fail, enabled=False) as log:
        steps = list(log.steps("1 t2i", range(2, 4)))
        log.step(1, "low", "t2i", 2, VALUES, losses=torch.ones(1), timesteps=torch.ones(1), tokens=5)
        log.picture(1, "low", 2, tmp_path / "absent.png")
    assert steps == [2, 3]
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_progress_tells_loss_and_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, int, int]] = []
    with Log(tmp_path, Logging(), lambda *step: told.append(step)) as log:
        for step in log.steps("2 ti2v", range(1, 3)):
            log.step(2, "video", "ti2v", step, VALUES, tokens=10)
    assert [step[1:] for step in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[0][0] == "2 ti2v"
    assert re.fullmatch(r"2 ti2v  loss 0\.5000  [0-9,]+ tokens/s", told[-1][0])
    assert capsys.readouterr() == ("", "")


def test_tensorboard_has_the_same_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (4, 3), "red").save(tmp_path / "sheet.png")
    for start in (0, 2):  # the second is a resumed run that repeats step 2
        with Log(tmp_path, Logging(tensorboard=True)) as log:
            for step in log.steps("1 t2i", range(start, start + 3)):
                losses = torch.tensor([start + 1.0])
                log.step(1, "low", "t2i", step, VALUES, timesteps=torch.tensor([0.45]), losses=losses, tokens=7)
            log.picture(1, "low", 2, tmp_path / "sheet.png")
    events = EventAccumulator(str(tmp_path / "tensorboard" / "1-low"))
    events.Reload()
    assert {"loss", "gradient_norm", "learning_rate", "tokens_per_second", "samples"} <= set(events.Tags()["scalars"])
    assert [(each.step, each.value) for each in events.Scalars("loss_by_t/0.4")] == [
        (0, 1),
        (1, 1),
        (2, 3),
        (3, 3),
        (4, 3),
    ]
    assert events.Images("samples")[0].width == 4


def test_absent_tensorboard_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(StivRefError, match=r"not installed; run: pip install 'stiv-deploy\[tensorboard\]'"):
        Log(tmp_path, Logging(tensorboard=True))
    assert list(tmp_path.iterdir()) == []
    Log(tmp_path, Logging(tensorboard=True), enabled=False)
