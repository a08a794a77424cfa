"""LoRA files merged into a bundle's weights where a backend loads them; nothing of the bundle is changed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stiv_deploy.runtime.bundle.bundle import AGAIN, Bundle
from stiv_deploy.runtime.bundle.contract import block_of, is_block
from stiv_deploy.runtime.bundle.initializers import (
    STORED,
    Initializer,
    as_stored,
    is_finite,
    read_initializers,
    read_stored,
    read_weight,
)
from stiv_deploy.runtime.bundle.lora import check_lora, linears_of, merged, read_loras
from stiv_deploy.runtime.errors import BundleError, LoraError

TRANSFORMER = ("text_kv", "embed", "head")
"""Graphs of the transformer besides its blocks."""
WEIGHT = ".weight"
FOR_GOOD = "merge it for good: 'stiv export CHECKPOINT --out BUNDLE --lora FILE'"


class Replacement(NamedTuple):
    """A weight [in, out] as it is to be stored, and the number of its type; bfloat16 as bits."""

    values: np.ndarray
    data_type: int


def is_of_transformer(graph: str) -> bool:
    """Whether ``graph`` has linears of the transformer, which a LoRA may change."""
    return is_block(block_of(graph)) or graph in TRANSFORMER


def linear_of(graph: str, initializer: str) -> str | None:
    """The linear, by its name in the model, whose weight ``initializer`` may be; None for what is none."""
    block = block_of(graph)
    if not initializer.endswith(WEIGHT) or not is_of_transformer(graph):
        return None
    name = initializer.removesuffix(WEIGHT)
    return f"blocks.{int(block.removeprefix('block_'))}.{name}" if is_block(block) else name


def weight_places(bundle: Bundle, graph: str) -> Mapping[str, Initializer]:
    """What lies in the data file of ``graph``, by the initializers' names; both files are verified first.

    Raises :class:`BundleError` where one is damaged.
    """
    path = bundle.graph_file(graph)
    try:
        return read_initializers(path)
    except ValueError as error:
        raise BundleError(f"{path}: {error}; {AGAIN}") from None


def _weights(bundle: Bundle, graph: str) -> Iterator[tuple[str, str, Initializer]]:
    """Linears of ``graph``, each with its initializer's name and place. All are stored [in, out]."""
    for name, place in weight_places(bundle, graph).items():
        linear = linear_of(graph, name)
        if linear is not None and len(place.shape) == 2:
            yield linear, name, place


def with_loras(bundle: Bundle, loras: Sequence[str]) -> Bundle:
    """``bundle`` with the LoRA files ``loras``, each as ``FILE[:SCALE]``, merged into its weights.

    Raises :class:`LoraError` for what cannot be merged, before a session is made.
    """
    if not loras:
        return bundle
    read = read_loras(loras)
    graphs = [name for name in bundle.manifest.graphs if name == block_of(name)]
    places = {linear: place for graph in graphs for linear, _, place in _weights(bundle, graph)}
    shapes = {linear: (place.shape[1], place.shape[0]) for linear, place in places.items()}
    for lora in read:
        check_lora(lora, shapes, bundle.manifest.checkpoint)
    rounded = _rounded(bundle)
    if small := [name for name in linears_of(read) if name in rounded or places[name].data_type not in STORED]:
        bits = 4 if small[0] in rounded else 8
        raise LoraError(
            f"{bundle.folder}: {small[0]} is stored in {bits} bits, a LoRA is merged before that; {FOR_GOOD}, with the "
            "--precision and --scales of this bundle"
        )
    return bundle.with_loras(read)


def _rounded(bundle: Bundle) -> set[str]:
    """Linears, by their names in the model, whose weights are values of NVFP4 in a wider type."""
    record = bundle.manifest.quantization
    if record is None or record.format != "nvfp4":
        return set()
    layers = [name.partition(".") for name, choice in record.layers.items() if choice != "high"]
    return {name for graph, _, layer in layers if (name := linear_of(graph, f"{layer}{WEIGHT}"))}


def changed_linears(bundle: Bundle, graph: str) -> list[str]:
    """Linears of ``graph`` that the bundle's LoRAs change, by their names in the model."""
    wanted = set(linears_of(bundle.loras))
    if not wanted or not is_of_transformer(graph):
        return []
    return [linear for linear, _, _ in _weights(bundle, graph) if linear in wanted]


def stored_weights(bundle: Bundle, graph: str, places: Mapping[str, Initializer]) -> Iterator[tuple[str, np.ndarray]]:
    """The initializers of ``graph`` at these ``places``, one by one, as stored; the bundle's LoRAs are merged in.

    Raises :class:`BundleError` where they are not in the data file, and what :func:`replacements` does.
    """
    changed = replacements(bundle, graph)
    for name, place in places.items():
        yield name, changed[name].values if name in changed else _stored(bundle, graph, name, place)


def replacements(bundle: Bundle, graph: str) -> dict[str, Replacement]:
    """Weights of ``graph`` that the bundle's LoRAs change, by their initializers' names.

    Raises :class:`LoraError` where one does not fit its type.
    """
    wanted = set(linears_of(bundle.loras))
    if not wanted:
        return {}
    changed = {}
    for linear, name, place in _weights(bundle, graph):
        if linear in wanted:
            changed[name] = _merged(bundle, graph, linear, place)
    return changed


def _merged(bundle: Bundle, graph: str, linear: str, place: Initializer) -> Replacement:
    path = _data_file(bundle, graph)
    try:
        weight = read_weight(path, place)
    except ValueError:
        raise BundleError(f"{path}: {linear} is not in it; {AGAIN}") from None
    stored = as_stored(np.ascontiguousarray(merged(weight.T, linear, bundle.loras).T), place.data_type)
    if not is_finite(stored, place.data_type):
        raise LoraError(f"{bundle.loras[0].path}: {linear} is too large once merged; give a smaller scale")
    return Replacement(stored, place.data_type)


def _stored(bundle: Bundle, graph: str, name: str, place: Initializer) -> np.ndarray:
    path = _data_file(bundle, graph)
    try:
        return read_stored(path, place)
    except ValueError:
        raise BundleError(f"{path}: {name} is not in it; {AGAIN}") from None


def _data_file(bundle: Bundle, graph: str) -> Path:
    data = bundle.manifest.graphs[graph].data
    assert data is not None
    return bundle.folder / data.path
