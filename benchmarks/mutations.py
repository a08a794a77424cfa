"""Which faults does ``stiv verify`` find? Seeded ones are planted into a bundle's graphs and into the runtime.

    python benchmarks/mutations.py BUNDLE --faults 200 --clean 20 --out benchmarks/results/NAME.json
    python benchmarks/mutations.py BUNDLE --checkpoint CHECKPOINT --clean 1000

Each fault of a graph changes one thing, as a wrong engine would: bits, rows or the scale of a weight, an attribute, an
operator, the order of inputs, how a mask or a table is read; in 8 bits a quantizer's scale or place. The changed graph
runs in ONNX Runtime on the inputs of the golden answers. Each fault of the runtime (``benchmarks/runtime_faults.py``)
changes one function of it while the runs of the golden answers are played.

A fault is *caught* if an output is beyond its gate, or if the graph does not run; else it is *hidden* where no output
differs from the right one by as much as its gate, and *missed* where one does. In a stored file the SHA-256 would find
each of a graph before anything runs, and none of the runtime. With ``--checkpoint`` the parity ladder's levels op and
block, on the inputs of a real run, are asked too. Clean runs have other numbers of threads, levels of optimization and
ways of using memory, at all sizes that have answers; none may be caught.
"""

import json
import platform
import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import onnx
import runtime_faults
import typer
from command import run
from onnx import numpy_helper

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import is_block
from stiv_deploy.runtime.bundle.golden import Answer, GraphAnswer, read_golden
from stiv_deploy.runtime.sampling.golden_inputs import golden_inputs
from stiv_deploy.runtime.sampling.golden_player import run_rows

if TYPE_CHECKING:
    import onnxruntime as ort

Plant = Callable[[onnx.GraphProto, random.Random], str | None]
"""Plants one fault and says where; None where the graph has no place for it."""
TRIES = 100
"""Graphs that are tried for a fault that needs a place."""
SWAPPED = {"Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul", "Sin": "Cos", "Cos": "Sin", "Tanh": "Sigmoid"}
ORDERED = ("Sub", "Div", "MatMul", "Concat", "Where")
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL")


def _weight(graph: onnx.GraphProto, chance: random.Random, dims: int) -> tuple[onnx.TensorProto, np.ndarray] | None:
    """A weight in floats with so many axes or more, and a copy of its values."""
    found = [each for each in graph.initializer if each.data_type in FLOATS and len(each.dims) >= dims]
    if not found:
        return None
    tensor = chance.choice(found)
    return tensor, numpy_helper.to_array(tensor).copy()


def _keep(tensor: onnx.TensorProto, values: np.ndarray) -> str:
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return tensor.name


def flipped_bit(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """Sign, exponent or one of the four highest bits of the mantissa of one weight."""
    if (found := _weight(graph, chance, 1)) is None:
        return None
    tensor, values = found
    whole, kind = 8 * values.itemsize, np.uint32 if values.itemsize == 4 else np.uint16
    index, bit = chance.randrange(values.size), chance.randrange(19 if whole == 32 else 6, whole)
    values.reshape(-1).view(kind)[index] ^= kind(1 << bit)
    return f"{_keep(tensor, values)}[{index}] bit {bit}"


def swapped_rows(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """Two rows of a matrix have each other's place."""
    if (found := _weight(graph, chance, 2)) is None or len(found[1]) < 2:
        return None
    tensor, values = found
    one, two = chance.sample(range(len(values)), 2)
    values[[one, two]] = values[[two, one]]
    return f"{_keep(tensor, values)} rows {one} and {two}"


def stale_scale(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A weight as with a scale that is 1 % off."""
    if (found := _weight(graph, chance, 1)) is None:
        return None
    tensor, values = found
    return _keep(tensor, (values * np.float32(1.01)).astype(values.dtype))


def other_attribute(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """An epsilon ten times as large, another axis, or another order of axes."""
    kinds = {onnx.AttributeProto.FLOAT, onnx.AttributeProto.INT, onnx.AttributeProto.INTS}
    names = {"epsilon", "axis", "perm", "scale", "keepdims"}
    found = [(n, a) for n in graph.node for a in n.attribute if a.type in kinds and a.name in names]
    if not found:
        return None
    node, attribute = chance.choice(found)
    if attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f *= 10
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = attribute.i - 1 if attribute.i else 1
    else:
        attribute.ints[:] = [*attribute.ints[:-2], attribute.ints[-1], attribute.ints[-2]]
    return f"{node.op_type} {node.name} {attribute.name}"


def other_operator(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """Plus for minus, times for by, sine for cosine."""
    found = [node for node in graph.node if node.op_type in SWAPPED]
    if not found:
        return None
    node = chance.choice(found)
    node.op_type = SWAPPED[node.op_type]
    return f"{node.name} is {node.op_type}"


def swapped_inputs(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """The last two inputs of an operator whose order counts."""
    found = [node for node in graph.node if node.op_type in ORDERED and len({*node.input[-2:]}) == 2]
    if not found:
        return None
    node = chance.choice(found)
    node.input[-2:] = [node.input[-1], node.input[-2]]
    return f"{node.op_type} {node.name}"


def other_wire(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A graph input, such as a mask or a table, where another one should be read."""
    readers = [node for node in graph.node if {*node.input} & {each.name for each in graph.input}]
    if not readers or len(graph.input) < 2:
        return None
    node = chance.choice(readers)
    index = chance.choice([i for i, name in enumerate(node.input) if name in {each.name for each in graph.input}])
    was = node.input[index]
    node.input[index] = chance.choice([each.name for each in graph.input if each.name != was])
    return f"{node.op_type} {node.name} reads {node.input[index]} for {was}"


def dropped_branch(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A sum gives one of its terms alone: a residual or a bias is lost."""
    found = [node for node in graph.node if node.op_type == "Add"]
    if not found:
        return None
    node = chance.choice(found)
    node.op_type, kept = "Identity", node.input[chance.randrange(2)]
    node.input[:] = [kept]
    return f"{node.name} is {kept}"


def _changed_input(graph: onnx.GraphProto, name: str, nodes: list[onnx.NodeProto], values: dict[str, Any]) -> str:
    """All readers of the graph input ``name`` get "changed", which ``nodes`` make of it and of int64 ``values``."""
    for node in graph.node:
        node.input[:] = ["changed" if each == name else each for each in node.input]
    for number, node in enumerate(nodes):
        graph.node.insert(number, node)
    graph.initializer.extend(numpy_helper.from_array(np.array(each, np.int64), key) for key, each in values.items())
    return name


def _input_like(graph: onnx.GraphProto, chance: random.Random, *ends: str) -> onnx.ValueInfoProto | None:
    read = {name for node in graph.node for name in node.input}
    found = [each for each in graph.input if each.name.endswith(ends) and each.name in read]
    return chance.choice(found) if found else None


def turned_mask(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A mask is read along its last axis from behind, as with a layout that runs the other way."""
    if (mask := _input_like(graph, chance, "_mask")) is None:
        return None
    axis = len(mask.type.tensor_type.shape.dim) - 1
    turned = onnx.helper.make_node("Slice", [mask.name, "last", "before", "which", "back"], ["changed"])
    values = {"last": [-1], "before": [-(2**31)], "which": [axis], "back": [-1]}
    return _changed_input(graph, mask.name, [turned], values)


def wrong_stride(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A table of RoPE is read with twice its stride, and from its start again where it ends."""
    if (table := _input_like(graph, chance, "_cos", "_sin")) is None:
        return None
    node = onnx.helper.make_node
    nodes = [
        node("Shape", [table.name], ["rows"], start=0, end=1),
        node("Squeeze", ["rows"], ["count"]),
        node("Range", ["none", "count", "single"], ["right rows"]),
        node("Mul", ["right rows", "twice"], ["far rows"]),
        node("Mod", ["far rows", "count"], ["wrong rows"]),
        node("Gather", [table.name, "wrong rows"], ["changed"], axis=0),
    ]
    return _changed_input(graph, table.name, nodes, {"twice": 2, "none": 0, "single": 1})


def _quantizers(graph: onnx.GraphProto, *kinds: str) -> list[onnx.NodeProto]:
    """Q or DQ nodes whose scale is an initializer."""
    known = {each.name for each in graph.initializer}
    return [node for node in graph.node if node.op_type in kinds and node.input[1] in known]


def _pairs(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Q nodes of activations, each with the DQ behind it."""
    behind = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    found = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    return [(node, behind[node.output[0]]) for node in found if node.output[0] in behind]


def other_scale(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """One Q or DQ has a scale 1.25 times as large."""
    if not (found := _quantizers(graph, "QuantizeLinear", "DequantizeLinear")):
        return None
    node = chance.choice(found)
    tensor = next(each for each in graph.initializer if each.name == node.input[1])
    values = numpy_helper.to_array(tensor)
    graph.initializer.append(numpy_helper.from_array((values * 1.25).astype(values.dtype), "other scale"))
    node.input[1] = "other scale"
    return f"{node.op_type} of {node.input[0]}"


def swapped_scales(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """The Q/DQ pairs of two activations have each other's scale."""
    known = {each.name for each in graph.initializer}
    found = [pair for pair in _pairs(graph) if pair[0].input[1] in known]
    if len({pair[0].input[1] for pair in found}) < 2:
        return None
    one = chance.choice(found)
    two = chance.choice([pair for pair in found if pair[0].input[1] != one[0].input[1]])
    names = one[0].input[1], two[0].input[1]
    for pair, name in ((one, names[1]), (two, names[0])):
        for node in pair:
            node.input[1] = name
    return f"{names[0]} and {names[1]}"


def lost_quantizer(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A Q/DQ pair is left out: what is behind it computes on, in full precision."""
    if not (found := _pairs(graph)):
        return None
    first, second = chance.choice(found)
    second.op_type = "Identity"
    second.input[:] = [first.input[0]]
    del second.attribute[:]
    return f"{second.output[0]} is {first.input[0]}"


def moved_quantizer(graph: onnx.GraphProto, chance: random.Random) -> str | None:
    """A Q/DQ pair stands behind an operator instead of before it."""
    readers = {name: node for node in graph.node for name in node.input}
    found = [(pair, readers[pair[1].output[0]]) for pair in _pairs(graph) if pair[1].output[0] in readers]
    found = [(pair, reader) for pair, reader in found if reader.op_type in ("MatMul", "Gemm")]
    if not found:
        return None
    (first, second), reader = chance.choice(found)
    source, dequantized, result = first.input[0], second.output[0], reader.output[0]
    reader.input[:] = [source if name == dequantized else name for name in reader.input]
    reader.output[0] = "before the quantizer"
    first.input[0], second.output[0] = reader.output[0], result
    for node in (first, second):  # behind the reader: nodes stand in their order
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        graph.node.remove(node)
        graph.node.insert(next(i for i, each in enumerate(graph.node) if copy.input[0] in each.output) + 1, copy)
    return f"{dequantized} behind {reader.op_type} {reader.name}"


PLANTS: dict[str, Plant] = {
    "bit of a weight": flipped_bit,
    "swapped rows": swapped_rows,
    "stale scale": stale_scale,
    "attribute": other_attribute,
    "operator": other_operator,
    "order of inputs": swapped_inputs,
    "wire": other_wire,
    "dropped branch": dropped_branch,
    "turned mask": turned_mask,
    "stride of a table": wrong_stride,
    "scale of a quantizer": other_scale,
    "swapped scales": swapped_scales,
    "lost quantizer": lost_quantizer,
    "moved quantizer": moved_quantizer,
}
"""Faults by name."""


RUNTIME = "runtime"
"""Kind of the faults of the runtime's own code."""


class Outcome(NamedTuple):
    """What became of a fault: ``caught``, ``hidden`` or ``missed``, and the largest share of a gate.

    ``hashes`` says whether a stored file with the fault would have another SHA-256; ``parity`` whether the ladder finds
    it, None where it was not asked.
    """

    fault: str
    graph: str
    where: str
    state: str
    share: float
    hashes: bool = True
    parity: bool | None = None


class Subject:
    """The graphs of a bundle, their golden answers with inputs, and what they rightly give."""

    def __init__(self, bundle: Bundle) -> None:
        golden, self.bundle = read_golden(bundle), bundle
        self.cases: dict[str, list[GraphAnswer]] = {}
        for case in golden.graphs:
            self.cases.setdefault(case.graph, []).append(case)
        self.models = {name: onnx.load(bundle.graph_file(name)) for name in self.cases}
        self._vocabulary = golden.vocabulary
        self._right: dict[str, list[dict[str, np.ndarray]]] = {}

    def run(self, model: onnx.ModelProto, graph: str, options: "ort.SessionOptions") -> Iterator[dict[str, np.ndarray]]:
        """Outputs for each case of ``graph``."""
        import onnxruntime as ort

        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        spec, facts = self.bundle.manifest.graphs[graph].spec, self.bundle.manifest.model
        names = {each.name for each in session.get_inputs()}
        for case in self.cases[graph]:
            dims = case.sizes.dims(facts)
            inputs = golden_inputs(graph, spec, dims, self._vocabulary)
            found = session.run(None, {name: value for name, value in inputs.items() if name in names})
            if [each.shape for each in found] != [each.sized(dims) for each in spec.outputs]:
                raise ValueError("an output has another shape, which the runtime's buffers do not take")
            yield dict(zip((each.name for each in spec.outputs), found, strict=True))

    def right(self, graph: str) -> list[dict[str, np.ndarray]]:
        """What the graph gives as it is."""
        if graph not in self._right:
            self._right[graph] = list(self.run(self.models[graph], graph, options_of(1)))
        return self._right[graph]

    def share(self, graph: str, outputs: list[dict[str, np.ndarray]]) -> float:
        """The largest error of ``outputs``, as a share of its gate."""
        return max(_share(each, found) for case, found in self._pairs(graph, outputs) for each in case.outputs)

    def true_share(self, graph: str, outputs: list[dict[str, np.ndarray]]) -> float:
        """The largest difference to what is right, without sketches, as a share of its gate."""
        return max(
            float(np.linalg.norm(found[each.name] - right[each.name])) / each.norm / each.gate
            for (case, found), right in zip(self._pairs(graph, outputs), self.right(graph), strict=True)
            for each in case.outputs
        )

    def _pairs(
        self, graph: str, outputs: list[dict[str, np.ndarray]]
    ) -> list[tuple[GraphAnswer, dict[str, np.ndarray]]]:
        return list(zip(self.cases[graph], outputs, strict=True))


def _share(answer: Answer, found: dict[str, np.ndarray]) -> float:
    return answer.error(found[answer.name]) / answer.gate


def options_of(threads: int, level: int = 2) -> "ort.SessionOptions":
    """Quiet sessions of so many threads; ``level`` 0 to 2 of optimization."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[level])
    return options


def outcome(
    subject: Subject, fault: str, graph: str, chance: random.Random, parity: "Parity | None" = None
) -> Outcome | None:
    """Plant one fault into ``graph`` and verify it; None where there is no place for it."""
    model = onnx.ModelProto()
    model.CopyFrom(subject.models[graph])
    where = PLANTS[fault](model.graph, chance)
    if where is None:
        return None
    asked = None if parity is None else parity.catches(model, graph)
    try:
        found = list(subject.run(model, graph, options_of(1)))
        share = subject.share(graph, found)
    except Exception as error:  # ONNX Runtime's own kinds: the graph does not load, or does not run
        return Outcome(fault, graph, f"{where}: {type(error).__name__}", "caught", float("inf"), parity=asked)
    if share > 1:
        return Outcome(fault, graph, where, "caught", share, parity=asked)
    hidden = subject.true_share(graph, found) <= 1
    return Outcome(fault, graph, where, "hidden" if hidden else "missed", share, parity=asked)


class Parity:
    """The levels op and block of the parity ladder for a bundle of floats, whose truth is computed once."""

    def __init__(self, bundle: Bundle, checkpoint: Path) -> None:
        import torch

        from stiv_deploy.export.graphs.draws import rel_l2
        from stiv_deploy.export.parity.ladder import gate_of
        from stiv_deploy.export.parity.oracle import Oracle
        from stiv_deploy.export.parity.requests import parity_requests
        from stiv_deploy.export.parity.runs import probe
        from stiv_deploy.export.precision import torch_dtype
        from stiv_deploy.stiv_ref.checkpoint import load_checkpoint

        loaded, self.manifest = load_checkpoint(checkpoint), bundle.manifest
        exact, plain = Oracle(loaded, torch.float64), Oracle(loaded, torch_dtype(self.manifest.precision))
        self._cases: dict[str, tuple[Any, dict[str, tuple[Any, float]]]] = {}
        request = parity_requests(self.manifest, loaded, 10)[-1]
        for graph, inputs in probe(exact, request, self.manifest.model.blocks):
            spec = self.manifest.graphs[graph].spec
            given = {each.name: inputs[each.name].to(getattr(torch, each.dtype)).contiguous() for each in spec.inputs}
            truth, rounded = exact.run(graph, given), plain.run(graph, given)
            level = "block" if is_block(graph) else "op"
            gates = {
                name: gate_of(level, self.manifest.precision, rel_l2(rounded[name], truth[name])) for name in truth
            }
            self._cases[graph] = given, {name: (truth[name], gates[name]) for name in truth}

    def catches(self, model: onnx.ModelProto, graph: str) -> bool:
        """Whether an output of ``model`` is beyond its gate, or there is none."""
        import onnxruntime as ort
        import torch

        from stiv_deploy.export.graphs.draws import rel_l2

        if graph not in self._cases:  # frames, which the ladder looks at in whole videos only
            return False
        given, truths = self._cases[graph]
        try:
            session = ort.InferenceSession(model.SerializeToString(), options_of(1), providers=["CPUExecutionProvider"])
            names = {each.name for each in session.get_inputs()}
            found = session.run(None, {name: value.numpy() for name, value in given.items() if name in names})
            outputs = dict(zip((each.name for each in self.manifest.graphs[graph].spec.outputs), found, strict=True))
            errors = {name: rel_l2(torch.from_numpy(outputs[name]), truth) for name, (truth, _) in truths.items()}
        except Exception:  # ONNX Runtime's own kinds, and shapes that differ
            return True
        return any(not errors[name] <= gate for name, (_, gate) in truths.items())


def planted_in_runtime(bundle: Bundle) -> Iterator[Outcome]:
    """Each fault of the runtime, where the bundle has runs: one that no run shows is missed."""
    golden = read_golden(bundle)
    for fault in runtime_faults.FAULTS if golden.sampling is not None else ():
        try:
            with runtime_faults.planted(fault):
                share = played_share(bundle)
        except Exception:  # whatever a fault leads to
            share = float("inf")
        yield Outcome(RUNTIME, "", fault, "caught" if share > 1 else "missed", share, hashes=False)


def played_share(bundle: Bundle, threads: int = 1) -> float:
    """The largest share of a gate of the bundle's runs."""
    with OnnxRuntimeBackend(bundle, threads=threads) as backend:
        rows = run_rows(backend, bundle, read_golden(bundle))
    return max((row.error / row.gate for row in rows), default=0.0)


def planted(subject: Subject, count: int, seed: int, parity: Parity | None = None) -> Iterator[Outcome]:
    """``count`` faults, of all kinds in turn, each in a graph of its own choice; fewer where a kind finds no place."""
    chance, kinds, graphs = random.Random(seed), list(PLANTS), list(subject.models)
    for index in range(count):
        tries = (
            outcome(subject, kinds[index % len(kinds)], chance.choice(graphs), chance, parity) for _ in range(TRIES)
        )
        found = next(filter(None, tries), None)
        if found is not None:
            yield found


def alarms(subject: Subject, count: int, seed: int) -> tuple[int, float]:
    """False alarms in ``count`` clean runs of all graphs and samplings, and the largest share of a gate."""
    chance, shares = random.Random(seed), []
    for index in range(count):
        threads = chance.randint(1, 4)
        options = options_of(threads, index % len(LEVELS))
        options.enable_cpu_mem_arena, options.enable_mem_pattern = chance.random() < 0.5, chance.random() < 0.5
        runs = ((graph, list(subject.run(model, graph, options))) for graph, model in subject.models.items())
        graphs = max(subject.share(graph, outputs) for graph, outputs in runs)
        shares.append(max(graphs, played_share(subject.bundle, threads)))
    return sum(share > 1 for share in shares), max(shares, default=0.0)


def table(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """How many faults of each kind were planted, what became of them, and who else finds them."""
    kinds = {fault: [each for each in outcomes if each.fault == fault] for fault in (*PLANTS, RUNTIME)}
    return {fault: _counts(found) for fault, found in kinds.items() if found}


def _counts(found: list[Outcome]) -> dict[str, int]:
    others = {"by hashes": sum(each.hashes for each in found)}
    if any(each.parity is not None for each in found):
        others["by parity"] = sum(bool(each.parity) for each in found)
    return {"planted": len(found), **Counter(each.state for each in found), **others}


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    faults: Annotated[int, typer.Option(min=1, help="Faults to plant.")] = 200,
    clean: Annotated[int, typer.Option(min=0, help="Clean runs.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the faults.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Of the bundle: ask the parity ladder too.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of all outcomes.")] = None,
) -> None:
    """Print what became of the faults; exit 1 if one was missed or a clean run was caught."""
    subject = Subject(Bundle.open(bundle))
    parity = None if checkpoint is None else Parity(subject.bundle, checkpoint)
    outcomes = [*planted(subject, faults, seed, parity), *planted_in_runtime(subject.bundle)]
    false, nearest = alarms(subject, clean, seed)
    report = {
        "command": f"python benchmarks/mutations.py {bundle} --faults {faults} --clean {clean} --seed {seed}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, onnxruntime {version('onnxruntime')}",
        "bundle": subject.bundle.hash,
        "kinds": table(outcomes),
        "clean": {"runs": clean, "alarms": false, "largest share of a gate": nearest},
        "not caught": [each._asdict() for each in outcomes if each.state != "caught"],
    }
    print(json.dumps(report, indent=1))
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    if false or any(each.state == "missed" for each in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
