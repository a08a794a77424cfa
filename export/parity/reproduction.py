"""A wrong graph as a folder that stands alone: the graph, its inputs, what is right, and a script to see the error.

``inputs.json`` and ``expected.json`` are in Polygraphy's formats (a list of feed dictionaries, and its ``RunResults``),
so that ``polygraphy run`` compares any of its backends with them; the script reads them with numpy alone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np
import onnx

from stiv_deploy.export.errors import ExportError

GRAPH, DATA, INPUTS, EXPECTED, SCRIPT, README = (
    "graph.onnx",
    "graph.onnx.data",
    "inputs.json",
    "expected.json",
    "reproduce.py",
    "README.md",
)
FILES = frozenset({GRAPH, DATA, INPUTS, EXPECTED, SCRIPT, README})
"""All that such a folder has in it."""
INLINE_BYTES = 2**30
"""Most bytes of weights (1 GiB) that are put into the graph's own file: it can hold 2 GiB in all."""
RUNNER = "reference"

PROGRAM = '''"""Is {graph} right? python {script}, with numpy and onnxruntime; exit 1 where it is not."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import onnxruntime

FOLDER = Path(__file__).parent
BOUNDS = {bounds}


def read(name):
    def array(found):
        return np.load(io.BytesIO(base64.b64decode(found["array"]))) if "array" in found else found

    return json.loads((FOLDER / name).read_text(), object_hook=array)


options = onnxruntime.SessionOptions()
{options}session = onnxruntime.InferenceSession(
    FOLDER / "{graph}", options, providers={providers}, disabled_optimizers={disabled}
)
expected = read("{expected}")["lst"][0][1][0]["outputs"]
found = session.run(list(BOUNDS), read("{inputs}")[0])
wrong = False
for (name, bound), value in zip(BOUNDS.items(), found):
    right = expected[name]["values"].astype(np.float64)
    error = np.linalg.norm(value - right) / np.linalg.norm(right)
    print(f"{{name}}: relative L2 error {{error:.1e}}, bound {{bound:.1e}}: {{'right' if error <= bound else 'WRONG'}}")
    wrong |= not error <= bound
raise SystemExit(wrong)
'''


class Wrong(NamedTuple):
    """A graph that is wrong: its inputs, and by output what is right and the largest relative L2 error that passes."""

    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    bounds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """One graph, and by the names of its outputs what is right and the largest relative L2 error that passes.

    ``options`` are ONNX Runtime's session settings that it needs, ``disabled`` the optimizers that it does not bear,
    ``providers`` what runs it; ``text`` says in Markdown what it is.
    """

    model: onnx.ModelProto
    inputs: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]
    bounds: Mapping[str, float]
    text: str
    options: Mapping[str, str] = field(default_factory=dict)
    disabled: tuple[str, ...] = ()
    providers: tuple[str, ...] = ("CPUExecutionProvider",)

    def tolerances(self) -> dict[str, float]:
        """Largest L2 norm of the error, by output: what Polygraphy compares with."""
        norms = {name: float(np.linalg.norm(value.astype(np.float64))) for name, value in self.expected.items()}
        return {name: bound * norms[name] for name, bound in self.bounds.items()}


def require_polygraphy() -> None:
    """:class:`ExportError` with the command that installs Polygraphy, if it is missing."""
    try:
        import polygraphy.json  # noqa: F401
    except ImportError as error:
        reason = f"Polygraphy cannot be imported ({error})"
        raise ExportError(f"{reason}; run: pip install 'stiv-deploy[export]'") from None


def write_reproduction(folder: Path, given: Reproduction) -> None:
    """Write ``given`` into ``folder``, which exists."""
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    large = given.model.ByteSize() > INLINE_BYTES
    onnx.save(given.model, folder / GRAPH, save_as_external_data=large, location=DATA)
    with G_LOGGER.verbosity(G_LOGGER.ERROR):  # it speaks on standard output, which may be JSON
        save_json([dict(given.inputs)], str(folder / INPUTS))
        results = RunResults()
        results.add([dict(given.expected)], runner_name=RUNNER)
        results.save(str(folder / EXPECTED))
    (folder / SCRIPT).write_text(script(given), encoding="utf-8")
    (folder / README).write_text(readme(given), encoding="utf-8")


def script(given: Reproduction) -> str:
    """The script, which imports nothing of ours."""
    settings = (f"options.add_session_config_entry({key!r}, {value!r})\n" for key, value in given.options.items())
    names = {"graph": GRAPH, "script": SCRIPT, "inputs": INPUTS, "expected": EXPECTED}
    values = {"bounds": json.dumps(dict(given.bounds)), "providers": json.dumps(given.providers)}
    values["disabled"] = json.dumps(given.disabled)
    return PROGRAM.format(**values, options="".join(settings).replace("'", '"'), **names)


def commands(given: Reproduction) -> dict[str, str]:
    """The lines that show the error on each backend, by what they need."""
    tolerances = " ".join(quote(f"{name}:{value:.6g}") for name, value in given.tolerances().items())
    files = f"--load-inputs {INPUTS} --load-outputs {EXPECTED} --compare l2 --l2-tolerance {tolerances}"
    plain = " --graph-optimization-level ORT_DISABLE_ALL" if given.options else ""
    trt = f"polygraphy run {GRAPH} --trt --strongly-typed {files}"
    return {
        "numpy, onnxruntime": f"python {SCRIPT}",
        "polygraphy, onnxruntime": f"polygraphy run {GRAPH} --onnxrt{plain} {files}",
        "polygraphy, tensorrt, a GPU": trt,
        "polygraphy, tensorrt_rtx, a GPU": f"POLYGRAPHY_USE_TENSORRT_RTX=1 {trt}",
    }


def readme(given: Reproduction) -> str:
    """What the folder is, and how to see the error."""
    lines = "\n".join(f"# needs {needs}\n{line}" for needs, line in commands(given).items())
    return f"{given.text}\n\n```sh\n{lines}\n```\n"
