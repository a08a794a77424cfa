"""A real model's clips by several devices, held against the reference in float64 by the ladder's gate of a free run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.graphs.draws import rel_l2
from stiv_deploy.export.parity.ladder import Ladder, News, Subject, gate_of, sides_of
from stiv_deploy.export.parity.requests import parity_requests
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.progress import unheard
from stiv_deploy.runtime.sampling.engine import StepEngine
from stiv_deploy.runtime.sampling.parallel.devices import ParallelDenoiser
from stiv_deploy.runtime.sampling.parallel.opening import open_team
from stiv_deploy.runtime.sampling.text_stage import TextStage
from stiv_deploy.stiv_ref.checkpoint import open_checkpoint
from stiv_deploy.stiv_ref.sampler import sample

pytestmark = pytest.mark.slow
FORMS = [(2, "cfg2"), (2, "dsp2"), (3, "dsp3"), (4, "cfg2xdsp2"), (8, None)]


@pytest.fixture(scope="module")
def halved(checkpoint: Path, once: Callable[..., Path], traced_once: None) -> Bundle:
    """The float32 bundle of the shipped checkpoint with halves."""
    folder = once(
        "halves", lambda path: export_bundle(ExportRequest(checkpoint=checkpoint, out=path, halves=True, check=False))
    )
    return Bundle.open(folder)


def test_clips_of_several_devices_pass_the_ladders_gate(halved: Bundle, checkpoint: Path) -> None:
    subject = Subject(bundle=halved, checkpoint=open_checkpoint(checkpoint).load())
    request = parity_requests(halved.manifest, subject.checkpoint, 2)[-1]
    sides = sides_of(subject)
    truth, plain = (
        sample(side.boundary, side.sampling_inputs(request), request.settings) for side in (sides.truth, sides.plain)
    )
    gate = gate_of("free_run", "float32", rel_l2(plain, truth))
    for count, form in FORMS:
        team = open_team(halved, ["cpu"] * count, parallel=form, threads=1)
        backend, manifest = team.backend, halved.manifest
        dims = Ladder(backend, halved, sides, News(unheard, 1)).dims(request)
        make = partial(ParallelDenoiser, team, manifest)
        engine = StepEngine(backend, manifest, dims, TextStage(backend, manifest), model=make)
        slot = engine.admit(request.sample())
        finished = {}
        while engine.running:
            finished |= engine.tick().finished
        team.close()
        backend.close()
        assert rel_l2(torch.from_numpy(finished[slot][None]), truth) <= gate, str(team.placement)
