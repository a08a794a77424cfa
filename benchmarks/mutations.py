"""Which faults does ``stiv verify`` find? Seeded ones are planted into a bundle's graphs and into the runtime.

    python benchmarks/mutations.py BUNDLE --faults 200 --clean 20 --out benchmarks/results/NAME.json
    python benchmarks/mutations.py BUNDLE --checkpoint CHECKPOINT --clean 1000
    python benchmarks/mutations.py BUNDLE_IN_INT8 --audit

Each fault of a graph (``benchmarks/graph_faults.py``) changes one thing, as a wrong engine would. The changed graph
runs in ONNX Runtime on the inputs of the golden answers. Each fault of the runtime (``benchmarks/runtime_faults.py``)
changes one function of it while the runs of the golden answers are played. Those of kernels have a script of their own,
``benchmarks/kernel_faults.py``.

A fault is *caught* if an output is beyond its gate, or if the graph does not run. Of the others it is *equal* where all
outputs are the same bits as the right ones: a change that changes nothing. It is *hidden* where no output differs from
the right one by as much as its gate, which is what right implementations may differ by, and *missed* where one does.

In a stored file the SHA-256 would find each of a graph before anything runs, and none of the runtime. With
``--checkpoint`` the parity ladder's levels op and block, on the inputs of a real run, are asked too; with ``--audit``
faults of quantizers are built by TensorRT-RTX, which needs no GPU, and put to the fusion audit. Clean runs have other
numbers of threads, levels of optimization and ways of using memory, at all sizes that have answers; none may be caught.
"""

import json
import platform
import random
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import onnx
import runtime_faults
import typer
from command import run
from graph_faults import OF_QUANTIZERS, PLANTS

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import is_block
from stiv_deploy.runtime.bundle.golden import Answer, GraphAnswer, read_golden
from stiv_deploy.runtime.sampling import golden_player
from stiv_deploy.runtime.sampling.golden_inputs import golden_inputs

if TYPE_CHECKING:
    import onnxruntime as ort
    from audited_faults import Audited

TRIES = 100
"""Graphs that are tried for a fault that needs a place."""
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL")
RUNTIME = "runtime"
"""Kind of the faults of the runtime's own code."""


class Outcome(NamedTuple):
    """What became of a fault: ``caught``, ``equal``, ``hidden`` or ``missed``, and the largest share of a gate.

    ``hashes`` says whether a stored file with the fault would have another SHA-256; ``parity`` and ``audit`` whether
    the ladder and the fusion audit find it, None where they were not asked.
    """

    fault: str
    graph: str
    where: str
    state: str
    share: float
    hashes: bool = True
    parity: bool | None = None
    audit: bool | None = None


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

    def state(self, graph: str, outputs: list[dict[str, np.ndarray]]) -> str:
        """What became of a fault that makes these ``outputs``."""
        pairs = self._pairs(graph, outputs)
        shares = [_share(each, found) for case, found in pairs for each in case.outputs]
        truths = [
            _apart(found[each.name], right[each.name], each)
            for (case, found), right in zip(pairs, self.right(graph), strict=True)
            for each in case.outputs
        ]
        return state_of(shares, truths)

    def _pairs(
        self, graph: str, outputs: list[dict[str, np.ndarray]]
    ) -> list[tuple[GraphAnswer, dict[str, np.ndarray]]]:
        return list(zip(self.cases[graph], outputs, strict=True))


def _share(answer: Answer, found: dict[str, np.ndarray]) -> float:
    return answer.error(found[answer.name]) / answer.gate


def _apart(found: np.ndarray, right: np.ndarray, answer: Answer) -> float:
    """How far ``found`` is from what is ``right``, without sketches, as a share of the gate."""
    return float(np.linalg.norm(found.astype(np.float64) - right)) / max(answer.norm, 1e-300) / answer.gate


def state_of(shares: Iterable[float], truths: Iterable[float]) -> str:
    """What became of a fault, from the shares of gates that verify sees, and those of the true differences."""
    apart = max(truths, default=0.0)
    if not all(each <= 1 for each in shares):
        return "caught"
    return "equal" if apart == 0 else "hidden" if apart <= 1 else "missed"


def options_of(threads: int, level: int = 2) -> "ort.SessionOptions":
    """Quiet sessions of so many threads; ``level`` 0 to 2 of optimization."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[level])
    return options


class Judges(NamedTuple):
    """Who else is asked about faults of graphs."""

    parity: "Parity | None" = None
    audit: "Audited | None" = None

    def asked(self, fault: str, graph: str, model: onnx.ModelProto) -> dict[str, bool | None]:
        """Their verdicts by name."""
        audited = self.audit is not None and fault in OF_QUANTIZERS
        return {
            "parity": None if self.parity is None else self.parity.catches(model, graph),
            "audit": self.audit.catches(model, graph) if self.audit is not None and audited else None,
        }


NOBODY = Judges()


def outcome(subject: Subject, fault: str, graph: str, chance: random.Random, judges: Judges = NOBODY) -> Outcome | None:
    """Plant one fault into ``graph`` and verify it; None where there is no place for it."""
    model = onnx.ModelProto()
    model.CopyFrom(subject.models[graph])
    where = PLANTS[fault](model.graph, chance)
    if where is None:
        return None
    asked = judges.asked(fault, graph, model)
    try:
        found = list(subject.run(model, graph, options_of(1)))
    except Exception as error:  # ONNX Runtime's own kinds: the graph does not load, or does not run
        return Outcome(fault, graph, f"{where}: {type(error).__name__}", "caught", float("inf"), **asked)
    return Outcome(fault, graph, where, subject.state(graph, found), subject.share(graph, found), **asked)


class Parity:
    """The levels op and block of the parity ladder for a bundle of floats, whose truth is computed once."""

    def __init__(self, bundle: Bundle, checkpoint: Path) -> None:
        import torch

        from stiv_deploy.export.graphs.draws import rel_l2
        from stiv_deploy.export.graphs.precision import torch_dtype
        from stiv_deploy.export.parity.ladder import gate_of
        from stiv_deploy.export.parity.oracle import Oracle
        from stiv_deploy.export.parity.requests import parity_requests
        from stiv_deploy.export.parity.runs import probe
        from stiv_deploy.stiv_ref.checkpoint import load_checkpoint

        loaded, self.manifest = load_checkpoint(checkpoint), bundle.manifest
        exact, plain = Oracle(loaded, torch.float64), Oracle(loaded, torch_dtype(self.manifest.precision))
        self._cases: dict[str, tuple[Any, dict[str, tuple[Any, float]]]] = {}
        request = parity_requests(self.manifest, loaded, 10)[-1]
        for graph, inputs in probe(exact, request, self.manifest):
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


class Played(NamedTuple):
    """What a run of the golden answers gave: an output, and its answer."""

    found: np.ndarray
    answer: Answer


def played(bundle: Bundle, threads: int = 1) -> dict[tuple[str, str], Played]:
    """Outputs of the bundle's runs by run and name; raises what a run does that does not come to its end."""
    kept: dict[tuple[str, str], Played] = {}
    compared = golden_player.compared

    def keep(subject: str, size: str, answers: Iterable[Answer], got: dict[str, np.ndarray]) -> Any:
        answers = list(answers)
        kept.update({(subject, each.name): Played(got[each.name], each) for each in answers})
        return compared(subject, size, answers, got)

    with (
        OnnxRuntimeBackend(bundle, threads=threads) as backend,
        patch.object(golden_player, "compared", keep),
    ):
        rows = golden_player.run_rows(backend, bundle, read_golden(bundle))
    if len(kept) < len(rows):
        raise ValueError("a run has not come to its end")
    return kept


def played_share(outputs: dict[tuple[str, str], Played]) -> float:
    """The largest share of a gate."""
    return max((each.answer.error(each.found) / each.answer.gate for each in outputs.values()), default=0.0)


def planted_in_runtime(bundle: Bundle) -> Iterator[Outcome]:
    """Each fault of the runtime, where the bundle has runs."""
    if read_golden(bundle).sampling is None:
        return
    right = played(bundle)
    for fault in runtime_faults.FAULTS:
        try:
            with runtime_faults.planted(fault):
                found = played(bundle)
            shares = [each.answer.error(each.found) / each.answer.gate for each in found.values()]
            state = state_of(shares, [_apart(each.found, right[key].found, each.answer) for key, each in found.items()])
        except Exception:  # whatever a fault leads to
            shares, state = [float("inf")], "caught"
        yield Outcome(RUNTIME, "", fault, state, max(shares), hashes=False)


def planted(subject: Subject, count: int, seed: int, judges: Judges = NOBODY) -> Iterator[Outcome]:
    """``count`` faults, of all kinds in turn, each in a graph of its own choice; fewer where a kind finds no place."""
    chance, kinds, graphs = random.Random(seed), list(PLANTS), list(subject.models)
    for index in range(count):
        tries = (
            outcome(subject, kinds[index % len(kinds)], chance.choice(graphs), chance, judges) for _ in range(TRIES)
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
        shares.append(max(graphs, played_share(played(subject.bundle, threads))))
    return sum(share > 1 for share in shares), max(shares, default=0.0)


def table(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """How many faults of each kind were planted, what became of them, and who else finds them."""
    kinds = {fault: [each for each in outcomes if each.fault == fault] for fault in (*PLANTS, RUNTIME)}
    return {fault: _counts(found) for fault, found in kinds.items() if found}


def _counts(found: list[Outcome]) -> dict[str, int]:
    others = {"by hashes": sum(each.hashes for each in found)}
    for judge in ("parity", "audit"):
        if any(getattr(each, judge) is not None for each in found):
            others[f"by {judge}"] = sum(bool(getattr(each, judge)) for each in found)
    return {"planted": len(found), **Counter(each.state for each in found), **others}


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Shares of the faults: of those that change a bit, what verify finds, and what it or hashes find."""
    real = [each for each in outcomes if each.state != "equal"]
    caught = [each for each in real if each.state == "caught"]
    either = [each for each in outcomes if each.state in ("caught", "equal") or each.hashes]
    count = max(1, len(real))
    return {
        "planted": len(outcomes),
        "equal": len(outcomes) - len(real),
        "caught by verify": round(len(caught) / count, 4),
        "beyond a gate and not caught": sum(each.state == "missed" for each in real),
        "caught by verify, or by the hash of a file": round(1 - (len(outcomes) - len(either)) / count, 4),
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    faults: Annotated[int, typer.Option(min=1, help="Faults to plant.")] = 200,
    clean: Annotated[int, typer.Option(min=0, help="Clean runs.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the faults.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Of the bundle: ask the parity ladder too.")] = None,
    audit: Annotated[bool, typer.Option("--audit", help="Ask the fusion audit of quantizers.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file of all outcomes.")] = None,
) -> None:
    """Print what became of the faults; exit 1 if one was missed or a clean run was caught."""
    subject = Subject(Bundle.open(bundle))
    judges = Judges(
        None if checkpoint is None else Parity(subject.bundle, checkpoint), audited(subject) if audit else None
    )
    outcomes = [*planted(subject, faults, seed, judges), *planted_in_runtime(subject.bundle)]
    false, nearest = alarms(subject, clean, seed)
    report = {
        "command": f"python {shlex.join(sys.argv)}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, onnxruntime {version('onnxruntime')}",
        "bundle": subject.bundle.hash,
        "all": summary(outcomes),
        "kinds": table(outcomes),
        "clean": {"runs": clean, "alarms": false, "largest share of a gate": nearest},
        "not caught": [each._asdict() for each in outcomes if each.state != "caught"],
    }
    print(json.dumps(report, indent=1))
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    if false or any(each.state == "missed" for each in outcomes):
        raise typer.Exit(1)


def audited(subject: Subject) -> "Audited":
    """The fusion audit of the subject's graphs."""
    from audited_faults import Audited

    return Audited(subject.bundle)


if __name__ == "__main__":
    run(main)
