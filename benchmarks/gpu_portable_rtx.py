"""Does a portable TensorRT-RTX engine deserialize and run on this GPU, and are its results right?

    python benchmarks/gpu_portable_rtx.py BUNDLE [--json FILE]

Needs a GPU, TensorRT-RTX and cuda-python. Compiles the bundle's graphs for no particular GPU (into a copy of the
bundle), asks the library whether it thinks the engines valid here, loads and runs every one at its typical size, and
compares it with ONNX Runtime on the CPU. Exits 0 whatever the answer is: the answer is the result.
"""

import shutil
import tempfile
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from stiv_deploy.export.engines.build import BuildRequest, build_engines
from stiv_deploy.runtime.backends.base import Backend, Buffer
from stiv_deploy.runtime.backends.cuda import Cuda
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend
from stiv_deploy.runtime.bundle.bundle import Bundle, write_manifest
from stiv_deploy.runtime.bundle.contract import TensorSpec
from stiv_deploy.runtime.bundle.manifest import PORTABLE
from stiv_deploy.runtime.errors import StivError
from stiv_deploy.runtime.tensorrt_library import import_tensorrt

SEED = 0


@dataclass(frozen=True)
class GraphAnswer:
    """What happened to one graph: the error that stopped it, or its relative L2 error against ONNX Runtime."""

    graph: str
    validity: str
    error: str | None = None
    rel_l2: float | None = None


def random_input(spec: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Plausible host values of an input: token ids and masks of ones, bools, normal floats."""
    if spec.dtype == "int64":
        return np.ones(shape, np.int64)
    if spec.dtype == "bool":
        return generator.random(shape) < 0.5
    if spec.name == "text_mask":
        return np.zeros(shape, np.float32)
    return generator.standard_normal(shape, np.float32)


def run_graph(backend: Backend, bundle: Bundle, graph: str) -> dict[str, np.ndarray]:
    """Outputs of a float32 graph at the first bucket's typical size, on inputs that depend on the seed only."""
    manifest, generator = bundle.manifest, np.random.default_rng(SEED)
    spec, dims = manifest.graphs[graph].spec, manifest.buckets[0].dims(manifest.model, "typical")
    inputs: dict[str, Buffer] = {
        tensor.name: backend.upload(random_input(tensor, tensor.sized(dims), generator)) for tensor in spec.inputs
    }
    outputs = {tensor.name: backend.empty(tensor.sized(dims), tensor.dtype) for tensor in spec.outputs}
    backend.bind(graph, inputs, outputs)()
    return {name: backend.read(buffer) for name, buffer in outputs.items()}


def rel_l2(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The worst output's relative L2 error."""
    return max(
        float(np.linalg.norm(found[name].astype(np.float64) - value) / max(np.linalg.norm(value), 1e-30))
        for name, value in wanted.items()
    )


def validity(bundle: Bundle, graph: str) -> str:
    """What the library says of the engine file before anything is loaded."""
    trt = import_tensorrt("tensorrt-rtx")
    record = next(each for each in bundle.manifest.engines if each.graph == graph and each.sm == PORTABLE)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    verdict, diagnostics = runtime.get_engine_validity(bundle.verified(record.file).read_bytes())
    return f"{verdict.name} (diagnostics {int(diagnostics)})"


def answer_for(bundle: Bundle, graph: str) -> GraphAnswer:
    """Try one graph; a backend of its own, so that a broken context does not spoil the next."""
    said = validity(bundle, graph)
    try:
        with TensorRTBackend(bundle, "tensorrt-rtx") as backend:
            found = run_graph(backend, bundle, graph)
    except StivError as error:
        return GraphAnswer(graph, said, error=str(error))
    with OnnxRuntimeBackend(bundle) as reference:
        return GraphAnswer(graph, said, rel_l2=rel_l2(found, run_graph(reference, bundle, graph)))


def portable_copy(source: Path, folder: Path) -> Bundle:
    """A copy of a float32 bundle with portable engines and no others."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("engines"))
    bundle = Bundle.open(folder)
    if bundle.manifest.precision != "float32":
        raise StivError(f"{source} is in {bundle.manifest.precision}; this check wants a float32 bundle")
    write_manifest(folder, bundle.manifest.model_copy(update={"engines": ()}))
    build_engines(BuildRequest(bundle=folder, backend="tensorrt-rtx", sm=PORTABLE))
    return Bundle.open(folder)


def measure(source: Path) -> dict[str, object]:
    """The whole experiment."""
    device = Cuda().device
    with tempfile.TemporaryDirectory() as temporary:
        bundle = portable_copy(source, Path(temporary) / "bundle")
        answers = [answer_for(bundle, graph) for graph in bundle.manifest.graphs]
    return {
        "question": "does a portable TensorRT-RTX engine deserialize and run on this GPU?",
        "answer": all(answer.error is None for answer in answers),
        "gpu": device.name,
        "sm": device.sm,
        "tensorrt_rtx": import_tensorrt("tensorrt-rtx").__version__,
        "graphs": [asdict(answer) for answer in answers],
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="A float32 bundle.")],
    json: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
) -> None:
    """Print the answer, graph by graph, and write it to --json."""
    result = measure(bundle)
    print(f"{result['gpu']} (SM {result['sm']}), TensorRT-RTX {result['tensorrt_rtx']}")
    for row in result["graphs"]:  # type: ignore[attr-defined]
        print(f"  {row['graph']:14} {row['validity']:28} {row['error'] or 'rel-L2 {:.1e}'.format(row['rel_l2'])}")
    print(f"portable engines run here: {'yes' if result['answer'] else 'no'}")
    if json is not None:
        json.write_text(dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from command import run

    run(main)
