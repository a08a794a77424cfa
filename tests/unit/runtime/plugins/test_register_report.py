"""ptxas's report on the kernels against the committed ceiling."""

from pathlib import Path

import pytest

from stiv_deploy.runtime.errors import RegisterError
from stiv_deploy.runtime.plugins.register_report import KernelReport, faults, main, parse, read_reports, summary

SYMBOL = "_ZN4stiv12_GLOBAL__N_118temporal_attentionINS_8BFloat16ELi72ELi2EEEvNS_18TemporalParametersIT_EE"
TEXT = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SYMBOL}' for 'sm_90'
ptxas info    : Function properties for {SYMBOL}
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 127 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Compiling entry function 'plain_c' for 'sm_80'
ptxas info    : Function properties for plain_c
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, 464 bytes cmem[0]
"""


def test_the_report_is_read() -> None:
    assert parse(TEXT) == [KernelReport(SYMBOL, "sm_90", 127, 16), KernelReport("plain_c", "sm_80", 30, 0)]
    assert [report.family for report in parse(TEXT)] == ["temporal_attention", "plain_c"]


def test_spills_and_registers_above_the_ceiling_are_faults() -> None:
    reports = parse(TEXT)
    lines = faults(reports, {"temporal_attention": 126, "plain_c": 30})
    assert len(lines) == 2
    assert "127 registers, at most 126 wanted" in lines[0]
    assert "16 bytes of local memory" in lines[1]
    assert faults(reports[1:], {"plain_c": 30}) == []
    assert "no ceiling" in faults(reports[1:], {})[0]


def test_the_summary_has_a_line_for_each_kernel_and_gpu() -> None:
    assert [line.split()[:3] for line in summary(parse(TEXT)).splitlines()] == [
        ["plain_c", "sm_80", "30"],
        ["temporal_attention", "sm_90", "127"],
    ]


def test_a_folder_without_reports_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RegisterError, match="run `make plugins` where nvcc .12.8 or later. is on the path"):
        read_reports(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no ptxas report")


def test_the_command_fails_on_spills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernel.cu.o.ptxas.log").write_text(TEXT)
    assert main([str(tmp_path)]) == 2
    assert "local memory" in capsys.readouterr().err
