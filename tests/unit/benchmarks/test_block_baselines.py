"""Baselines of one block: counts against an independent counter, FP8 linears, classes of kernels, and a dry run."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stiv_deploy.runtime.errors import KernelError
from stiv_deploy.runtime.plugins.library import LIBRARY_VARIABLE
from stiv_deploy.stiv_ref.block import RopeTables, StivBlock

CPU = torch.device("cpu")
E4M3, BF16, FP32 = 2.0**-4, 2.0**-8, 2.0**-24
"""Unit roundoffs: the largest relative error of rounding to the nearest (E4M3 has 3 bits behind the first)."""
SIZES = [(model, pixels) for model in ("XL", "M") for pixels in (256, 512)]


@pytest.fixture(scope="session")
def part(benchmark_module: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    return lambda name: benchmark_module(f"blocks.{name}")


@pytest.fixture(scope="session")
def rows(part: Callable[[str], ModuleType]) -> list[Any]:
    return part("baselines").run_baselines(CPU, quick=True)


# --- counts


def meta_inputs(case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """Inputs of the case's block without storage."""
    config = case.config
    with torch.device("meta"):
        text = torch.empty(case.batch, config.heads, case.text, config.head_dim, dtype=dtype)
        tables = [torch.empty(size, config.head_dim // 2, dtype=dtype) for size in (case.positions, case.token_frames)]
        return (
            torch.empty(case.batch, case.token_frames, case.positions, config.width, dtype=dtype),
            torch.empty(case.batch, 6, config.width, dtype=dtype),
            text,
            text,
            torch.empty(case.batch, 1, 1, case.text, dtype=dtype),
            RopeTables(tables[0], tables[0], tables[1], tables[1]),
        )


def meta_block(case: Any, dtype: torch.dtype) -> StivBlock:
    with torch.device("meta"):
        return StivBlock(case.config).to(dtype).requires_grad_(False)


class GemmBytes(TorchDispatchMode):
    """Counts what matrix products with a weight read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.default:
            self.nbytes += sum(each.numel() * each.element_size() for each in (args[1], args[2], result))
        return result


@pytest.mark.parametrize(("model", "pixels"), SIZES)
def test_counts_are_those_of_an_independent_counter(part: Callable[[str], ModuleType], model: str, pixels: int) -> None:
    counts, case = part("counts"), part("sizes").Case(model=model, pixels=pixels)
    with FlopCounterMode(display=False) as counter, GemmBytes() as traffic:
        meta_block(case, torch.bfloat16)(*meta_inputs(case, torch.bfloat16))
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    for precision in ("bf16", "fp8"):
        parts = counts.block_parts(case, precision)
        flops = {kind: sum(each.flops for each in parts if each.kind == kind) for kind in ("gemm", "attention")}
        assert flops == {"gemm": counted["aten.addmm"], "attention": counted["aten.bmm"]}
    gemms = [each for each in counts.block_parts(case, "bf16") if each.kind == "gemm"]
    assert sum(each.nbytes for each in gemms) == traffic.nbytes


def test_the_cases_are_the_ones_of_the_papers_models(part: Callable[[str], ModuleType]) -> None:
    sizes = [(case.model, case.positions, case.token_frames, case.tokens) for case in part("sizes").CASES]
    assert sizes == [
        ("XL", 256, 20, 10_240),
        ("XL", 1024, 20, 40_960),
        ("M", 256, 20, 10_240),
        ("M", 1024, 20, 40_960),
    ]


@pytest.mark.parametrize(("precision", "bytes_each"), [("bf16", 8), ("fp8", 7)])
def test_temporal_attention_moves_three_planes_in_and_one_out(
    part: Callable[[str], ModuleType], precision: str, bytes_each: int
) -> None:
    case = part("sizes").Case(model="XL")
    temporal = {each.name: each for each in part("counts").block_parts(case, precision)}["temporal attention"]
    assert temporal.nbytes == bytes_each * 10_240 * 1152


def test_a_quantized_operand_has_one_byte_and_a_result_two(part: Callable[[str], ModuleType]) -> None:
    case = part("sizes").Case(model="XL")
    parts = {each.name: each for each in part("counts").block_parts(case, "fp8")}
    tokens, width = 10_240, 1152
    assert parts["spatial.qkv"].nbytes == tokens * width + 3 * width * width + 2 * 3 * tokens * width
    assert parts["ffn.up"].nbytes == tokens * width + 4 * width * width + 4 * tokens * width  # read by ffn.down


def test_the_bound_takes_the_slower_of_arithmetic_and_traffic(part: Callable[[str], ModuleType]) -> None:
    counts, case = part("counts"), part("sizes").Case(model="XL")
    parts = counts.block_parts(case, "fp8")
    arithmetic = counts.bound(case, "fp8", counts.Peaks(bf16=1e12, fp8=2e12, copy=math.inf))
    gemm = sum(each.flops for each in parts if each.kind == "gemm") / 2e12 * 1e6
    attention = sum(each.flops for each in parts if each.kind == "attention") / 1e12 * 1e6
    assert arithmetic.gemm_us == pytest.approx(gemm) == arithmetic.gemm_arithmetic_us
    assert (arithmetic.attention_us, arithmetic.rest_us) == (pytest.approx(attention), 0)
    traffic = counts.bound(case, "fp8", counts.Peaks(bf16=math.inf, fp8=math.inf, copy=1e12))
    assert traffic.total_us == pytest.approx(sum(each.nbytes for each in parts) / 1e12 * 1e6)
    assert traffic.gemm_arithmetic_us == 0


def test_no_bound_in_fp8_without_an_fp8_peak(part: Callable[[str], ModuleType]) -> None:
    counts = part("counts")
    with pytest.raises(ValueError, match="no FP8 peak"):
        counts.bound(part("sizes").Case(model="XL"), "fp8", counts.Peaks(bf16=1.0, fp8=None, copy=1.0))


# --- FP8


def linear_and_input(inputs: int = 96, outputs: int = 48) -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    linear.weight.copy_(torch.randn(outputs, inputs, generator=generator) * 0.1)
    linear.bias.copy_(torch.randn(outputs, generator=generator))
    return linear.to(torch.bfloat16), torch.randn(4, 5, inputs, generator=generator).to(torch.bfloat16)


@pytest.mark.parametrize("static", [True, False])
def test_the_fp8_linear_is_the_linear_up_to_rounding(part: Callable[[str], ModuleType], static: bool) -> None:
    fp8 = part("fp8")
    linear, x = linear_and_input()
    y = fp8.Fp8Linear(linear, fp8.scale_of(x) if static else None)(x)
    wide_x, weight, bias = x.double(), linear.weight.double(), linear.bias.double()
    expected = wide_x @ weight.T + bias
    # Each factor is off by E4M3's roundoff, or below its normal numbers by half of their spacing, 2^-10 of the scale.
    off_x, off_w = (E4M3 * each.abs() + 2.0**-10 * float(fp8.scale_of(each)) for each in (wide_x, weight))
    products = wide_x.abs() @ off_w.T + off_x @ (weight.abs() + off_w).T
    sums = (wide_x.abs() @ weight.abs().T) * (1 + E4M3) ** 2
    rounding = 2 * BF16 * (expected.abs() + products + bias.abs()) + x.shape[-1] * FP32 * sums
    assert y.dtype == torch.bfloat16
    assert y.shape == (4, 5, 48)
    assert bool(((y.double() - expected).abs() <= products + rounding).all())


def test_the_fp8_linear_multiplies_the_quantized_numbers(part: Callable[[str], ModuleType]) -> None:
    fp8 = part("fp8")
    linear, x = linear_and_input()
    module = fp8.Fp8Linear(linear)
    scale = fp8.scale_of(x)
    wide_x = fp8.quantized(x, scale).double() * scale.double()
    weight = module.weight.double() * module.weight_scale.double()
    bias = linear.bias.double()
    expected = wide_x @ weight.T + bias
    # Accumulation and both scales in fp32; the product, then its sum with the bias are rounded to bf16.
    tolerance = (x.shape[-1] + 3) * FP32 * (wide_x.abs() @ weight.abs().T) + 2 * BF16 * (expected.abs() + bias.abs())
    assert bool(((module(x).double() - expected).abs() <= tolerance).all())


def test_a_static_scale_saturates_and_makes_no_nan(part: Callable[[str], ModuleType]) -> None:
    fp8 = part("fp8")
    linear, x = linear_and_input()
    scale = fp8.scale_of(x)
    quantized = fp8.quantized(100 * x, scale)
    assert quantized.float().abs().max() == 448
    assert bool(fp8.Fp8Linear(linear, scale)(100 * x).isfinite().all())


def test_zeros_give_the_bias(part: Callable[[str], ModuleType]) -> None:
    linear, x = linear_and_input()
    y = part("fp8").Fp8Linear(linear)(torch.zeros_like(x))
    assert torch.equal(y, linear.bias.expand_as(y))


def test_fp8_wants_sizes_that_the_hardware_takes(part: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ValueError, match="linear of 24 x 48: FP8 wants multiples of 16"):
        part("fp8").Fp8Linear(linear_and_input(24)[0])


def test_to_fp8_replaces_what_the_forward_pass_runs(part: Callable[[str], ModuleType]) -> None:
    fp8, sizes = part("fp8"), part("sizes")
    case = sizes.DRY[0]
    block, inputs = sizes.new_block(case.config, CPU), sizes.new_inputs(case, CPU)
    expected = {name for name, _, _ in part("counts").gemms(case)}
    scales = fp8.input_scales(block, *inputs)
    assert set(scales) == expected == {name for name, _ in fp8.forward_linears(block)}
    assert all(not module._forward_pre_hooks for module in block.modules())
    fp8.to_fp8(block, scales)
    assert {name for name, module in block.named_modules() if isinstance(module, fp8.Fp8Linear)} == expected
    assert block.ffn.down.input_scale == scales["ffn.down"]
    assert isinstance(block.cross.kv, nn.Linear)


# --- kernels


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "gemm"),
        ("nvjet_qqtst_128x128_128x6_2x1_v_bz_TNN", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_kernel", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256_32x3_tn_align8>(...)", "gemm"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(...)", "gemm"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int>>>(...)", "gemm"),
        ("void gemvNSP_kernel<__nv_bfloat16, float, 1, 32>(...)", "gemm"),
        ("triton_tem_fused__scaled_mm_4", "gemm"),
        ("triton_mm", "gemm"),
        ("aten::addmm", "gemm"),
        ("aten::_scaled_mm", "gemm"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4>>(...)", "attention"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>(...)", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x72", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("void (anonymous namespace)::softmax_warp_forward<c10::BFloat16, c10::BFloat16, float, 5>(...)", "attention"),
        ("void stiv::(anonymous namespace)::temporal_attention<stiv::BFloat16, 64, 2>(...)", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void stiv::(anonymous namespace)::spatial_qkv<stiv::BFloat16, 64>(...)", "rest"),
        ("triton_poi_fused__scaled_mm_addmm_gelu_3", "rest"),
        ("triton_red_fused__scaled_dot_product_flash_attention_native_layer_norm_2", "rest"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(...)>(...)", "rest"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(...)", "rest"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(...)", "rest"),
        ("Memcpy DtoD (Device -> Device)", "rest"),
        ("something_never_seen", "rest"),
    ],
)
def test_kernels_are_classified_by_name(part: Callable[[str], ModuleType], name: str, kind: str) -> None:
    assert part("kernel_times").classify(name) == kind


def test_shares_are_parts_of_the_whole_and_keep_the_largest_rest(part: Callable[[str], ModuleType]) -> None:
    kernel_times = part("kernel_times")
    times = {"nvjet_a": 50.0, "flash_fwd_kernel": 30.0} | {f"other_{number:02}": number for number in range(12)}
    found = kernel_times.shares(times)
    total = 80 + 66
    assert (found.gemm, found.attention, found.rest) == (
        pytest.approx(50 / total),
        pytest.approx(30 / total),
        pytest.approx(66 / total),
    )
    assert [name for name, _ in found.largest_rest] == [f"other_{number:02}" for number in range(11, 1, -1)]
    with pytest.raises(ValueError, match="saw no kernels"):
        kernel_times.shares({})


def test_a_trace_counts_kernels_and_copies_and_nothing_else(part: Callable[[str], ModuleType]) -> None:
    events = [
        {"cat": "kernel", "name": "a", "dur": 2.0},
        {"cat": "kernel", "name": "a", "dur": 3.0},
        {"cat": "gpu_memcpy", "name": "Memcpy", "dur": 1.0},
        {"cat": "cpu_op", "name": "aten::mm", "dur": 100.0},
        {"cat": "gpu_user_annotation", "name": "Torch-Compiled Region", "dur": 6.0},
        {"ph": "M", "name": "process_name"},
    ]
    assert part("kernel_times").trace_times({"traceEvents": events}) == {"a": 5.0, "Memcpy": 1.0}


# --- variants and rows


@pytest.mark.slow
def test_every_variant_of_a_dry_run_is_measured_and_right(part: Callable[[str], ModuleType], rows: list[Any]) -> None:
    assert [row.variant for row in rows] == [variant.name for variant in part("variants").VARIANTS]
    for row in rows:
        assert row.note is None
        assert row.timing.how == "host"
        assert row.shares.gemm + row.shares.attention + row.shares.rest == pytest.approx(1)
        assert min(row.shares.gemm, row.shares.attention, row.shares.rest) > 0
        assert 0 < row.parity.error <= row.parity.limit
        assert row.parity.reference == "float64"
        assert row.peak_bytes is None
    sizes = {row.variant: row.weight_bytes for row in rows}
    assert sizes["eager FP8"] < 0.65 * sizes["eager bf16"]  # all linears but cross.kv
    assert rows[2].parity.error > 4 * rows[0].parity.error  # 8 bits are no 16


@pytest.mark.slow
def test_the_report_has_a_line_for_each_row_and_says_how(part: Callable[[str], ModuleType], rows: list[Any]) -> None:
    text = part("baselines").report(rows)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    assert "dry run on a CPU" in text
    assert "**Roofline:**" in text
    assert "Wrong result" not in text
    on_gpu = part("baselines").report([replace(row, device="cuda") for row in rows])
    assert "dry run" not in on_gpu


@pytest.mark.slow
def test_the_report_names_what_was_not_run_and_what_is_wrong(
    part: Callable[[str], ModuleType], rows: list[Any]
) -> None:
    baselines = part("baselines")
    absent = replace(rows[-1], note="no kernel library", timing=None, shares=None, parity=None, weight_bytes=0)
    wrong = replace(rows[1], parity=replace(rows[1].parity, error=math.nan))
    text = baselines.report([rows[0], wrong, absent])
    assert "fused attention | no kernel library |" in text
    assert "**Wrong result:** tiny at 64 pixels, torch.compile bf16: error nan" in text
    assert absent.fraction is None
    unseen = replace(rows[0], shares=None, note="no shares: not permitted")
    assert "no shares: not permitted" in baselines.report([unseen])


@pytest.mark.slow
def test_fractions_are_the_least_time_over_the_measured(rows: list[Any]) -> None:
    row = rows[0]
    assert row.fraction == pytest.approx(row.bound.total_us / row.timing.median_us)
    assert row.gemm_fraction < row.fraction


@pytest.mark.slow
def test_a_variant_that_fails_says_so_and_ends_nothing(
    part: Callable[[str], ModuleType], rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, variants = part("measure"), part("variants")
    plain, compiled = variants.VARIANTS[:2]

    def fail(variant: Any, *_: object) -> Any:
        if variant is compiled:
            raise RuntimeError("the compiler broke\nlong story")
        return lambda *inputs: block(*inputs)

    case = part("sizes").DRY[0]
    block = part("sizes").new_block(case.config, CPU)
    monkeypatch.setattr(measure, "VARIANTS", (plain, compiled))
    monkeypatch.setattr(measure, "variant_call", fail)
    found = measure.measure_case(case, CPU, rows[0].peaks, rounds=1)
    assert [row.note for row in found] == [None, "failed: the compiler broke"]
    assert [row.timing is None for row in found] == [False, True]


@pytest.mark.slow
def test_shares_that_cannot_be_had_leave_the_time(
    part: Callable[[str], ModuleType], rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = part("measure")
    monkeypatch.setattr(measure, "VARIANTS", part("variants").VARIANTS[:1])
    monkeypatch.setattr(measure, "kernel_times", lambda *_: {})
    (row,) = measure.measure_case(part("sizes").DRY[0], CPU, rows[0].peaks, rounds=1)
    assert row.timing is not None
    assert row.shares is None
    assert "saw no kernels" in row.note


def test_a_branch_left_out_is_no_rounding(part: Callable[[str], ModuleType]) -> None:
    """Each branch of the random block counts: without it the error is beyond both limits."""
    sizes, measure = part("sizes"), part("measure")
    case = sizes.DRY[0]
    block, inputs = sizes.new_block(case.config, CPU), sizes.new_inputs(case, CPU)
    whole = block(*inputs).double()
    for branch in (block.spatial.out, block.temporal.out, block.cross.out, block.ffn.down):
        kept = branch.weight.clone()
        branch.weight.copy_(kept.flip(0))  # the norm behind it hides a factor, not another direction
        assert measure.relative_error(block(*inputs), whole) > 2 * measure.FP8_LIMIT
        branch.weight.copy_(kept)


def test_fused_attention_needs_the_kernel_library(
    part: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variants = part("variants")
    fused = next(variant for variant in variants.VARIANTS if variant.fused and variant.precision == "bf16")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    assert "make plugins" in variants.obstacle(fused, torch.device("cuda"))
    assert variants.obstacle(fused, CPU) is None
    monkeypatch.setattr(variants, "open_library", lambda: type("Library", (), {"backend": "emulated"}))
    assert "emulated build" in variants.obstacle(fused, torch.device("cuda"))


def test_fp8_needs_a_gpu_that_has_it(part: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    variants = part("variants")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert "this GPU has 8.0" in variants.obstacle(variants.VARIANTS[2], torch.device("cuda"))
    assert variants.obstacle(variants.VARIANTS[0], torch.device("cuda")) is None


@pytest.mark.slow
def test_a_kernel_error_is_one_variants_note(
    part: Callable[[str], ModuleType], rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = part("measure")

    def refuse(*_: object) -> Any:
        raise KernelError("no driver")

    monkeypatch.setattr(measure, "VARIANTS", part("variants").VARIANTS[-1:])
    monkeypatch.setattr(measure, "variant_call", refuse)
    (row,) = measure.measure_case(part("sizes").DRY[0], CPU, rows[0].peaks, rounds=1)
    assert row.note == "failed: no driver"


# --- files


@pytest.mark.slow
def test_files_are_whole_and_hold_all_rows(part: Callable[[str], ModuleType], rows: list[Any], tmp_path: Path) -> None:
    part("baselines").write(rows, CPU, tmp_path / "results")
    assert not list((tmp_path / "results").glob("*.part"))
    (page,) = (tmp_path / "results").glob("block-baselines-*.md")
    (path,) = (tmp_path / "results").glob("block-baselines-*.json")
    result = json.loads(path.read_text())
    assert result["versions"]["torch"] == torch.__version__
    assert [row["variant"] for row in result["rows"]] == [row.variant for row in rows]
    assert result["rows"][0]["fraction"] == rows[0].fraction
    assert len(result["rows"][0]["shares"]["largest_rest"]) == 10
    assert part("baselines").report(rows) in page.read_text()


@pytest.mark.slow
def test_the_command_writes_and_fails_on_a_wrong_result(
    part: Callable[[str], ModuleType],
    rows: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    baselines = part("baselines")
    monkeypatch.setattr(baselines, "run_baselines", lambda *_: rows)
    baselines.main(out=tmp_path, quick=True)
    assert "| tiny, 64 px | eager bf16 |" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2
    wrong = [replace(rows[0], parity=replace(rows[0].parity, error=1.0))]
    monkeypatch.setattr(baselines, "run_baselines", lambda *_: wrong)
    with pytest.raises(typer.Exit) as stopped:
        baselines.main(out=None, quick=True)
    assert stopped.value.exit_code == 1
