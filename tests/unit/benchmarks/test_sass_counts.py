"""Instructions counted in machine code: a division and a loop as ptxas makes them, against Python's own."""

import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from stiv_deploy.runtime.plugins.library import Plan

Load = Callable[[str], ModuleType]
PLAN = Plan(1, 32, 0, 1, 1, 1, 1)
LOOP = """\
    /*0000*/ LDC R1, c[0x0][0x28] ;
    /*0010*/ LDC.64 R2, c[0x0][0x210] ;
    /*0020*/ IABS R7, R3 ;
    /*0030*/ IABS R8, R2 ;
    /*0040*/ I2F.RP R0, R7 ;
    /*0050*/ LOP3.LUT R2, R2, R3, RZ, 0x3c, !PT ;
    /*0060*/ ISETP.GE.AND P1, PT, R2, RZ, PT ;
    /*0070*/ MUFU.RCP R0, R0 ;
    /*0080*/ VIADD R4, R0, 0xffffffe ;
    /*0090*/ F2I.FTZ.U32.TRUNC.NTZ R5, R4 ;
    /*00a0*/ IMAD.MOV.U32 R4, RZ, RZ, RZ ;
    /*00b0*/ IMAD.MOV R6, RZ, RZ, -R5 ;
    /*00c0*/ IMAD R9, R6, R7, RZ ;
    /*00d0*/ IMAD.HI.U32 R5, R5, R9, R4 ;
    /*00e0*/ IMAD.HI.U32 R6, R5, R8, RZ ;
    /*00f0*/ S2R R5, SR_TID.X ;
    /*0100*/ IADD3 R0, -R6, RZ, RZ ;
    /*0110*/ IMAD R0, R7, R0, R8 ;
    /*0120*/ ISETP.GT.U32.AND P2, PT, R7, R0, PT ;
    /*0130*/ @!P2 IMAD.IADD R0, R0, 0x1, -R7 ;
    /*0140*/ @!P2 VIADD R6, R6, 0x1 ;
    /*0150*/ ISETP.NE.AND P2, PT, R3, RZ, PT ;
    /*0160*/ ISETP.GE.U32.AND P0, PT, R0, R7, PT ;
    /*0170*/ @P0 IADD3 R6, R6, 0x1, RZ ;
    /*0180*/ @!P1 IMAD.MOV R6, RZ, RZ, -R6 ;
    /*0190*/ @!P2 LOP3.LUT R6, RZ, R3, RZ, 0x33, !PT ;
    /*01a0*/ ISETP.GE.AND P0, PT, R5, R6, PT ;
.L_x_2:
    /*01b0*/ @P0 EXIT ;
    /*01c0*/ LDC.64 R2, c[0x0][0x218] ;
    /*01d0*/ ULDC.64 UR4, c[0x0][0x208] ;
    /*01e0*/ IMAD.WIDE R2, R5, 0x4, R2 ;
.L_x_0:
    /*01f0*/ IMAD.HI R0, R5, 0x55555556, RZ ;
    /*0200*/ LEA.HI R0, R0, R0, RZ, 0x1 ;
    /*0210*/ IMAD R0, R0, -0x3, R5 ;
    /*0220*/ ISETP.NE.AND P0, PT, R0, 0x1, PT ;
    /*0230*/ @P0 STG.E desc[UR4][R2.64], R5 ;
    /*0240*/ VIADD R5, R5, 0x20 ;
    /*0250*/ IADD3 R2, P1, R2, 0x80, RZ ;
    /*0260*/ ISETP.GE.AND P0, PT, R5, R6, PT ;
    /*0270*/ IADD3.X R3, RZ, R3, RZ, P1, !PT ;
    /*0280*/ @!P0 BRA `(.L_x_0) ;
.L_x_3:
    /*0290*/ EXIT ;
.L_x_1:
    /*02a0*/ BRA `(.L_x_1);
"""
"""SM 90, CUDA 13.0: ``for (i = threadIdx.x; i < a / b; i += 32) if (i % 3 != 1) out[i] = i;`` of (a, b, out)."""


@pytest.fixture(scope="module")
def script(benchmark_module: Load) -> ModuleType:
    return benchmark_module("sass_counts")


def issued(script: ModuleType, a: int, b: int) -> Counter[tuple[str, int]]:
    """How often the loop issues an instruction, by its name and the lanes that take part."""
    code = script.read_code(LOOP)
    constants = bytes(0x210) + struct.pack("<iiQ", a, b, 0x7F00FFFFFF80)
    counts: Counter[tuple[str, int]] = Counter()
    for (index, lanes), times in script.issue(code, script.Warp(constants, {"SR_TID.X": np.arange(32)})).items():
        counts[code.instructions[index].name, lanes] += times
    return counts


@pytest.mark.parametrize(("a", "b"), [(1000, 7), (999, 3), (31, 1), (5, 9), (123456, 1234), (64, 2), (-5, 2)])
def test_a_loop_over_a_quotient_runs_as_often_as_in_python(script: ModuleType, a: int, b: int) -> None:
    counts = issued(script, a, b)
    places = range(int(a / b))
    assert sum(lanes * times for (name, lanes), times in counts.items() if name == "STG.E") == sum(
        i % 3 != 1 for i in places
    )
    assert sum(times for (name, _), times in counts.items() if name == "BRA") == -(-len(places) // 32)
    assert sum(times for (name, _), times in counts.items() if name == "MUFU.RCP") == 1


def test_a_diverged_warp_issues_both_paths(script: ModuleType) -> None:
    text = """
    /*0000*/ S2R R0, SR_TID.X ;
    /*0010*/ LOP3.LUT P0, RZ, R0, 0x1, RZ, 0xc0, !PT ;
    /*0020*/ @P0 BRA `(.L_x_0) ;
    /*0030*/ FADD R1, R1, 1 ;
.L_x_0:
    /*0040*/ FMUL R1, R1, R1 ;
    /*0050*/ EXIT ;
"""
    code = script.read_code(text)
    counts = script.issue(code, script.Warp(bytes(8), {"SR_TID.X": np.arange(32)}))
    assert counts == {(0, 32): 1, (1, 32): 1, (2, 16): 1, (3, 16): 1, (4, 32): 1, (5, 32): 1}
    assert [each.kind for each in code.instructions] == ["integer", "integer", "control", "math", "math", "control"]


def test_the_kernel_of_a_case_is_found_in_either_checkout(script: ModuleType) -> None:
    def section(tiles: int) -> str:
        symbol = f"_ZN4stiv18temporal_attentionINS_8BFloat16ELi64ELi{tiles}EEEvNS_18TemporalParametersIT_EE"
        return f"//----- .text.{symbol} -----\n{symbol}:\n" + "    /*0000*/ EXIT ;\n" * tiles

    one_each, pairs = "".join(map(section, (1, 2, 3, 4))), "".join(map(section, (4, 2)))
    for frames, alone, shared in ((5, 1, 2), (20, 2, 2), (40, 3, 4), (64, 4, 4)):
        case = script.Case(64, 18, frames)
        assert len(script.find_kernel(one_each, case).instructions) == alone
        assert len(script.find_kernel(pairs, case).instructions) == shared
    with pytest.raises(script.BenchmarkError, match="no kernel for head size 72 and 20 frames"):
        script.find_kernel(pairs, script.Case(72, 16, 20))


def test_code_that_copies_too_little_was_misread(script: ModuleType) -> None:
    code = script.read_code("    /*0000*/ EXIT ;")
    with pytest.raises(script.BenchmarkError, match=r"misread: .* are \(0, 0, 0\), where \(480, 160, 56\) are"):
        script.count(code, script.Case(64, 18, 20), 90, PLAN)


def test_a_tool_that_is_missing_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(script.BenchmarkError, match="nvcc was not found; put the CUDA toolkit"):
        script.disassembled(tmp_path, 90)
