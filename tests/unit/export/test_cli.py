import os
import subprocess
import sys
from pathlib import Path

import pytest

from stiv_deploy.export.cli import parse_precision, parse_range, request_of
from stiv_deploy.export.errors import ExportError
from stiv_deploy.runtime.bundle.manifest import Range

CHECKPOINT, SCALES, OUT = Path("some/checkpoint"), Path("fp8.safetensors"), Path("bundle")
COMMAND = "import typer; from stiv_deploy.export.cli import export; typer.run(export)"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("float32", "float32"), ("fp32", "float32"), ("FP16", "float16"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_precisions_and_aliases(text: str, wanted: str) -> None:
    assert parse_precision(text) == wanted


def test_unknown_precision() -> None:
    with pytest.raises(
        ExportError, match="--precision int4: no such precision; use float32, float16, bfloat16, fp8, int8 or nvfp4"
    ):
        request_of(CHECKPOINT, "int4", None, None, None, out=OUT)
    with pytest.raises(ExportError, match="--activations fp8: no such precision; use float32, float16 or bfloat16"):
        request_of(CHECKPOINT, "fp8", SCALES, None, "fp8", out=OUT)


def test_8_bits_need_scales() -> None:
    with pytest.raises(
        ExportError,
        match="--precision int8 needs --scales FILE; make it with: "
        "stiv calibrate some/checkpoint --precision int8 --out int8.safetensors",
    ):
        request_of(CHECKPOINT, "INT8", None, None, None, out=OUT)


@pytest.mark.parametrize("option", ["scales", "plan", "activations"])
def test_options_of_8_bits_are_refused_elsewhere(option: str) -> None:
    given = {name: Path("file") if name == option else None for name in ("scales", "plan", "activations")}
    with pytest.raises(ExportError, match=f"--{option} is for --precision fp8, int8, nvfp4, not for (bf16|bfloat16)"):
        request_of(CHECKPOINT, "bf16", *given.values(), out=OUT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("activations", "precision"), [(None, "float16"), ("fp32", "float32"), ("bfloat16", "bfloat16")]
)
def test_activations_are_the_type_of_the_bundle(activations: str | None, precision: str) -> None:
    request = request_of(CHECKPOINT, "FP8", SCALES, None, activations, out=OUT)
    assert (request.format, request.precision, request.scales) == ("fp8", precision, SCALES)


def test_plain_precisions_have_no_quantization() -> None:
    request = request_of(CHECKPOINT, "fp16", None, None, None, out=OUT)
    assert (request.precision, request.format, request.scales) == ("float16", None, None)


def test_ranges() -> None:
    assert parse_range("frames", "1:8:16") == Range(min=1, typical=8, max=16)
    assert parse_range("batch", "2") == Range(min=2, typical=2, max=2)


@pytest.mark.parametrize("text", ["", "1:8", "1:2:3:4", "8:4:16", "0:8:16", "-1:1:1", "a:b:c", "1:8:4", "1.5:2:3"])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(ExportError, match=f"--frames {text}: not a range; give MIN:TYPICAL:MAX"):
        parse_range("frames", text)


def test_importing_the_command_needs_nothing_heavy() -> None:
    code = (
        "import sys, stiv_deploy.export.cli; print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_command_is_quiet_and_writes_the_same_bytes_in_any_process(
    micro_path: Path, micro_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    arguments = [micro_path, "--out", out, "--precision", "FP32", "--frames", "1:4:8", "--no-check"]
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", COMMAND, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert done.stdout.startswith(f"{out}: 10 graphs, ")
    assert "float32, not compared with the reference" in done.stdout
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("export ")]
    assert complaints == [], "no warnings of the exporter, only progress where it takes long"
    files = sorted(path.relative_to(micro_bundle) for path in micro_bundle.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    for file in files:
        assert (out / file).read_bytes() == (micro_bundle / file).read_bytes(), file
