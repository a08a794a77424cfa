"""``stiv calibrate`` as a user runs it."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stiv_deploy.calibration.plan import default_plan, load_plan
from stiv_deploy.calibration.scales import check_fits, load_scales
from stiv_deploy.runtime.command.main import main
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, checkpoint_hash

Stiv = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stiv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stiv:
    """Runs ``stiv calibrate`` with arguments: exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stiv", "calibrate", *map(str, arguments)])
        code = main()
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


SHORT = ("--samples", 2, "--steps", 12, "--batch", 1)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_scale_file_with_its_provenance_and_report(
    stiv: Stiv, micro: Checkpoint, micro_path: Path, tmp_path: Path, precision: str
) -> None:
    out = tmp_path / "scales.safetensors"
    code, output, error = stiv(micro_path, "--precision", precision, "--out", out, *SHORT, "--quiet")
    assert (code, error) == (0, "")
    assert f"{out}: {precision} scales" in output
    names = ["scales.report.json", "scales.report.md", "scales.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names, "no state is left behind"
    scales = load_scales(out)
    check_fits(scales, checkpoint_hash(micro_path), precision, "test")  # type: ignore[arg-type]
    recipe = scales.provenance.recipe
    assert (recipe["samples"], recipe["steps"], recipe["seed"]) == (2, 12, 0)
    assert recipe["calibrator"] == ("percentile" if precision == "int8" else "max")
    assert scales.provenance.model == micro.config.model
    assert {"torch", "nvidia-modelopt", "stiv-deploy"} <= scales.provenance.tools.keys()
    per_channel = scales.amax["block_00.ffn.up.weight"].dim() == 1
    assert per_channel == (precision == "int8")
    clipped = [row["clipped"] for row in json.loads((tmp_path / "scales.report.json").read_text())["activations"]]
    assert max(clipped) <= 1e-4 + 1e-9
    assert (max(clipped) > 0) == (precision == "int8")


def test_a_report_as_json(stiv: Stiv, micro_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "scales.safetensors"
    code, output, _ = stiv(micro_path, "--precision", "fp8", "--out", out, *SHORT, "--json")
    report = json.loads(output)
    assert code == 0
    assert (report["scales"], report["quantization"], report["sweep"]) == (str(out), "fp8", None)
    assert report["checkpoint"] == checkpoint_hash(micro_path)


def test_options_reach_the_scales(stiv: Stiv, micro_path: Path, tmp_path: Path) -> None:
    def ranges(name: str, *options: object) -> dict[str, torch.Tensor]:
        out = tmp_path / f"{name}.safetensors"
        assert stiv(micro_path, "--out", out, *SHORT, "--quiet", *options)[0] == 0
        return dict(load_scales(out).amax)

    plain = ranges("plain", "--precision", "fp8")
    clip = ("--calibrator", "percentile", "--percentile", 90)
    channels = ranges("channels", "--precision", "fp8", "--per-channel", *clip)
    smooth = ranges("smooth", "--precision", "int8", "--smoothquant", 0.5)
    other = ranges("other", "--precision", "fp8", "--seed", 5)
    name = "block_00.ffn.up"
    assert channels[f"{name}.weight"].max() == plain[f"{name}.weight"]
    assert channels[f"{name}.weight"].shape == (128,)
    assert channels[f"{name}.input"] < plain[f"{name}.input"]
    assert smooth[f"{name}.smooth"].shape == (32,)
    assert f"{name}.smooth" not in plain
    assert other[f"{name}.input"] != plain[f"{name}.input"]


def test_own_prompts_and_images(stiv: Stiv, micro_path: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "prompts.txt").write_text("digit one moving left\n")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "images" / "red.png")
    out = tmp_path / "scales.safetensors"
    given = ("--prompts", tmp_path / "prompts.txt", "--images", tmp_path / "images")
    assert stiv(micro_path, "--precision", "fp8", "--out", out, *SHORT, "--quiet", *given)[0] == 0
    assert len(str(load_scales(out).provenance.recipe["images"])) == 64


@pytest.mark.slow
def test_a_sweep_writes_figures_picture_and_a_plan_within_the_budget(
    stiv: Stiv, micro: Checkpoint, micro_path: Path, tmp_path: Path
) -> None:
    out, plan, budget = tmp_path / "scales.safetensors", tmp_path / "mixed.json", 0.02
    command = (micro_path, "--precision", "fp8", "--out", out, *SHORT, "--quiet", "--sweep", "--budget", budget)
    code, output, _ = stiv(*command, "--plan", plan)
    assert code == 0
    assert f"{plan}: the plan" in output
    everything, default, fitted = json.loads((tmp_path / "scales.sweep.json").read_text())["plans"]
    assert max(fitted["measured"]) <= budget < max(default["measured"]) < max(everything["measured"])
    assert 0 < len(fitted["high"]) < 16, "some layers, not all"
    chosen = load_plan(plan, micro.config.model, "fp8")
    assert {name for name in default_plan(micro.config.model, "fp8").layers if not chosen.quantized(name)} >= set(
        fitted["high"]
    )
    assert (tmp_path / "scales.sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*partial*"))


BAD = [
    (("--precision", "fp4"), "--precision fp4: cannot be calibrated; use fp8, int8, nvfp4"),
    (("--samples", "0"), "--samples 0: Input should be greater than 0"),
    (("--steps", "-1"), "--steps -1: Input should be greater than 0"),
    (("--seed", "-1"), "--seed -1: Input should be greater than or equal to 0"),
    (("--calibrator", "entropy"), "--calibrator entropy: Input should be 'max' or 'percentile'"),
    (("--calibrator", "percentile", "--percentile", "101"), "--percentile 101"),
    (("--smoothquant", "0.5"), "--smoothquant is for --precision int8"),
    (("--precision", "int8", "--smoothquant", "1.5"), "--smoothquant 1.5: alpha must be above 0 and at most 1"),
    (("--precision", "int8", "--smoothquant", "0.5", "--calibrator", "percentile"), "needs --calibrator max"),
    (("--precision", "int8", "--per-channel"), "--per-channel is for --precision fp8"),
    (("--budget", "0.1"), "--budget 0.1: needs --sweep"),
    (("--sweep", "--budget", "0"), "--budget 0: must be positive"),
    (("--sweep", "--budget", "inf"), "--budget inf: must be positive and finite"),
    (("--sweep", "--budget", "nan"), "--budget nan: must be positive and finite"),
    (("--samples", "1" + "0" * 20), "Input should be less than or equal to 1000000"),
    (("--steps", "1" + "0" * 20), "Input should be less than or equal to 10000"),
    (("--seed", str(2**63)), "Input should be less than 9223372036854775808"),
    (("--percentile", "nan"), "--percentile nan: Input should be a finite number"),
    (("--sweep", "--steps", "3"), "--steps 3: too few for a sweep"),
    (("--prompts", "absent.txt"), "absent.txt: no such file of prompts"),
    (("--images", "absent"), "absent: no such folder of images"),
    (("--plan", "plan.json"), "--plan plan.json: is written by a sweep; add --sweep"),
    (("--sweep", "--plan", "absent/plan.json"), "absent/plan.json: the folder absent does not exist"),
    (("--out", "absent/scales.safetensors"), "the folder absent does not exist; make it first"),
    (("--out", "scales.bin"), "--out scales.bin: scales are a safetensors file"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(
    stiv: Stiv,
    micro_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = ("--precision", "fp8", "--out", "scales.safetensors")
    code, _, error = stiv(micro_path, *before, *options)
    assert code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_checkpoint_is_one_line(stiv: Stiv, tmp_path: Path) -> None:
    code, _, error = stiv(tmp_path / "absent", "--precision", "fp8", "--out", tmp_path / "scales.safetensors")
    assert code == 2
    assert "no checkpoint here" in error
    assert not list(tmp_path.iterdir())


def test_a_missing_modelopt_is_one_line_before_any_sampling(
    stiv: Stiv, micro_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization.config", None)
    code, _, error = stiv(micro_path, "--precision", "fp8", "--out", tmp_path / "scales.safetensors")
    assert code == 2
    assert "pip install 'stiv-deploy[calibration]'" in error
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_says_that_it_goes_on(
    stiv: Stiv, micro_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stiv_deploy.calibration import collect

    out, real, calls = tmp_path / "scales.safetensors", collect.sample, []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    command = (micro_path, "--precision", "fp8", "--out", out, *SHORT, "--quiet")
    monkeypatch.setattr(collect, "sample", interrupted)
    code, _, error = stiv(*command)
    state = tmp_path / "scales.safetensors.partial-state"
    assert code == 130
    assert f"stopped; the same command goes on from {state}" in error
    assert [path.name for path in tmp_path.iterdir()] == [state.name]
    code, _, error = stiv(micro_path, "--precision", "fp8", "--out", out, *SHORT, "--seed", 3)
    assert code == 2
    assert "a calibration with other settings was stopped here" in error
    assert stiv(*command)[0] == 0
    assert len(calls) == 3, "the first unit was not sampled again"
    resumed = out.read_bytes()
    assert stiv(*command)[0] == 0
    assert out.read_bytes() == resumed


@pytest.mark.parametrize("module", ["collect", "scales"])
def test_a_full_disk_is_one_line_and_loses_nothing(
    stiv: Stiv, micro_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """While the first statistics are kept, or when the scales are written: then the sampling is not done again."""
    from stiv_deploy.calibration import collect, scales

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "scales.safetensors"
    monkeypatch.setattr({"collect": collect, "scales": scales}[module], "save_tensors", full)
    code, _, error = stiv(micro_path, "--precision", "fp8", "--out", out, "--samples", 1, "--steps", 1, "--quiet")
    assert (code, error.count("\n")) == (2, 1)
    assert f"{out}: cannot be written (No space left on device); what was sampled is kept" in error
    kept = [] if module == "collect" else ["scales.safetensors.partial-state"]
    assert [path.name for path in tmp_path.iterdir()] == kept


def test_importing_the_command_needs_nothing_heavy() -> None:
    code = "import sys, stiv_deploy.calibration.cli; print([m for m in ('torch', 'modelopt') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
