"""Runs a bundle's graphs on the inputs of its golden answers and holds what they give against them."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from pydantic import ConfigDict

from stiv_deploy.runtime.backends.base import Backend, Buffer
from stiv_deploy.runtime.bundle.bounds import Name
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.bundle.golden import Answer, Golden, GraphAnswer
from stiv_deploy.runtime.errors import BundleError, StivError, one_line
from stiv_deploy.runtime.sampling.golden_inputs import golden_inputs


class VerifyRow(Frozen):
    """One output against its answer: relative L2 ``error``, and the ``gate`` that it passes at or below.

    ``subject`` is a graph, or what was sampled; ``fault`` says why there was no output, whose error is infinite.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    subject: Name
    size: Name
    output: Name
    error: float
    gate: float
    fault: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the error is one that the precision makes."""
        return self.error <= self.gate


def graph_rows(backend: Backend, bundle: Bundle, golden: Golden, cases: Iterable[GraphAnswer]) -> list[VerifyRow]:
    """The rows of ``cases``; a graph that does not run fails in all of its outputs.

    Raises :class:`~stiv_deploy.runtime.errors.BundleError` for a file that is damaged.
    """
    return [row for case in cases for row in _case_rows(backend, bundle, golden, case)]


def _case_rows(backend: Backend, bundle: Bundle, golden: Golden, case: GraphAnswer) -> list[VerifyRow]:
    try:
        answers = [_of_engines(each) for each in case.outputs] if backend.engines else case.outputs
        return list(compared(case.graph, case.size, answers, _outputs(backend, bundle, golden, case)))
    except BundleError:
        raise
    except StivError as error:
        return list(failed(case.graph, case.size, case.outputs, error))


def _of_engines(each: Answer) -> Answer:
    """``each`` with the gate that engines have."""
    return each if each.engine_gate is None else each.model_copy(update={"gate": each.engine_gate})


def compared(subject: str, size: str, answers: Iterable[Answer], got: Mapping[str, np.ndarray]) -> Iterator[VerifyRow]:
    """A row for each of ``answers``."""
    for each in answers:
        error = each.error(got[each.name])
        yield VerifyRow(subject=subject, size=size, output=each.name, error=error, gate=each.gate)


def failed(subject: str, size: str, answers: Iterable[Answer], error: StivError) -> Iterator[VerifyRow]:
    """Rows of outputs that there are not, because of ``error``."""
    fault = one_line(str(error), 300)
    for each in answers:
        yield VerifyRow(subject=subject, size=size, output=each.name, error=float("inf"), gate=each.gate, fault=fault)


def _outputs(backend: Backend, bundle: Bundle, golden: Golden, case: GraphAnswer) -> dict[str, np.ndarray]:
    """What the graph of ``case`` gives, fp32 or uint8; NaN or 0 where it has written nothing."""
    spec = bundle.manifest.graphs[case.graph].spec
    dims = case.sizes.dims(bundle.manifest.model)
    inputs = {tensor.name: backend.empty(tensor.sized(dims), tensor.dtype) for tensor in spec.inputs}
    for name, values in golden_inputs(case.graph, spec, dims, golden.vocabulary).items():
        put(backend, inputs[name], values)
    outputs = {tensor.name: backend.empty(tensor.sized(dims), tensor.dtype) for tensor in spec.outputs}
    for buffer in outputs.values():
        put(backend, buffer, np.full(buffer.shape, 0 if buffer.dtype == "uint8" else np.nan, np.float32))
    backend.bind(case.graph, inputs, outputs)()
    return {name: backend.read(buffer) for name, buffer in outputs.items()}


def put(backend: Backend, buffer: Buffer, values: np.ndarray) -> None:
    """Write ``values``, those in float32 rounded to the type of ``buffer``."""
    if buffer.dtype == "bfloat16":
        raw = buffer.part(0, (buffer.nbytes,), "bool")  # bytes: hosts have no such type
        backend.write(raw, rounded_bfloat16(values).reshape(-1).view(np.bool_))
    else:
        backend.write(buffer, values.astype(buffer.dtype, copy=False))


def rounded_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, uint16, of float32 ``values`` rounded to bfloat16, to even where two are as near."""
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), nearest).astype(np.uint16)
