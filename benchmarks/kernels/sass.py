"""Machine code of a kernel, and how often a warp issues each instruction of it: no GPU, no times.

The text of ``nvdisasm`` is read, and its integer, predicate and control instructions are carried out for the 32 lanes
of a warp; what a load, a product or a shuffle gives stands for 1.0. So branches on sizes go as they would, and branches
on data (the slow path of a division) as for ordinary numbers. Lanes at the lowest address go first, which brings the
paths of an ``if`` together where they meet. Names of instructions: NVIDIA's "CUDA Binary Utilities". What they do is
seen in what ptxas makes of a division, and held to account by the caller, who knows how much is copied in and out.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

LANES = 32
WORD = 0xFFFFFFFF
LIMIT = 2_000_000
"""Most instructions of a warp; more mean that a loop does not end, which would be an error of this file."""
Values = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_CODE = re.compile(
    r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P[0-9T]) )?\s*(?P<name>[\w.]+) ?(?P<rest>.*?) ?;"
)
_LABEL = re.compile(r"^(\.L_x_\d+|[\w$]+):")
_TARGET = re.compile(r"`\(([^)]+)\)")
_CLASSES = {
    "tensor": "HMMA IMMA",
    "math": "FADD FMUL FFMA FFMA2 FADD2 FMUL2 FMNMX FMNMX3 FSEL FSETP FSET HADD2 HFMA2 HMUL2 F2FP FCHK MUFU F2F "
    "DADD DMUL DFMA DSETP",
    "shared": "LDS STS LDSM STSM",
    "global": "LDG STG LDGSTS",
    "shuffle": "SHFL",
    "control": "BRA BSSY BSYNC BAR EXIT CALL RET WARPSYNC NOP DEPBAR LDGDEPBAR ENDCOLLECTIVE YIELD BREAK ACQBULK",
}
CLASS_OF = {name: kind for kind, names in _CLASSES.items() for name in names.split()}
CLASSES = (*_CLASSES, "integer")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its guard (a predicate), operands with the destination first, and where it branches to."""

    guard: str
    name: str
    operands: tuple[str, ...]
    target: str

    @property
    def kind(self) -> str:
        """The class it is counted in; conversions by shifts and masks are among ``integer``."""
        return CLASS_OF.get(self.name.split(".")[0], "integer")


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel in their order, and where labels stand."""

    instructions: list[Instruction]
    labels: dict[str, int]


def read_code(text: str) -> Code:
    """Code in ``nvdisasm -c``'s text of one kernel, the padding behind it included."""
    code = Code([], {})
    for line in text.splitlines():
        if match := _CODE.match(line):
            target = _TARGET.search(match["rest"])
            operands = tuple(part.strip().replace(".reuse", "") for part in match["rest"].split(","))
            code.instructions.append(
                Instruction(match["guard"] or "PT", match["name"], operands, target[1] if target else "")
            )
        elif match := _LABEL.match(line):
            code.labels[match[1]] = len(code.instructions)
    return code


def _signed(x: Values) -> Values:
    return ((x & WORD) ^ 0x80000000) - 0x80000000


def _as_float(x: Values) -> npt.NDArray[np.float32]:
    return (x & WORD).astype(np.uint32).view(np.float32)


def _bits(x: npt.NDArray[np.float32]) -> Values:
    return x.astype(np.float32).view(np.uint32).astype(np.int64)


@dataclass
class Warp:
    """Registers and predicates of 32 lanes; uniform registers are held a lane each as well."""

    constants: bytes
    special: dict[str, Values]
    registers: dict[str, Values] = field(default_factory=dict)
    predicates: dict[str, Flags] = field(default_factory=dict)

    def word(self, operand: str, offset: int = 0) -> Values:
        """An operand as 32-bit words, ``offset`` registers on."""
        minus, invert = operand.startswith("-"), operand.startswith("~")
        text = operand.lstrip("-~").strip("|")
        if re.fullmatch(r"U?R\d+", text):
            name, number = re.match(r"(U?R)(\d+)", text).groups()  # type: ignore[union-attr]
            value = self.registers.get(f"{name}{int(number) + offset}", np.zeros(LANES, np.int64))
        elif text in ("RZ", "URZ", "SRZ"):
            value = np.zeros(LANES, np.int64)
        elif match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
            at = int(match[1], 16) + 4 * offset
            value = np.full(LANES, int.from_bytes(self.constants[at : at + 4], "little"))
        elif text.startswith("0x"):
            value = np.full(LANES, int(text, 16) if offset == 0 else 0)
        else:
            value = _bits(np.full(LANES, float(text.replace("INF", "inf").replace("QNAN", "nan")), np.float32))
        if minus:
            return -value & WORD
        return ~value & WORD if invert else value

    def real(self, operand: str) -> npt.NDArray[np.float32]:
        """An operand as fp32, with its sign and absolute value."""
        text = operand.lstrip("-")
        if not re.match(r"\|?(U?R\d|U?RZ|c\[|0x)", text):
            value = np.full(LANES, float(text.replace("INF", "inf").replace("QNAN", "nan")), np.float32)
        else:
            value = _as_float(self.word(text))
        value = np.abs(value) if "|" in operand else value
        return -value if operand.startswith("-") else value

    def double(self, operand: str) -> Values:
        """An operand's two words; overflow beyond 63 bits does not matter here."""
        return self.word(operand) | (self.word(operand, 1) << 32)

    def flag(self, operand: str) -> Flags:
        """A predicate."""
        text = operand.lstrip("!")
        value = np.ones(LANES, bool) if text in ("PT", "UPT") else self.predicates.get(text, np.zeros(LANES, bool))
        return ~value if operand.startswith("!") else value

    def set_word(self, operand: str, value: Values, where: Flags, offset: int = 0) -> None:
        """Lanes ``where`` get ``value``; ``offset`` registers on."""
        if match := re.fullmatch(r"(U?R)(\d+)", operand):
            name = f"{match[1]}{int(match[2]) + offset}"
            old = self.registers.get(name, np.zeros(LANES, np.int64))
            self.registers[name] = np.where(where, value & WORD, old)

    def set_flag(self, operand: str, value: Flags, where: Flags) -> None:
        """Lanes ``where`` get ``value``."""
        if operand not in ("PT", "UPT"):
            self.predicates[operand] = np.where(where, value, self.flag(operand))


Action = Callable[[Warp, list[str], tuple[str, ...], Flags], None]


def _compare(how: str, a: Values, b: Values) -> Flags:
    table = {"GE": a >= b, "GT": a > b, "LE": a <= b, "LT": a < b, "EQ": a == b, "NE": a != b}
    return np.asarray(table[how])


def _set_predicate(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    a, b = warp.word(ops[2]), warp.word(ops[3])
    if "S64" in parts or "U64" in parts:
        a, b = warp.double(ops[2]), warp.double(ops[3])
    elif "U32" not in parts:
        a, b = _signed(a), _signed(b)
    how = parts[1]
    result = _compare(how, a, b)
    if "EX" in parts:
        low = warp.flag(ops[5])
        equal, strict = a == b, {"GE": "GT", "LE": "LT"}.get(how, how)
        result = (equal & low) if how == "EQ" else _compare(strict, a, b) | (equal & low)
    other = warp.flag(ops[4])
    join = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}
    function = join[next(part for part in parts[2:] if part in join)]
    warp.set_flag(ops[0], function(result, other), where)
    warp.set_flag(ops[1], function(~result, other), where)


def _table(lut: int, inputs: list[Values]) -> Values:
    result = np.zeros(LANES, np.int64)
    for index in range(8):
        if lut >> index & 1:
            term = np.full(LANES, WORD)
            for bit, value in zip((4, 2, 1), inputs, strict=True):
                term &= value if index & bit else ~value
            result |= term
    return result & WORD


def _logic(warp: Warp, ops: tuple[str, ...], where: Flags) -> None:
    flags = 1 if re.fullmatch(r"U?P[0-9T]", ops[0]) else 0
    result = _table(int(ops[flags + 4], 16), [warp.word(name) for name in ops[flags + 1 : flags + 4]])
    warp.set_word(ops[flags], result, where)
    if flags:
        warp.set_flag(ops[0], result != 0, where)


def _predicate_logic(warp: Warp, ops: tuple[str, ...], where: Flags) -> None:
    inputs = [np.where(warp.flag(name), WORD, 0) for name in ops[2:5]]
    results = [_table(int(lut, 16), inputs) != 0 for lut in ops[5:7]]
    for name, result in zip(ops[:2], results, strict=False):
        warp.set_flag(name, result, where)


def _add(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    carries = [name for name in ops[1:3] if re.fullmatch(r"U?P[0-9T]", name)]
    terms, ins = ops[1 + len(carries) : 4 + len(carries)], ops[4 + len(carries) :]
    total = sum((warp.word(name) for name in terms), np.zeros(LANES, np.int64))
    if "X" in parts:
        total = total + sum((warp.flag(name).astype(np.int64) for name in ins), np.zeros(LANES, np.int64))
    warp.set_word(ops[0], total, where)
    for index, name in enumerate(carries):
        warp.set_flag(name, total >> 32 > index, where)


def _add_wide(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    with np.errstate(over="ignore"):
        result = warp.double(ops[1]) + warp.double(ops[2])
    warp.set_word(ops[0], result, where)
    warp.set_word(ops[0], result >> 32, where, 1)


def _multiply_add(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    signed = "U32" not in parts
    a, b = warp.word(ops[1]), warp.word(ops[2])
    if "WIDE" in parts or "HI" in parts:
        a, b = (_signed(a), _signed(b)) if signed else (a, b)
        with np.errstate(over="ignore"):
            result = (a.view(np.uint64) * b.view(np.uint64) + warp.double(ops[3]).view(np.uint64)).view(np.int64)
        low, high = result & WORD, result >> 32 & WORD
        warp.set_word(ops[0], high if "HI" in parts else low, where)
        if "WIDE" in parts:
            warp.set_word(ops[0], high, where, 1)
        return
    with np.errstate(over="ignore"):
        result = _signed(a) * _signed(b) + warp.word(ops[3])
    if "X" in parts:
        result = result + warp.flag(ops[4])
    warp.set_word(ops[0], result, where)


def _shift(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    low, by, high = warp.word(ops[1]), warp.word(ops[2]) & 63, warp.word(ops[3])
    if "S32" in parts and "HI" in parts:
        result = _signed(high) >> np.minimum(by, 31)
    elif "R" in parts and "HI" in parts:
        result = high >> by
    elif "R" in parts:
        result = (low | high << 32) >> by
    elif "HI" in parts:
        result = high << by | low >> (32 - by)
    else:
        result = low << by
    warp.set_word(ops[0], result, where)


def _lea(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    carry = ops[1] if re.fullmatch(r"U?P[0-9T]", ops[1]) else ""
    ops = ops[:1] + ops[2:] if carry else ops
    a, b = warp.word(ops[1]), warp.word(ops[2])
    if "HI" not in parts:
        result = (a << int(ops[3], 16) & WORD) + b
    elif "SX32" in parts:
        result = (_signed(a) >> (32 - int(ops[3], 16)) & WORD) + b
    else:
        result = ((a | warp.word(ops[3]) << 32) >> (32 - int(ops[4], 16)) & WORD) + b
    if "X" in parts:
        result = result + warp.flag(ops[-1])
    warp.set_word(ops[0], result, where)
    if carry:
        warp.set_flag(carry, result >> 32 > 0, where)


def _least(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    values = [warp.word(name) for name in ops[1:-1] if name not in ("PT", "UPT")]
    if parts[0].endswith("ADDMNMX"):
        values = [(values[0] + values[1]) & WORD, *values[2:]]
    a, b = values if "U32" in parts else map(_signed, values)
    warp.set_word(ops[0], np.where(warp.flag(ops[-1]), np.minimum(a, b), np.maximum(a, b)), where)


def _move(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    for offset in range(4 if "128" in parts else 2 if "64" in parts or parts[0] == "CS2R" else 1):
        warp.set_word(ops[0], warp.word(ops[1], offset), where, offset)


def _select(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    for offset in range(2 if "64" in parts else 1):
        value = np.where(warp.flag(ops[3]), warp.word(ops[1], offset), warp.word(ops[2], offset))
        warp.set_word(ops[0], value, where, offset)


def _read_special(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    warp.set_word(ops[0], warp.special.get(ops[1], np.zeros(LANES, np.int64)), where)


def _to_float(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    value = warp.word(ops[1]) if "U32" in parts else _signed(warp.word(ops[1]))
    rounded = value.astype(np.float32)
    if "RP" in parts:  # towards infinity
        rounded = np.where(rounded.astype(np.float64) < value, np.nextafter(rounded, np.float32(np.inf)), rounded)
    warp.set_word(ops[0], _bits(rounded), where)


def _to_integer(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    value = np.nan_to_num(warp.real(ops[1]).astype(np.float64), posinf=0.0, neginf=0.0)
    warp.set_word(ops[0], np.trunc(np.clip(value, -(2.0**31), 2.0**32 - 1)).astype(np.int64), where)


def _real(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    with np.errstate(all="ignore"):
        x = [warp.real(name) for name in ops[1:4] if not re.fullmatch(r"!?P[0-9T]", name)]
        value = {
            "FADD": lambda: x[0] + x[1],
            "FMUL": lambda: x[0] * x[1],
            "FFMA": lambda: x[0] * x[1] + x[2],
            "MUFU": lambda: 1 / x[0] if "RCP" in parts else np.ones(LANES, np.float32),
        }[parts[0]]()
    warp.set_word(ops[0], _bits(value), where)


def _set_real_predicate(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    result = _compare(parts[1].removesuffix("U"), warp.real(ops[2]), warp.real(ops[3])) & warp.flag(ops[4])
    warp.set_flag(ops[0], result, where)


def _save_predicates(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    flags = sum(warp.flag(f"P{bit}").astype(np.int64) << bit for bit in range(7))
    mask = int(ops[3], 16)
    warp.set_word(ops[0], (warp.word(ops[2]) & ~mask) | (flags & mask), where)


def _restore_predicates(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    for bit in range(7):
        if int(ops[2], 16) >> bit & 1:
            warp.set_flag(f"P{bit}", warp.word(ops[1]) >> bit & 1 == 1, where)


def _permute(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    both, selector = warp.word(ops[1]) | warp.word(ops[3]) << 32, int(ops[2], 16)
    result = sum((both >> 8 * (selector >> 4 * byte & 7) & 0xFF) << 8 * byte for byte in range(4))
    warp.set_word(ops[0], np.asarray(result), where)


def _absolute(warp: Warp, parts: list[str], ops: tuple[str, ...], where: Flags) -> None:
    warp.set_word(ops[0], np.abs(_signed(warp.word(ops[1]))), where)


def _plain(function: Callable[[Warp, tuple[str, ...], Flags], None]) -> Action:
    return lambda warp, parts, ops, where: function(warp, ops, where)


_ACTIONS: dict[str, Action] = {
    "ISETP": _set_predicate,
    "LOP3": _plain(_logic),
    "PLOP3": _plain(_predicate_logic),
    "IADD": _add_wide,
    "IADD3": _add,
    "VIADD": lambda warp, parts, ops, where: _add(warp, parts, (*ops, "RZ"), where),
    "IMAD": _multiply_add,
    "SHF": _shift,
    "LEA": _lea,
    "IMNMX": _least,
    "VIMNMX": _least,
    "VIADDMNMX": _least,
    "SEL": _select,
    "IABS": _absolute,
    "I2F": _to_float,
    "I2FP": _to_float,
    "F2I": _to_integer,
    "S2R": _read_special,
    "P2R": _save_predicates,
    "R2P": _restore_predicates,
    "FSETP": _set_real_predicate,
    "PRMT": _permute,
} | dict.fromkeys(("FADD", "FMUL", "FFMA", "MUFU"), _real)
_ACTIONS |= dict.fromkeys(("MOV", "LDC", "LDCU", "CS2R", "R2UR"), _move) | {"S2UR": _read_special}
_STORES = ("ST", "LDGSTS", "BAR", "DEPBAR", "LDGDEPBAR", "NOP", "BSSY", "BSYNC", "WARPSYNC", "FCHK", "RED")


def _carry_out(warp: Warp, instruction: Instruction, where: Flags) -> None:
    parts, ops = instruction.name.split("."), instruction.operands
    name = parts[0]
    if name not in _ACTIONS and name.startswith("U") and name[1:] in _ACTIONS:
        name = name[1:]
    if name in _ACTIONS:
        _ACTIONS[name](warp, [name, *parts[1:]], ops, where)
    elif instruction.kind == "integer":
        raise RuntimeError(f"{instruction.name} is not among the instructions that {__name__} knows")
    elif not name.startswith(_STORES):
        wide = 4 if "128" in parts or name in ("HMMA", "LDSM") else 2 if "64" in parts else 1
        for offset in range(wide):
            warp.set_word(ops[1] if name == "SHFL" else ops[0], np.full(LANES, 0x3F800000), where, offset)


def issue(code: Code, warp: Warp) -> Counter[tuple[int, int]]:
    """How often the warp issues each instruction: by its index and the lanes that take part in it."""
    at, alive = np.zeros(LANES, np.int64), np.ones(LANES, bool)
    back = np.zeros(LANES, np.int64)
    issued: Counter[tuple[int, int]] = Counter()
    for _ in range(LIMIT):
        if not alive.any():
            return issued
        index = int(at[alive].min())
        here = alive & (at == index)
        instruction = code.instructions[index]
        name = instruction.name.split(".")[0]
        where = here & warp.flag(instruction.guard)
        issued[index, int(where.sum())] += 1
        at = np.where(here, index + 1, at)
        if name in ("BRA", "CALL") and instruction.name != "BRA.DIV":
            for operand in instruction.operands[:-1]:
                where = where & warp.flag(operand)
            back = np.where(where, index + 1, back) if name == "CALL" else back
            at = np.where(where, code.labels[instruction.target], at)
        elif name == "RET":
            at = np.where(where, back, at)
        elif name == "EXIT":
            alive = alive & ~where
        elif instruction.name != "BRA.DIV":
            _carry_out(warp, instruction, where)
    raise RuntimeError(f"a warp issued {LIMIT} instructions: does an instruction lack in {__name__}?")
