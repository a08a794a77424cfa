"""The fusion audit: does an engine have the fused kernels and 8-bit products that its bundle's plan promises?

Checks the builder's layer report of a graph against :file:`expected_fusions.json`: each linear one product of the
planned types, each attention one fused kernel, no float32 product in 16-bit graphs, no more kernels than known.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple

from pydantic import Field

from stiv_deploy.export.audit.layer_report import EngineLayer
from stiv_deploy.runtime.bundle.contract import (
    SKIP_GRAPHS,
    VAE_GRAPHS,
    Choice,
    Format,
    Frozen,
    Precision,
    block_of,
    has_layer,
    is_block,
)
from stiv_deploy.runtime.bundle.manifest import Manifest, ReducedForm

Activations = Literal["float32", "16-bit"]
TABLE = "expected_fusions.json"
TYPE_NAMES: dict[Precision, str] = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16"}
"""Types of a bundle by TensorRT's names."""
BLOCK_ATTENTION = ("spatial", "temporal", "cross")
BLOCK_LINEARS = (
    *(f"{attention}.{part}" for attention in ("spatial", "temporal") for part in ("qkv", "out")),
    *("cross.q", "cross.out", "ffn.up", "ffn.down"),
)
PRODUCT_OPS = ("MatMul", "Gemm")


class ExpectedAttention(Frozen):
    """How many fused kernels one attention is, the type of all their inputs, and what such a kernel needs."""

    fused: int
    inputs: str | None
    needs: str = ""


class ExpectedKernels(Frozen):
    """The most kernels that a graph may have in one profile."""

    graph: str
    activations: Activations
    quantization: Format | None = None
    attention: Choice = "high"
    temporal: bool = True
    at_most: int = Field(gt=0)


class ExpectedFusions(Frozen):
    """The table of expected fusions."""

    about: str
    linears: dict[Choice, str]
    attention: dict[str, ExpectedAttention]
    kernels: tuple[ExpectedKernels, ...]


class AuditRow(Frozen):
    """One check: where (target, bucket, graph), what, and whether what was found is what was expected."""

    target: str
    bucket: str
    graph: str
    name: str
    expected: str
    found: str
    passed: bool
    hint: str = ""


class Expectation(Frozen):
    """What the bundle's manifest says about one graph: its type, and the plan's choice for every layer in it."""

    graph: str
    precision: Precision
    quantization: Format | None
    choices: dict[str, Choice]
    attention: dict[str, Choice]
    temporal: bool
    counted: bool = True
    """Whether its kernels are held to the table's number: not where weights are inputs, which costs some."""

    @property
    def activations(self) -> Activations:
        """The row of the table."""
        return "float32" if self.precision == "float32" else "16-bit"

    @property
    def type_name(self) -> str:
        """The bundle's type by TensorRT's name."""
        return TYPE_NAMES[self.precision]


@cache
def expected_fusions() -> ExpectedFusions:
    """The table in the package."""
    return ExpectedFusions.model_validate_json((files("stiv_deploy.export.audit") / TABLE).read_text(encoding="utf-8"))


def expectation(manifest: Manifest, graph: str, reduced: ReducedForm | None = None) -> Expectation:
    """What to expect of ``graph``: the plan of quantized bundles, else all linears and attention of blocks high.

    A graph of the VAE is float32, or of the type of its ``reduced`` form, from which it is built.
    """
    plan = manifest.quantization.layers if manifest.quantization else {}
    owner = block_of(graph)
    mine: dict[str, Choice] = {
        name.removeprefix(f"{owner}."): choice for name, choice in plan.items() if has_layer(graph, name)
    }
    attention: dict[str, Choice] = {}
    if is_block(owner):
        parts = [name for name in (*BLOCK_ATTENTION, "ffn") if has_layer(graph, f"{owner}.{name}")]
        parts = [name for name in parts if manifest.model.temporal or name != "temporal"]
        attention = {name: mine.pop(f"{name}.attention", "high") for name in parts if name != "ffn"}
        mine = {name: mine.get(name, "high") for name in BLOCK_LINEARS if name.split(".")[0] in parts}
    inner: Precision = "float32" if reduced is None else reduced.precision
    return Expectation(
        graph=graph,
        precision=inner if graph in VAE_GRAPHS else manifest.precision,
        quantization=manifest.quantization.format if manifest.quantization else None,
        choices=mine,
        attention=attention,
        temporal=manifest.model.temporal,
    )


def audit_graph(layers: Sequence[EngineLayer], expected: Expectation, target: str, bucket: str) -> list[AuditRow]:
    """All checks of one graph's engine. ``layers`` may hold several profiles; each is checked on its own."""
    rows = []
    profiles = sorted({layer.profile for layer in layers})
    for profile in profiles:
        kernels = [layer for layer in layers if layer.is_kernel and layer.profile == profile]
        name = bucket if len(profiles) == 1 else f"{bucket} (profile {profile})"
        rows += [
            AuditRow(
                target=target,
                bucket=name,
                graph=expected.graph,
                name=check.name,
                expected=check.expected,
                found=check.found,
                passed=check.passed,
                hint="" if check.passed else check.hint,
            )
            for check in _checks(kernels, expected)
        ]
    return rows


class Check(NamedTuple):
    """An :class:`AuditRow` before it knows its place; ``hint`` says what a pass would need."""

    name: str
    expected: str
    found: str
    passed: bool
    hint: str = ""


def _checks(kernels: Sequence[EngineLayer], expected: Expectation) -> Iterator[Check]:
    yield from (_linear(kernels, expected, name, choice) for name, choice in expected.choices.items())
    yield from (_attention(kernels, expected, name, choice) for name, choice in expected.attention.items())
    if expected.graph in VAE_GRAPHS:
        yield _convolutions(kernels, expected)
    if expected.activations != "float32":
        yield _no_float32(kernels, expected)
    limit = _kernel_limit(expected)
    if limit is not None:
        yield Check("kernels", f"at most {limit}", str(len(kernels)), len(kernels) <= limit)


def _linear(kernels: Sequence[EngineLayer], expected: Expectation, name: str, choice: Choice) -> Check:
    """The product of one linear has the planned operands and writes the bundle's type, or 8 bits straight away."""
    operands = expected_fusions().linears[choice].replace("activations", expected.type_name)
    products = [layer for layer in kernels if layer.is_product and computes(layer, name)]
    found = " + ".join(f"{layer.operands} -> {layer.outputs[0].dtype}" for layer in products) or "no GEMM"
    outputs = {expected.type_name, "FP8", "Int8"}
    passed = len(products) == 1 and _same(products[0].operands, operands) and products[0].outputs[0].dtype in outputs
    return Check(f"{name} GEMM", f"{operands} -> {expected.type_name}", found, passed)


def computes(layer: EngineLayer, linear: str) -> bool:
    """Whether the product of ``linear`` is among the layer's ONNX nodes."""
    return any(node.rpartition(".")[::2] in ((linear, op) for op in PRODUCT_OPS) for node in layer.nodes)


def _same(found: str, expected: str) -> bool:
    """Equal types, where a report that does not show weights is believed for them."""
    return found == expected or found == f"{expected.split(' x ')[0]} x ?"


def _attention(kernels: Sequence[EngineLayer], expected: Expectation, name: str, choice: Choice) -> Check:
    """One attention of a block is one fused kernel, with all inputs in the planned type."""
    wanted = expected_fusions().attention[expected.activations if choice == "high" else choice]
    inside = [layer for layer in kernels if any(node.startswith(f"{name}.") for node in layer.nodes)]
    fused = [layer for layer in inside if layer.is_attention]
    found = " + ".join("/".join(dict.fromkeys(tensor.dtype for tensor in layer.inputs)) for layer in fused)
    what = f"{name} attention"
    if not wanted.fused:
        return Check(what, "not fused (no kernel exists)", found or "not fused", True)
    kind = (wanted.inputs or "any").replace("activations", expected.type_name)
    types = {tensor.dtype for layer in fused for tensor in layer.inputs}
    passed = len(fused) == wanted.fused and types == {kind}
    words = _fused_words(fused, found, inside, name)
    return Check(what, f"{wanted.fused} fused kernel, {kind}", words, passed, f"it needs {wanted.needs}")


def _fused_words(fused: Sequence[EngineLayer], types: str, inside: Sequence[EngineLayer], name: str) -> str:
    if fused:
        return f"{len(fused)} fused kernel{'s' if len(fused) > 1 else ''}, {types}"
    products = [layer for layer in inside if layer.is_product and not _is_linear(layer)]
    return "not fused: " + (" + ".join(f"{layer.operands} GEMM" for layer in products) or f"nothing named {name}")


def _is_linear(layer: EngineLayer) -> bool:
    return any(computes(layer, linear) for linear in BLOCK_LINEARS)


def _convolutions(kernels: Sequence[EngineLayer], expected: Expectation) -> Check:
    """Every convolution of the VAE multiplies the type that it was exported in."""
    wanted = f"{expected.type_name} x {expected.type_name}"
    found = Counter(layer.operands for layer in kernels if layer.is_convolution)
    words = ", ".join(f"{count} of {operands}" for operands, count in found.items())
    return Check("convolutions", wanted, words or "none", bool(found) and all(_same(each, wanted) for each in found))


def _no_float32(kernels: Sequence[EngineLayer], expected: Expectation) -> Check:
    """No product multiplies float32 in a graph of a 16-bit bundle."""
    stray = [layer for layer in kernels if layer.is_product and "Float" in layer.operands.split(" x ")]
    names = Counter(_product_name(layer) for layer in stray)
    return Check("float32 GEMMs", "none", ", ".join(sorted(names)) or "none", not stray)


def _product_name(layer: EngineLayer) -> str:
    """What a product is called in the graph: its first node that is one, else the engine's own name."""
    named = [node for node in layer.nodes if node.rpartition(".")[2].startswith(PRODUCT_OPS)]
    return (named or list(layer.nodes) or [layer.name])[0]


def _kernel_limit(expected: Expectation) -> int | None:
    """The table's row for this graph: one for all blocks, and one for each kind of half; None where none counts.

    What skips the blocks is one kernel each.
    """
    if expected.graph in SKIP_GRAPHS:
        return 1
    if not expected.counted:
        return None
    graph = expected.graph.partition("_")[0] if expected.attention else expected.graph
    key = {
        "graph": graph,
        "activations": expected.activations,
        "quantization": expected.quantization if expected.attention else None,
        "attention": expected.attention.get("spatial", "high"),
        "temporal": expected.temporal,
    }
    rows = [row for row in expected_fusions().kernels if row.model_dump(exclude={"at_most"}) == key]
    return rows[0].at_most if rows else None


def failures(rows: Sequence[AuditRow]) -> list[str]:
    """One line for each failed check."""
    return [
        f"{row.graph}: {row.name}: expected {row.expected}, found {row.found} ({row.target}, bucket {row.bucket})"
        + (f"; {row.hint}" if row.hint else "")
        for row in rows
        if not row.passed
    ]
