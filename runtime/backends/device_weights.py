"""Weights in device memory, for engines that take them as inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from stiv_deploy.runtime.backends.base import aligned
from stiv_deploy.runtime.backends.cuda import Cuda, Memory, Stream
from stiv_deploy.runtime.backends.engine_choice import build_command, same_again
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.initializers import STORED
from stiv_deploy.runtime.bundle.manifest import EngineRecord
from stiv_deploy.runtime.bundle.merging import FOR_GOOD, changed_linears, stored_weights, weight_places
from stiv_deploy.runtime.errors import EngineError, LoraError, few


@dataclass(frozen=True)
class DeviceWeights:
    """Addresses of weights by their names, all in one ``memory``."""

    addresses: dict[str, int]
    memory: Memory


def load_weights(cuda: Cuda, stream: Stream, bundle: Bundle, record: EngineRecord) -> DeviceWeights:
    """The weights that the engine of ``record`` takes as inputs, of its graph, with the bundle's LoRAs merged in.

    They are queued on ``stream``. Raises :class:`EngineError` where the graph has no such weights, and what
    :func:`~stiv_deploy.runtime.bundle.merging.stored_weights` does.
    """
    stored = weight_places(bundle, record.graph)
    unknown = [name for name in record.weights if name not in stored or stored[name].data_type not in STORED]
    if unknown:
        raise EngineError(
            f"engine {record.file.path} takes {few(unknown)} as input, which graph {record.graph} has not as weights; "
            f"{same_again(record, bundle.manifest)}"
        )
    places = {name: stored[name] for name in record.weights}
    starts = list(accumulate((aligned(place.nbytes) for place in places.values()), initial=0))
    memory = cuda.allocate(starts.pop())
    addresses = {name: memory.address + start for name, start in zip(places, starts, strict=True)}
    for name, values in stored_weights(bundle, record.graph, places):
        stream.copy_in(addresses[name], values)
    return DeviceWeights(addresses, memory)


def check_loras(bundle: Bundle, records: Sequence[EngineRecord]) -> None:
    """:class:`LoraError` if the bundle's LoRAs change weights that lie in an engine of ``records``."""
    if not bundle.loras:
        return
    for graph in {record.graph: None for record in records if not record.weights}:
        changed = changed_linears(bundle, graph)
        if changed:
            raise LoraError(
                f"{few(changed)} lies in the engine of {graph}, --lora cannot change it there; "
                f"{build_command(records[0].backend, records[0].sm, shared=True)}; or give --backend onnxruntime, or "
                f"{FOR_GOOD}"
            )
