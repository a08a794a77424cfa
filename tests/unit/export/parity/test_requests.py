"""The requests of the ladder: what of the sampler they go through."""

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stiv_deploy.export.bundle_from_checkpoint import default_bucket, sampling_defaults
from stiv_deploy.export.graphs.modules import model_facts
from stiv_deploy.export.parity.requests import PROMPTS, Request, parity_requests, understood
from stiv_deploy.runtime.bundle.contract import Student
from stiv_deploy.runtime.sampling.solvers import EULER, evaluations
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.data.moving_digits import WORDS
from stiv_deploy.stiv_ref.data.world.captions import words
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.sampler import Solver
from stiv_deploy.stiv_ref.text import word_tokenizer


def manifest_of(checkpoint: Checkpoint, **facts: Any) -> Any:
    """As much of a manifest as requests are made from."""
    model, sampling = model_facts(checkpoint.config), checkpoint.config.sampling
    defaults = sampling_defaults(sampling, [default_bucket(sampling, model)])
    return SimpleNamespace(model=model.model_copy(update=facts), sampling=defaults, skips=False)


def test_every_solver_and_guidance_is_gone_through_with_and_without_a_given_frame(micro: Checkpoint) -> None:
    requests = parity_requests(manifest_of(micro), micro, 4)
    assert {each.settings.solver for each in requests} == {*Solver}
    assert {each.settings.guidance_mode for each in requests} == {GuidanceMode.JIT, GuidanceMode.SIT}
    assert {bool(each.inputs.frame_mask.any()) for each in requests} == {True, False}
    for each in requests:
        assert all(word in each.name for word in (each.settings.solver, each.settings.guidance_mode))
        assert bool(each.inputs.frame_mask.any()) == each.name.startswith("ti2v")


def test_a_student_is_asked_in_one_row_at_its_own_scales(micro: Checkpoint) -> None:
    requests = parity_requests(manifest_of(micro, student=Student(guidance=(2.0, 6.0))), micro, 4)
    assert sorted(each.settings.solver for each in requests) == sorted(Solver)
    assert [each.settings.guidance_scale for each in requests] == [4.0, 2.0, 6.0]
    for each in requests:
        assert (each.branches, len(each.token_ids)) == (1, 1)
        timed = {name: value.tolist() for name, value in each.timed(0.5, 0.7).items()}
        assert timed == {"timestep": [0.5], "guidance": [each.settings.guidance_scale]}
        assert each.runtime_settings().rows() == each.runtime_settings().rows(guided=False)


def test_a_flow_map_is_asked_by_its_own_steps_alone(micro: Checkpoint) -> None:
    student = Student(guidance=(2.0, 6.0), flow_map=True)
    requests = parity_requests(manifest_of(micro, student=student), micro, 4)
    assert {each.settings.solver for each in requests} == {Solver.EULER}
    assert [each.settings.steps for each in requests] == [4, 4, 1]
    assert {name: value.tolist() for name, value in requests[0].timed(0.5, 0.7).items()} == {
        "timestep": [0.5],
        "guidance": [4.0],
        "target_time": [0.7],
    }


@pytest.mark.parametrize(("words", "pair"), [(words(), 0), (WORDS, 1)])
def test_a_checkpoint_is_asked_in_the_words_that_it_knows(words: Sequence[str], pair: int) -> None:
    assert understood(word_tokenizer(words, 16)) == PROMPTS[pair]


def by_ab2(checkpoint: Checkpoint, steps: int) -> list[Request]:
    """The requests by AB2: guided all the time, and in an interval."""
    requests = parity_requests(manifest_of(checkpoint), checkpoint, steps)
    return [each for each in requests if each.settings.solver is Solver.AB2]


def test_ab2_has_steps_of_other_lengths(micro: Checkpoint) -> None:
    request = by_ab2(micro, 4)[0]
    weights = [each.weights for each in evaluations(request.runtime_settings())]
    assert len(set(weights)) == 4
    steps = torch.tensor(request.times()).diff()
    assert (steps[1:] / steps[:-1] > 1.2).all()


def test_ab2_looks_back_and_starts_anew_on_both_sides_of_guidance(micro: Checkpoint) -> None:
    planned = evaluations(by_ab2(micro, 10)[1].runtime_settings())
    turns = [before.guided != after.guided for before, after in pairwise(planned)]
    assert sum(turns) == 2
    assert [each.weights == EULER for each in planned[1:]] == turns
    assert {each.guided for each in planned if each.weights != EULER} == {True, False}


def test_an_image_model_has_no_frame_to_give(micro: Checkpoint) -> None:
    (request,) = parity_requests(manifest_of(micro, temporal=False), micro, 4)
    assert not request.inputs.frame_mask.any()
