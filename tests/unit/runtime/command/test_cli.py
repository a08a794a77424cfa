"""The ``stiv`` command: what it writes, what it refuses and with which code, and how it stops."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stiv_deploy.runtime.command import main as main_module
from stiv_deploy.runtime.command.cli import parse_frames
from stiv_deploy.runtime.errors import RequestError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run ``stiv`` in this process: exit code, stdout, stderr."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stiv", *map(str, arguments)])
        code = main_module.main()
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, handler)


COMMANDS = """
import typer
from stiv_deploy.runtime.errors import Cancelled, OutputError

def refused() -> None:
    "Raises a user error of several lines."
    raise OutputError("first\\n  second")

def broken() -> None:
    "Has a fault."
    raise ZeroDivisionError("ours")

def interrupted() -> None:
    "Is stopped by Ctrl-C."
    raise KeyboardInterrupt

def cancelled() -> None:
    "Is cancelled."
    raise Cancelled("stopped after step 3")

def failing() -> None:
    "Ends with its own code."
    raise typer.Exit(3)

def heavy() -> None:
    "Needs a library when it runs."
    raise ModuleNotFoundError("No module named 'torch'", name="torch")

several = typer.Typer(help="Has commands of its own.")

@several.command()
def first(number: int) -> None:
    "The first of them."
    typer.echo(f"first {number}")

@several.command()
def second() -> None:
    "The second, which refuses."
    raise OutputError("refused")

def buggy() -> None:
    "Imports a module that does not exist."
    import stiv_deploy.runtime.nonsense
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Register the commands above, and ``absent`` and ``damaged``, whose modules need what is missing."""
    (tmp_path / "test_only_commands.py").write_text(COMMANDS)
    (tmp_path / "test_only_absent.py").write_text("raise ModuleNotFoundError('No module named onnx', name='onnx')")
    (tmp_path / "test_only_imported.py").write_text("raise SystemError('imported by mistake')")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("refused", "broken", "interrupted", "cancelled", "failing", "heavy", "buggy", "several")
    values = {name: f"test_only_commands:{name}" for name in names} | {"absent": "test_only_absent:absent"}
    points = {name: EntryPoint(name, value, main_module.GROUP) for name, value in values.items()}
    monkeypatch.setattr(main_module, "_commands", lambda: points)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("refused", 2, "error: first second\n"),
        ("interrupted", 130, "interrupted\n"),
        ("cancelled", 130, "error: stopped after step 3\n"),
        ("failing", 3, ""),
        ("heavy", 2, "error: torch is not installed; run: pip install 'stiv-deploy[ref]'\n"),
        ("absent", 2, "error: onnx is not installed; run: pip install 'stiv-deploy[export]'\n"),
        ("nothing", 2, "error: No such command 'nothing'. (see 'stiv --help')\n"),
    ],
)
def test_exit_codes(run: Run, commands: Path, name: str, code: int, message: str) -> None:
    assert run(name) == (code, "", message)


@pytest.mark.parametrize(("name", "error"), [("broken", ZeroDivisionError), ("buggy", ModuleNotFoundError)])
def test_a_fault_of_ours_keeps_its_traceback(run: Run, commands: Path, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run(name)


def test_help_survives_a_command_that_cannot_be_imported(run: Run, commands: Path) -> None:
    code, out, _ = run("--help")
    words = " ".join(out.replace("│", " ").split())
    assert code == 0
    assert "absent" in words
    assert "(not available: onnx is not installed; run: pip install 'stiv-deploy[export]')" in words
    assert "Needs a library when it runs." in words


def test_a_command_may_have_commands_of_its_own(run: Run, commands: Path) -> None:
    assert run("several", "first", 3) == (0, "first 3\n", "")
    assert run("several", "second") == (2, "", "error: refused\n")
    assert run("several", "third") == (2, "", "error: No such command 'third'. (see 'stiv several --help')\n")
    assert run("several", "first") == (2, "", "error: Missing argument 'number'. (see 'stiv several first --help')\n")
    code, out, _ = run("several", "--help")
    assert code == 0
    assert all(words in out for words in ("stiv several", "The first of them.", "The second, which refuses."))
    words = " ".join(run("--help")[1].replace("│", " ").split())
    assert "several Has commands of its own." in words


def test_only_the_command_that_runs_is_imported(run: Run, commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = main_module._commands() | {"other": EntryPoint("other", "test_only_imported:other", main_module.GROUP)}
    monkeypatch.setattr(main_module, "_commands", lambda: points)
    assert run("failing")[0] == 3


def test_help_teaches_the_workflow(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    places = [out.index(f"stiv {name} ") for name in ("train", "export", "build", "parity", "generate")]
    assert places == sorted(places)
    assert all(name in out for name in ("inspect", "doctor", "--version"))
    assert run("--help")[1] == out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"stiv-deploy {version('stiv-deploy')}\n", "")


def test_usage_error_is_one_line(run: Run) -> None:
    code, out, err = run("generate", "bundle", "--colour", "red")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: No such option: --colour")
    assert err.endswith("(see 'stiv generate --help')\n")


def test_help_is_fast() -> None:
    """No heavy library is imported for --help."""
    code = (
        "import sys; sys.argv = ['stiv', '--help']; from stiv_deploy.runtime.command.main import main; main();"
        "heavy = {'onnxruntime', 'torch', 'onnx', 'av', 'sklearn'} & set(sys.modules); sys.exit(str(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.strip() == "set()"


def test_generate_writes_a_clip(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip.webp"
    arguments = ("generate", bundle_path, "--prompt", "digit three", "--seed", 7, "--out", out, "--upscale", 3)
    code, stdout, stderr = run(*arguments)
    assert (code, stderr) == (0, "")
    assert f"{out}: 4 frames of 8x8, seed 7\n" in stdout
    with Image.open(out) as image:
        assert (image.n_frames, image.size) == (4, (24, 24))
    first = out.read_bytes()
    assert run(*arguments)[0] == 0
    assert out.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["clip.webp"]


def test_generate_passes_every_option_on(
    run: Run, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stiv_deploy.runtime.pipeline.pipeline import StivPipeline

    seen = {}
    original = StivPipeline.__call__

    def spy(self: StivPipeline, **options: object) -> object:
        seen.update(options)
        return original(self, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(StivPipeline, "__call__", spy)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    options = {
        "--negative-prompt": "left",
        "--image": tmp_path / "red.png",
        "--frame": f"-1={tmp_path / 'red.png'}",
        "--frames": 3,
        "--height": 4,
        "--width": 4,
        "--steps": 2,
        "--guidance": 2.5,
        "--image-guidance": 1.25,
        "--guidance-mode": "sit",
        "--solver": "heun",
        "--time-shift": 2.0,
        "--seed": 11,
        "--backend": "onnxruntime",
        "--threads": 1,
        "--decode-tile": 4,
    }
    flat = [item for pair in options.items() for item in pair]
    out = tmp_path / "out.mp4"
    code, _, err = run("generate", bundle_path, "--prompt", "digit", "--no-renorm", *flat, "--out", out)
    assert (code, err) == (0, "")
    seen.pop("callback_on_step_end")
    assert seen == {
        "prompt": ["digit"],
        "negative_prompt": "left",
        "image": {0: tmp_path / "red.png", -1: tmp_path / "red.png"},
        "num_frames": 3,
        "height": 4,
        "width": 4,
        "num_inference_steps": 2,
        "guidance_scale": 2.5,
        "image_guidance_scale": 1.25,
        "guidance_mode": "sit",
        "guidance_renorm": False,
        "solver": "heun",
        "time_shift": 2.0,
        "seed": 11,
        "resize": False,
        "decode_tile": 4,
    }


def test_generate_several_prompts(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    code, stdout, _ = run(
        "generate", bundle_path, "--prompt", "digit", "--prompt", "three", "--seed", 5, "--out", tmp_path / "a"
    )
    assert code == 0
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["a-0", "a-1"]
    assert "seed 5\n" in stdout
    assert "seed 6\n" in stdout
    assert run("generate", bundle_path, "--prompt", "three", "--seed", 6, "--out", tmp_path / "b")[0] == 0
    for index in range(4):  # the second of two is what it would be alone
        name = f"frame_{index:03d}.png"
        alone, batched = (np.asarray(Image.open(tmp_path / folder / name)) for folder in ("b", "a-1"))
        assert np.array_equal(alone, batched)


def test_generate_scales_an_image_when_asked(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "large.png")
    arguments = (
        "generate",
        bundle_path,
        "--prompt",
        "x",
        "--image",
        tmp_path / "large.png",
        "--out",
        tmp_path / "a.gif",
    )
    assert run(*arguments)[0] == 2
    assert run(*arguments, "--resize")[0] == 0


BAD_REQUESTS = [
    (["--steps", "0"], "steps"),
    (["--steps", "-3"], "steps"),
    (["--guidance", "nan"], "guidance_scale must be a finite number, got nan"),
    (["--guidance", "inf"], "guidance_scale must be a finite number, got inf"),
    (["--guidance-mode", "most"], "--guidance-mode"),
    (["--solver", "rk4"], "--solver"),
    (["--frames", "7"], "frames is 7; this bundle takes 1 to 6"),
    (["--height", "14"], "height is 14"),
    (["--width", "7"], "width is 7"),
    (["--backend", "abacus"], "unknown backend 'abacus'"),
    (["--threads", "-1"], "threads"),
    (["--upscale", "0"], "--upscale"),
    (["--seed", "-1"], "seed"),
    (["--image", "none.png"], "none.png: no such image file"),
    (["--image", "text.png"], "text.png: not an image"),
    (["--image", "large.png"], "large.png is 20x10 (width x height), the video is 8x8"),
    (["--frame", "9=good.png"], "frame 9"),
    (["--frame", "good.png"], "want INDEX=FILE"),
    (["--image", "good.png", "--frame", "0=good.png"], "frame 0 is given twice"),
    (["--out", "clip.avi"], "cannot write '.avi'"),
    (["--out", "none/clip.mp4"], "does not exist"),
]


@pytest.mark.parametrize(("options", "message"), BAD_REQUESTS, ids=[" ".join(each[0]) for each in BAD_REQUESTS])
def test_bad_request(
    run: Run, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    """Each is refused with code 2 and one line, before a graph runs, and writes nothing."""
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    code, out, err = run("generate", bundle_path, "--prompt", "digit", "--out", "clip.mp4", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["missing", "no manifest", "bad manifest", "no graph", "corrupt graph"])
def test_bad_bundle(run: Run, own_bundle: Path, tmp_path: Path, damage: str) -> None:
    folder = own_bundle
    graph = own_bundle / "onnx" / "head.onnx"
    match damage:
        case "missing":
            folder = tmp_path / "nowhere"
        case "no manifest":
            (own_bundle / "manifest.json").unlink()
        case "bad manifest":
            (own_bundle / "manifest.json").write_text('{"format": ')
        case "no graph":
            graph.unlink()
        case "corrupt graph":
            graph.write_bytes(bytes(reversed(graph.read_bytes())))
    code, out, err = run("generate", folder, "--prompt", "digit", "--out", tmp_path / "clip.mp4")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert not (tmp_path / "clip.mp4").exists()


def test_parse_frames() -> None:
    assert parse_frames(None, []) == {}
    assert parse_frames(Path("a.png"), ["3=b=c.png", "-1=d.png"]) == {
        0: Path("a.png"),
        3: Path("b=c.png"),
        -1: Path("d.png"),
    }
    for bad in ("=a.png", "one=a.png", "1=", "1.5=a.png", "--1=a.png"):
        with pytest.raises(RequestError, match="want INDEX=FILE"):
            parse_frames(None, [bad])


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_between_steps(bundle_path: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, or a polite kill, in a real process: code 130, no traceback, no file."""
    command = [
        sys.executable,
        "-m",
        "stiv_deploy.runtime.command.main",
        "generate",
        str(bundle_path),
        "--prompt",
        "digit",
    ]
    command += ["--steps", "10000", "--solver", "heun", "--out", str(tmp_path / "clip.mp4")]
    # made to believe in a terminal, the progress bar tells when the steps have begun
    environment = os.environ | {"FORCE_COLOR": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    seen = b""
    deadline = time.monotonic() + 60
    while b"/10000" not in seen and time.monotonic() < deadline and process.poll() is None:
        seen += os.read(process.stderr.fileno(), 4096)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in seen + err
    assert err.rstrip().endswith(b"interrupted")
    assert out == b""
    assert list(tmp_path.iterdir()) == []
