"""Whatever stands in a manifest, a config, a recipe, a request or an option: a result or one line, and nothing left.

``STIV_FUZZ_CASES`` sets the number of cases, 500 by default.
"""

import copy
import json
import math
import os
import shutil
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent / "bench"))
from measured import a_report

from stiv_deploy.runtime import StivPipeline
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.lora import check_lora, read_lora
from stiv_deploy.runtime.command.bench.compare import compare
from stiv_deploy.runtime.command.bench.record import BenchReport
from stiv_deploy.runtime.command.main import main
from stiv_deploy.runtime.errors import StivError
from stiv_deploy.runtime.pipeline.plan import plan_generation
from stiv_deploy.runtime.pipeline.records import read_requests
from stiv_deploy.stiv_ref.checkpoint import read_checkpoint_config
from stiv_deploy.stiv_ref.errors import StivRefError
from stiv_deploy.stiv_ref.recipe import load_recipe

CASES = int(os.environ.get("STIV_FUZZ_CASES", "500"))
LINE = 500
"""Most characters of an error."""
REQUEST = {
    "prompt": "digit", "negative_prompt": "", "fit": "pad", "num_frames": 4, "height": 8, "width": 8, "fps": 8.0,
    "stride": 1, "original_height": 8, "original_width": 8, "num_inference_steps": 1, "guidance_mode": "sit",
    "guidance_scale": 2.0, "image_guidance_scale": 1.5, "guidance_renorm": True, "solver": "heun", "time_shift": 1.0,
    "seed": 1, "count": 2, "decode_tile": 0, "frames": {"0": "none.png"},
}  # fmt: skip
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    1001,
    2**16 + 1,
    2**31,
    2**63,
    10**20,
    10**30,
    10**400,
    0.5,
    1e300,
    float("inf"),
    float("nan"),
)
TEXTS = ("", "a", "x" * 300, "y" * 100_000, "\0", "\x1b[31m", "../../a", "nan", "1e5", "größer \N{CHERRY BLOSSOM}")
hostile = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from((None, True, [], {}, [0, 0], [10**9, 1], [[]], {"a": 1}, [None] * 1000, {"x" * 1000: 1})),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)


def cases(share: float, *strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """A test of ``share`` of all cases: always the same ones, unless a number of them is asked for."""
    checks = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)
    limits = settings(
        max_examples=max(1, round(share * CASES)),
        deadline=None,
        suppress_health_check=checks,
        derandomize="STIV_FUZZ_CASES" not in os.environ,
    )
    return lambda test: limits(given(*strategies)(test))


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in ``values`` with each of its keys."""
    for key, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
        yield values, key
        if isinstance(value, dict | list):
            yield from places(value)


changes = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(("set", "drop", "add")), hostile), max_size=3
)
damages = st.sampled_from((None, None, None, None, "half", "deep", "mark", "latin", "nothing", "digits"))


def changed(values: Any, edits: Any) -> Any:
    """``values`` with some of what is in it replaced, gone, or joined by more."""
    for where, what, value in map(copy.deepcopy, edits):
        found = list(places(values))
        if not found:
            return value
        container, key = found[int(where * len(found))]
        match what:
            case "set":
                container[key] = value
            case "drop":
                del container[key]
            case "add" if isinstance(container, dict):
                container[str(value)[:2000]] = value
    return values


def damaged(text: str, damage: str | None) -> bytes:
    """``text`` as a file with some fault."""
    match damage:
        case "half":
            return text[: len(text) // 2].encode()
        case "deep":
            return b"[" * 50_000
        case "mark":
            return b"\xef\xbb\xbf" + text.encode()
        case "latin":
            return b"\xff\xfe" + text.encode()
        case "nothing":
            return b""
        case "digits":
            return b"1" * 5000
    return text.encode(errors="replace")


def error_of(call: Callable[[], Any]) -> StivError | StivRefError | None:
    try:
        call()
    except (StivError, StivRefError) as error:
        return error
    return None


def one_line_or_well(call: Callable[[], Any], folder: Path) -> None:
    """``call`` works, or raises an error of ours that is one short line; ``folder`` has the same files afterwards."""
    before = sorted(folder.rglob("*"))
    error = error_of(call)
    if error is not None:
        text = str(error).replace(str(folder), "")
        assert error.exit_code == 2
        assert "\n" not in text
        assert "Value error" not in text
        assert len(text) <= LINE, text
    assert sorted(folder.rglob("*")) == before


@cases(0.25, changes, damages)
def test_manifests(bundle_path: Path, tmp_path: Path, edits: Any, damage: str | None) -> None:
    folder = tmp_path / "bundle"
    if not folder.exists():
        shutil.copytree(bundle_path, folder)
    values = json.loads((bundle_path / "manifest.json").read_text())
    (folder / "manifest.json").write_bytes(damaged(json.dumps(changed(values, edits)), damage))
    one_line_or_well(lambda: Bundle.open(folder), folder)


@cases(0.1, changes, damages)
def test_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: Any, damage: str | None) -> None:
    values = a_report().model_dump(mode="json")
    monkeypatch.setattr("stiv_deploy.runtime.command.bench.statistics.ROUNDS", 10)
    target = tmp_path / "bench.json"
    target.write_bytes(damaged(json.dumps(changed(values, edits)), damage))
    one_line_or_well(lambda: compare(a_report(), BenchReport.read(target)), tmp_path)


@cases(0.1, changes, damages)
def test_checkpoint_configs(root: Path, tmp_path: Path, edits: Any, damage: str | None) -> None:
    values = json.loads((root / "checkpoints/tiny/config.json").read_text())
    (tmp_path / "config.json").write_bytes(damaged(json.dumps(changed(values, edits)), damage))
    one_line_or_well(lambda: read_checkpoint_config(tmp_path), tmp_path)


def toml(values: Any) -> str:
    """``values`` as TOML, in one line."""
    match values:
        case dict():
            return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(each)}" for key, each in values.items()) + "}"
        case list():
            return f"[{', '.join(map(toml, values))}]"
        case None:
            return '""'
        case bool() | str():
            return json.dumps(values)
    return repr(values)


@cases(0.2, changes, damages)
def test_recipes(root: Path, tmp_path: Path, edits: Any, damage: str | None) -> None:
    values = changed(tomllib.loads((root / "recipes/tiny.toml").read_text()), edits)
    lines = [f"{json.dumps(str(key))} = {toml(each)}\n" for key, each in values.items()] if values else []
    (tmp_path / "recipe.toml").write_bytes(damaged("".join(lines), damage))
    one_line_or_well(lambda: load_recipe(tmp_path / "recipe.toml"), tmp_path)


@cases(0.2, changes, damages)
def test_requests(bundle_path: Path, tmp_path: Path, edits: Any, damage: str | None) -> None:
    opened, file = Bundle.open(bundle_path), tmp_path / "request.json"
    file.write_bytes(damaged(json.dumps(changed(json.loads(json.dumps(REQUEST)), edits)), damage))
    one_line_or_well(lambda: plan_generation(opened, [each.request for each in read_requests(file)]), tmp_path)


@cases(0.1, changes, changes, damages)
def test_loras(tmp_path: Path, edits: Any, settings: Any, damage: str | None) -> None:
    adapter = changed({"stiv.base": "b" * 64, "transformer.lora_alpha": 2.0, "transformer.use_dora": False}, settings)
    tensors = {"patch.lora_A.weight": [2, 3], "patch.lora_B.weight": [4, 2], "patch.alpha": []}
    header = {
        f"transformer.{name}": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
        for name, shape in tensors.items()
    }
    text = damaged(
        json.dumps(changed({"__metadata__": {"lora_adapter_metadata": json.dumps(adapter)}, **header}, edits)), damage
    )
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    read = partial(read_lora, tmp_path / "a.safetensors")
    one_line_or_well(lambda: check_lora(read(), {"patch": (4, 3)}, "b" * 64), tmp_path)


OPTIONS = (
    "steps", "guidance", "image-guidance", "guidance-mode", "frames", "height", "width", "fps", "stride", "seed",
    "count", "time-shift", "threads", "device", "upscale", "decode-tile", "original-height", "backend", "solver", "fit",
    "frame", "image", "request", "out", "prompt", "lora",
)  # fmt: skip
words = st.one_of(
    hostile.map(str), st.sampled_from(("0=a.png", f"{'9' * 5000}=a.png", "x" * 5000, "1" * 5000, "/dev/null"))
)
options = st.lists(
    st.tuples(st.sampled_from(OPTIONS), words.filter(lambda word: "\0" not in word)), min_size=1, max_size=3
)


@cases(0.15, options)
def test_options(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], given: Any
) -> None:
    """Of ``stiv generate``; what is possible is planned and not run."""
    handler = signal.getsignal(signal.SIGTERM)
    words = [f"--{name}={word.encode(errors='replace').decode()}" for name, word in given]
    monkeypatch.setattr(StivPipeline, "run", ran)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stiv", "generate", str(bundle_path), "--prompt=digit", "--out=clip.gif", *words])
    try:
        code = main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    _, err = capfd.readouterr()
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) <= LINE
    assert "Value error" not in err
    assert list(tmp_path.iterdir()) == []


def ran(*_: object) -> None:
    raise StivError("it would have run")


@pytest.mark.parametrize(
    "given",
    [
        {"frames": {"0": {"x" * 1000: 1}}},
        {"frames": {"0": {"path": "a", "sha256": "x" * 1000}}},
        {"latents": {"0": {"dtype": "float32", "shape": [1] * 100, "data": "AAAAAA=="}}},
        {"latents": {"0": {"dtype": "float32", "shape": [10**400] * 3, "data": "AAAAAA=="}}},
    ],
)
def test_given_pictures_and_latents(tmp_path: Path, given: dict[str, Any]) -> None:
    """What was found among more cases."""
    (tmp_path / "request.json").write_text(json.dumps({"prompt": "digit", **given}))
    one_line_or_well(lambda: read_requests(tmp_path / "request.json"), tmp_path)
