"""Which faults does ``stiv verify`` find? Seeded ones are planted into a bundle's graphs, as a wrong engine would be.

    python benchmarks/mutations.py BUNDLE --faults 200 --clean 20 --out benchmarks/results/NAME.json

Each fault changes one thing in one graph: bits, rows or the scale of a weight, an attribute, an operator, the order of
inputs, a table. The changed graph runs in ONNX Runtime on the inputs of the golden answers. A fault is *caught* if an
output is beyond its gate, or if the graph does not run; else it is *hidden* where no output differs from the right one
by as much as its gate, and *missed* where one does. In a stored file the SHA-256 would find each of them
before anything runs. Clean runs have other numbers of threads and levels of optimization; none may be caught.
"""

import json
import platform
import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import onnx
import typer
from command import run
from onnx import numpy_helper

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.golden import Answer, GraphAnswer, read_golden
from stiv_deploy.runtime.sampling.golden_inputs import golden_inputs

if TYPE_CHECKING:
    import onnxruntime as ort

Plant = Callable[[onnx.GraphProto, random.Random], str | None]
"""Plants one fault and says where; None where the graph has no place for it."""
TRIES = 100
"""Graphs that are tried for a fault that needs a place."""
SWAPPED = {"Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul", "Sin": "Cos", "Cos": "Sin", "Tanh": "Sigmoid"}
ORDERED = ("Sub", "Div", "MatMul", "Concat", "Where")
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL")


def _weight(graph: onnx.GraphProto, chance: random.Random, dims: int) -> tuple[onnx.TensorProto, np.ndarray] | None:
    """A float32 weight with so many axes or more, and a copy of its values."""
    found = [each for each in graph.initializer if each.data_type == 1 and len(each.dims) >= dims]
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
    index, bit = chance.randrange(values.size), chance.randrange(19, 32)
    values.reshape(-1).view(np.uint32)[index] ^= np.uint32(1 << bit)
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
    return _keep(tensor, (values * np.float32(1.01)).astype(np.float32))


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


PLANTS: dict[str, Plant] = {
    "bit of a weight": flipped_bit,
    "swapped rows": swapped_rows,
    "stale scale": stale_scale,
    "attribute": other_attribute,
    "operator": other_operator,
    "order of inputs": swapped_inputs,
    "wire": other_wire,
    "dropped branch": dropped_branch,
}
"""Faults by name."""


class Outcome(NamedTuple):
    """What became of a fault: ``caught``, ``hidden`` or ``missed``, and the largest share of a gate."""

    fault: str
    graph: str
    where: str
    state: str
    share: float


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


def outcome(subject: Subject, fault: str, graph: str, chance: random.Random) -> Outcome | None:
    """Plant one fault into ``graph`` and verify it; None where there is no place for it."""
    model = onnx.ModelProto()
    model.CopyFrom(subject.models[graph])
    where = PLANTS[fault](model.graph, chance)
    if where is None:
        return None
    try:
        found = list(subject.run(model, graph, options_of(1)))
        share = subject.share(graph, found)
    except Exception as error:  # ONNX Runtime's own kinds: the graph does not load, or does not run
        return Outcome(fault, graph, f"{where}: {type(error).__name__}", "caught", float("inf"))
    if share > 1:
        return Outcome(fault, graph, where, "caught", share)
    hidden = subject.true_share(graph, found) <= 1
    return Outcome(fault, graph, where, "hidden" if hidden else "missed", share)


def planted(subject: Subject, count: int, seed: int) -> Iterator[Outcome]:
    """``count`` faults, of all kinds in turn, each in a graph of its own choice; fewer where a kind finds no place."""
    chance, kinds, graphs = random.Random(seed), list(PLANTS), list(subject.models)
    for index in range(count):
        tries = (outcome(subject, kinds[index % len(kinds)], chance.choice(graphs), chance) for _ in range(TRIES))
        found = next(filter(None, tries), None)
        if found is not None:
            yield found


def alarms(subject: Subject, count: int, seed: int) -> tuple[int, float]:
    """False alarms in ``count`` clean runs of all graphs, and the largest share of a gate."""
    chance, shares = random.Random(seed), []
    for index in range(count):
        options = options_of(chance.randint(1, 4), index % len(LEVELS))
        runs = ((graph, list(subject.run(model, graph, options))) for graph, model in subject.models.items())
        shares.append(max(subject.share(graph, outputs) for graph, outputs in runs))
    return sum(share > 1 for share in shares), max(shares, default=0.0)


def table(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """How many faults of each kind were planted, and what became of them."""
    counts = {fault: Counter(each.state for each in outcomes if each.fault == fault) for fault in PLANTS}
    return {fault: {"planted": sum(found.values()), **found} for fault, found in counts.items()}


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    faults: Annotated[int, typer.Option(min=1, help="Faults to plant.")] = 200,
    clean: Annotated[int, typer.Option(min=0, help="Clean runs.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the faults.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file of all outcomes.")] = None,
) -> None:
    """Print what became of the faults; exit 1 if one was missed or a clean run was caught."""
    subject = Subject(Bundle.open(bundle))
    outcomes = list(planted(subject, faults, seed))
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
