"""The demos: their stages are what their commands ask for, in order; what stops them, what only fails them."""

import json
import platform
import resource
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from stiv_deploy.calibration import stage as calibration_stage
from stiv_deploy.export import bundle_from_checkpoint
from stiv_deploy.export.audit import audit
from stiv_deploy.export.demo import clips, quantized, shared
from stiv_deploy.export.demo import demo as command
from stiv_deploy.export.demo.finish import demo_report, finish, following
from stiv_deploy.export.demo.shared import Demo, Kind, Stage
from stiv_deploy.export.engines import build
from stiv_deploy.export.errors import CheckError, ExportError
from stiv_deploy.export.parity import stage as parity_stage
from stiv_deploy.runtime.command.group import app
from stiv_deploy.runtime.command.main import main
from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.pipeline import long_stage, views_stage
from stiv_deploy.runtime.pipeline import stage as clips_stage
from stiv_deploy.stiv_ref.checkpoint import TrainedOn, open_checkpoint

WORKERS = (
    (calibration_stage, "calibrate"),
    (bundle_from_checkpoint, "export_bundle"),
    (build, "build_engines"),
    (audit, "audit_bundle"),
    (parity_stage, "run_parity"),
    (clips_stage, "make_clips"),
    (long_stage, "make_long"),
    (views_stage, "make_views"),
)
Stages = Callable[[Demo], list[Stage]]
STAGES: dict[str, Stages] = {
    "float32": lambda demo: command.plain_stages(demo, "89"),
    "fp8": lambda demo: quantized.quantized_stages(demo, "89", "fp8"),
    "int8": lambda demo: quantized.quantized_stages(demo, "89", "int8"),
}
each_demo = pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)


class Asked(BaseException):
    """What a command hands to its stage."""


CLIPS = ["generate", "generate", "interpolate", "extend", "views"]


def kinds(stages: list[Stage]) -> list[str]:
    return [stage.name for stage in stages]


def test_stages_are_in_order(demo: Demo) -> None:
    assert kinds(STAGES["float32"](demo)) == ["export", "build", "parity", *CLIPS]
    names = ["calibrate", "export", "build", "audit", "parity", *CLIPS]
    assert kinds(STAGES["fp8"](demo)) == kinds(STAGES["int8"](demo)) == names


@each_demo
def test_every_command_makes_the_request_that_its_stage_runs(
    demo: Demo, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(request: object, _progress: object = None) -> None:
        raise Asked(request)

    for module, name in WORKERS:
        monkeypatch.setattr(module, name, ask)
    clips.write_given(demo)
    for stage in stages(demo):
        monkeypatch.setattr(sys, "argv", shlex.split(stage.command))
        with pytest.raises(Asked) as asked:
            main()
        assert asked.value.args == (stage.request,), stage.command


@each_demo
def test_without_the_builder_the_report_says_why(demo: Demo, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "missing_library", lambda _: "not installed")
    assert not {"build", "audit"} & set(kinds(stages(demo)))
    (note,) = demo.notes
    assert note.startswith("No engines were built")
    assert note.endswith(": not installed.")
    assert demo_report(demo, "Demo").notes == (note,)


class Report:
    """A report of one number, and a gate."""

    def __init__(self, number: int, passed: bool) -> None:
        self.number, self.passed = number, passed


def gated(name: str, passed: bool, calls: list[str]) -> Kind:
    def run(request: int, progress: Callable[[str, int, int], None]) -> Report:
        progress("half", 1, 2)
        calls.append(name)
        return Report(request, passed)

    return Kind(name, run, lambda _: None, lambda report: f"number {report.number}", lambda it: json.dumps(it.number))


def stage_of(request: Any, json_file: Path | None = None) -> Stage:
    return Stage(title=f"Stage {request}", words=("with space", request), request=request, json=json_file)


def test_a_failed_gate_fails_the_demo_and_stops_nothing(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(shared, "KINDS", {int: gated("audit", False, calls), str: gated("export", True, calls)})
    demo.run([stage_of(5, demo.out / "audit.json"), stage_of("6")])
    assert calls == ["audit", "export"]
    assert demo.failed == ["audit"]
    assert (demo.out / "audit.json").read_text() == "5\n"
    (first, second) = demo_report(demo, "Demo").stages
    assert (first.outcome, first.passed, second.passed) == ("number 5", False, True)
    assert first.command == f"stiv audit 'with space' 5 --json {demo.out / 'audit.json'}"
    finish(demo, "Demo")
    text = (demo.out / "report.html").read_text(encoding="utf-8")
    assert "<title>Demo: FAILED: audit</title>" in text
    assert "stiv audit &#x27;with space&#x27; 5 --json" in text


def test_an_error_ends_the_demo_with_its_own_words(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_request: object, _progress: object) -> None:
        raise CheckError("graph head differs")

    later: list[str] = []
    kinds = {int: Kind("export", broken, lambda _: None, str), str: gated("parity", True, later)}
    monkeypatch.setattr(shared, "KINDS", kinds)
    with pytest.raises(CheckError, match="^graph head differs$"):
        demo.run([stage_of(1), stage_of("2")])
    assert later == []


def test_a_passed_demo_says_so(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "KINDS", {int: gated("parity", True, [])})
    demo.run([stage_of(1)])
    assert demo_report(demo, "Demo").failed == ()
    assert [report.number for report in demo.reports("parity")] == [1]


def test_a_report_that_fails_leaves_the_old_one(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(demo, "Demo")
    old = (demo.out / "report.html").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left on device"):
        finish(demo, "Other")
    assert {path.name: path.read_bytes() for path in demo.out.iterdir()} == {"report.html": old}


def test_what_is_next_parses(demo: Demo) -> None:
    group: Any = typer.main.get_command(app)
    commands = [shlex.split(command) for _, command in following(demo)]
    assert len(commands) > 3
    for program, name, *arguments in commands:
        assert program == "stiv"
        group.get_command(group.context_class(group), name).make_context(name, arguments).close()


def test_the_report_says_on_what_and_with_which_versions(demo: Demo) -> None:
    values = dict(demo_report(demo, "Demo").machine)
    assert values["Python"] == platform.python_version()
    assert {"CPU", "stiv-deploy", "torch", "onnxruntime"} <= set(values)


def test_unknown_precision_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--precision fp4: the demo has fp8, int8, nvfp4"):
        command.demo(out=tmp_path / "out", precision="fp4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sm", "banana"], "supports SM 89, 120, portable, auto; got 'banana'"),
        (["--sm", "90"], "got '90'"),
        (["--sm", "86", "--precision", "fp8"], "--sm 86: no FP8 arithmetic (it begins with SM 89); give --precision i"),
        (
            ["--precision", "nvfp4"],
            "--sm 89: no NVFP4 products in TensorRT-RTX (SM 120 and 121 have); give --precision",
        ),
    ],
)
def test_a_gpu_that_nothing_can_be_built_for_is_refused_before_the_first_stage(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shared, "import_tensorrt", lambda _: SimpleNamespace(__version__="1.7"))
    monkeypatch.setattr(build, "targets", lambda _: ["86", "89", "120"] if "fp8" in options else ["89", "120"])
    monkeypatch.setattr(Demo, "run", lambda *_: pytest.fail("a stage began"))
    out = tmp_path / "demo"
    monkeypatch.setattr(sys, "argv", ["stiv", "demo", "--out", str(out), *options])
    assert main() == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), message in err, out.exists()) == (1, True, False), err


def test_an_architecture_is_named_as_people_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "missing_library", lambda _: "not installed")
    assert shared.check_sm("SM89", "fp8") == "89"


def test_a_checkpoint_that_knows_less_has_fewer_clips(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_checkpoint(demo.checkpoint).config
    known = TrainedOn(tasks=("t2v", "ti2v"), givings=("none", "first"), strides=(1,), sizes=((64, 64),), frames=(16,))
    for trained in (None, known):
        folder = SimpleNamespace(config=config.model_copy(update={"trained": trained}))
        monkeypatch.setattr(clips, "open_checkpoint", lambda _, folder=folder: folder)
        assert kinds(clips.clip_stages(demo)) == ["generate", "generate"]


def test_given_pictures_are_as_large_as_clips_and_show_something(demo: Demo) -> None:
    clips.write_given(demo)
    for name in (clips.FIRST, clips.VIEW):
        with Image.open(demo.out / name) as image:
            assert image.size == (64, 64)
            assert np.ptp(np.asarray(image)) > 128


@pytest.mark.parametrize("out", ["file", "file/deep", "/proc/demo"])
def test_no_place_for_a_demo(
    out: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(sys, "argv", ["stiv", "demo", "--checkpoint", str(checkpoint), "--out", out])
    assert main() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"error: {out}: cannot be written" in err


def test_a_full_disk_ends_a_demo_in_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "argv", ["stiv", "demo", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "demo")])
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        assert main() == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "cannot be written (File too large); make room" in err


def test_a_demo_without_a_checkpoint_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    monkeypatch.setattr(sys, "argv", ["stiv", "demo", "--checkpoint", str(tmp_path / "none"), "--out", str(out)])
    assert main() == 2
    assert not out.exists()
