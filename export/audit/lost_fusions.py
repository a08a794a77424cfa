"""What an engine whose weights are inputs loses against one that has them in its plan, by name: notes, no failures."""

from collections.abc import Collection, Iterator, Sequence

from stiv_deploy.export.audit.layer_report import EngineLayer
from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.errors import few


class AuditNote(Frozen):
    """Something to know of the engine of ``graph`` for one target and bucket, which fails no check."""

    target: str
    bucket: str
    graph: str
    text: str


def lost_fusions(shared: Sequence[EngineLayer], own: Sequence[EngineLayer], weights: Collection[str]) -> Iterator[str]:
    """What products no longer compute besides themselves, and kernels that only prepare ``weights``, one a line.

    ``shared`` are the layers of the engine with weights as inputs, ``own`` of the one that has them in its plan.
    """
    for layer in own:
        products = [node for node in layer.nodes if layer.is_product and is_product_node(node)]
        if products:
            yield from _lost(products[0], layer, shared)
    for layer in shared:
        names = [tensor.name for tensor in layer.inputs]
        if layer.is_kernel and names and set(names) <= set(weights):
            yield f"{few(names)} is put into another shape by a kernel of its own, in every run"


def is_product_node(node: str) -> bool:
    """Whether the ONNX node called ``node`` is the product of a linear."""
    return node.rpartition(".")[2] in ("MatMul", "Gemm")


def _lost(product: str, own: EngineLayer, shared: Sequence[EngineLayer]) -> Iterator[str]:
    """Nodes that the kernel of ``product`` computes too where weights lie in the plan, and no longer."""
    left = {node for layer in shared if product in layer.nodes for node in layer.nodes}
    for node in own.nodes:
        if node not in left:
            yield f"{node} is not fused into {product}, but {_place(node, shared)}"


def _place(node: str, shared: Sequence[EngineLayer]) -> str:
    layers = [layer for layer in shared if node in layer.nodes]
    others = [other for layer in layers for other in layer.nodes if other != node]
    return f"done by the kernel of {few(others, 2)}" if others else "a kernel of its own"
