"""What enters and leaves the modules of the reference, and the reference run with that traffic forced on it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from stiv_deploy.export.parity.lean import IN_MODEL
from stiv_deploy.export.parity.oracle import Oracle, Tensors
from stiv_deploy.runtime.bundle.contract import block_names, block_of, is_block


class Forced(NamedTuple):
    """Values that a module gets and that others get from it; ``entering`` is None where it gets its own."""

    entering: Tensor | None
    leaving: Tensor


@dataclass(frozen=True)
class Traffic:
    """Tensors by module: the first argument of its call, and its result, both before anything was forced.

    ``outputs`` are those of the graph.
    """

    entering: dict[str, Tensor] = field(default_factory=dict)
    leaving: dict[str, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    outputs: Tensors = field(default_factory=dict)


def root_of(oracle: Oracle, graph: str) -> nn.Module | None:
    """The module of the reference whose children's names are those in ``graph``; None for one without modules."""
    if is_block(block_of(graph)):
        blocks = oracle.model.blocks
        return blocks[block_names(len(blocks)).index(block_of(graph))]
    if graph in ("image_encoder", "decoder"):
        return oracle.vae
    return {"text_encoder": oracle.text_encoder, **dict.fromkeys(IN_MODEL, oracle.model)}.get(graph)


def leaves_of(root: nn.Module | None) -> list[str]:
    """Names of the modules without children."""
    return [name for name, each in root.named_modules() if name and not any(each.children())] if root else []


def traffic(
    oracle: Oracle,
    graph: str,
    inputs: Mapping[str, Tensor],
    modules: Iterable[str],
    forced: Mapping[str, Forced] | None = None,
) -> Traffic:
    """Run ``graph`` and look at ``modules``.

    With ``forced`` each of them gets what that says, and all others get what that says from it: so the error of one
    does not reach another.
    """
    seen = Traffic()
    with _watched(root_of(oracle, graph), modules, seen, forced or {}):
        seen.outputs.update(oracle.run(graph, inputs))
    return seen


@contextmanager
def _watched(
    root: nn.Module | None, modules: Iterable[str], seen: Traffic, forced: Mapping[str, Forced]
) -> Iterator[None]:
    children = {} if root is None else dict(root.named_modules())
    with ExitStack() as stack:
        for name in modules:
            module = children[name]
            watch = _Watch(name, seen, forced.get(name))
            stack.callback(module.register_forward_pre_hook(watch.before).remove)
            stack.callback(module.register_forward_hook(watch.after).remove)
        yield


class _Watch:
    """Looks at one module, and forces what is given."""

    def __init__(self, name: str, seen: Traffic, forced: Forced | None) -> None:
        self.name, self.seen, self.forced = name, seen, forced

    def before(self, _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the call."""
        if not arguments or not isinstance(arguments[0], Tensor):
            return None
        self.seen.entering[self.name] = arguments[0]
        if self.forced is None or self.forced.entering is None:
            return None
        return (self.forced.entering.to(arguments[0].dtype), *arguments[1:])

    def after(self, _module: nn.Module, _arguments: tuple[Any, ...], result: Any) -> Tensor | None:
        """After the call."""
        self.seen.calls[self.name] += 1
        if isinstance(result, Tensor):
            self.seen.leaving[self.name] = result
        return None if self.forced is None else self.forced.leaving.to(result.dtype)
