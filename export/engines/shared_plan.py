"""Which graphs have their weights as inputs under ``stiv build --shared-plan``, and which of them share an engine.

The weights stay in the bundle's data files; the runtime binds each graph's own where it binds the graph.
"""

from collections.abc import Mapping, Sequence

from stiv_deploy.export.engines.weight_inputs import PLAIN, WeightInputs
from stiv_deploy.runtime.bundle.contract import has_layer, is_block, is_half
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.bundle.merging import is_of_transformer
from stiv_deploy.runtime.errors import EngineError, few

SCALES = "and with its scales as inputs TensorRT-RTX multiplies in 16 bits instead"
"""Why layers in 8 bits have no shared plan: tried with FP8 and INT8 in float16 and TensorRT-RTX 1.7.1."""


def choose_weight_inputs(manifest: Manifest, graphs: Sequence[str], attention: str) -> list[str]:
    """Those of ``graphs`` whose weights become inputs under ``--shared-plan``: all that a LoRA may change.

    Raises :class:`EngineError` where there are none, for plugins, and for layers in 8 or 4 bits: an engine whose
    scales are inputs multiplies in 16 bits.
    """
    chosen = list(filter(is_of_transformer, graphs))
    if not chosen:
        raise EngineError(f"--shared-plan is for blocks, their halves, text_kv, embed and head, not for {few(graphs)}")
    if attention != "native":
        raise EngineError(f"--shared-plan has no plugins: take --attention native, or {PLAIN}")
    _check_types(manifest, chosen)
    return chosen


def _check_types(manifest: Manifest, graphs: Sequence[str]) -> None:
    record = manifest.quantization
    if record is None:
        return
    small = [name for name, choice in record.layers.items() if choice != "high"]
    found = next((name for name in small if any(has_layer(graph, name) for graph in graphs)), None)
    if found is not None:
        why = "which was not tried with weights as inputs" if record.format == "nvfp4" else SCALES
        raise EngineError(f"--shared-plan: layer {found} is {record.format.upper()}, {why}; {PLAIN}")


def first_of_form(inputs: Mapping[str, WeightInputs]) -> dict[str, str]:
    """Of each block and half in ``inputs`` the first one of its kind and form, whose engine it shares."""
    firsts: dict[tuple[str, str], str] = {}
    shared = [graph for graph in inputs if is_block(graph) or is_half(graph)]
    return {graph: firsts.setdefault((graph.partition("_")[0], inputs[graph].digest), graph) for graph in shared}
