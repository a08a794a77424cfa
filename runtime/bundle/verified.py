"""What ``stiv verify`` found out about a bundle, kept beside it: for which engines, on which device, by which library.

The file ``<bundle>.verified.json`` has one result for each of them, the last one. It is written whole or not at all.
"""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationError

from stiv_deploy.runtime.bundle.bounds import Bytes, Digest, Name
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.errors import few
from stiv_deploy.runtime.files import read_json, write_text

SUFFIX = ".verified.json"
KEPT = 100
"""Most results in a file; the oldest go."""
State = Literal["verified", "not verified", "failed"]


class Machine(Frozen):
    """What computes: a backend's name, its device, driver and library with version, and its ``engines``.

    ``engines`` is the SHA-256 over those of its engine files; None where it runs the graphs themselves.
    """

    backend: Name
    device: Name
    driver: Name
    library: Name
    engines: Digest | None = None


class VerifyResult(Frozen):
    """One run of ``stiv verify``: of the bundle with this hash and these golden ``answers`` (SHA-256), where, and when.

    ``quick`` is a run over one size of each graph. ``failed`` are the graphs, and sampling steps, whose outputs were
    beyond their gates; ``finished`` is the time in UTC, as ``2026-11-28T18:00:00Z``.
    """

    bundle: Digest
    answers: Digest
    machine: Machine
    quick: bool
    compared: Bytes
    failed: Annotated[tuple[Name, ...], Field(max_length=10_000)]
    finished: Name

    @property
    def passed(self) -> bool:
        """Whether all was right."""
        return not self.failed

    @property
    def of(self) -> tuple[str, str, Machine]:
        """What the result holds for; that of another is none."""
        return self.bundle, self.answers, self.machine


class _Results(Frozen):
    format: Literal["stiv-verified"] = "stiv-verified"
    results: Annotated[tuple[VerifyResult, ...], Field(max_length=KEPT)] = ()


class Verdict(NamedTuple):
    """What is known of a bundle on a machine, why, in one line, and the result that says so."""

    state: State
    reason: str
    result: VerifyResult | None = None


def results_file(folder: Path) -> Path:
    """Where results of the bundle in ``folder`` are kept: beside it."""
    place = folder.absolute()
    return place.with_name(f"{place.name}{SUFFIX}")


def _read(folder: Path) -> tuple[VerifyResult, ...]:
    """All results; none where the file is absent or is no such file."""
    try:
        return _Results.model_validate(read_json(results_file(folder))).results
    except (ValueError, ValidationError):
        return ()


def read_result(bundle: Bundle, machine: Machine) -> Verdict:
    """Whether ``bundle`` has proven itself on ``machine`` as they are now."""
    golden = bundle.manifest.golden
    if golden is None:
        return Verdict("not verified", "the bundle has no golden answers, an older export made it")
    wanted = bundle.manifest.bundle_hash, golden.sha256, machine
    found = next((each for each in _read(bundle.folder) if each.of == wanted), None)
    if found is None:
        return Verdict("not verified", f"'stiv verify' has not run for {machine.backend} ({machine.device}) as it is")
    if not found.passed:
        return Verdict("failed", f"{few(found.failed)} gave wrong results in 'stiv verify'", found)
    return Verdict("verified", f"{found.compared} outputs compared at {found.finished}", found)


def keep_result(folder: Path, result: VerifyResult) -> None:
    """Put ``result`` beside the bundle in ``folder``, in place of one for the same.

    A quick result does not stand in place of a whole one that says the same. Raises
    :class:`~stiv_deploy.runtime.errors.OutputError`.
    """
    kept = _read(folder)
    same = next((each for each in kept if each.of == result.of), None)
    if same is not None and result.quick and not same.quick and same.passed == result.passed:
        return
    others = [each for each in kept if each is not same][: KEPT - 1]
    text = _Results(results=(result, *others)).model_dump_json(indent=1)
    write_text(results_file(folder), text + "\n", "choose a folder you may write to")
